"""The standard architectures' configurations, whole: `architectures.json` with every default filled in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fewstep.export.checkpoint.configs import TEXT_DEFAULTS, TINY_DEFAULTS, UNET_DEFAULTS, VAE_DEFAULTS, is_tiny

FILE = Path(__file__).with_name("architectures.json")
CLASSES = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
}
_DEFAULTS = {
    "unet": UNET_DEFAULTS,
    "vae": VAE_DEFAULTS,
    "text_encoder": TEXT_DEFAULTS,
    "text_encoder_2": TEXT_DEFAULTS,
}


def standard_configs(name: str) -> dict[str, dict[str, Any]]:
    """The configurations of an architecture's parts, by part: what their `config.json` states."""
    data = json.loads(FILE.read_text(encoding="utf-8"))
    family = dict(data["families"][name])
    condition = family.pop("time_cond_proj_dim", None)
    configs = {}
    for part, variant in family.items():
        stated = data[part][variant]
        configs[part] = {**(TINY_DEFAULTS if is_tiny(stated) else _DEFAULTS[part]), **stated}
    if condition:
        configs["unet"]["time_cond_proj_dim"] = condition
    return configs


def family_of(name: str) -> str:
    """The family of an architecture; a VAE for itself has any."""
    return {"sd21": "sd2", "taesd": "sd1"}.get(name, name.partition("-")[0])
