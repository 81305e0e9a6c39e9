"""Which components a checkpoint becomes, with the configuration and precision each is traced in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ArgumentError
from .checkpoint import Checkpoint, Part
from .graphs import graph_key

PRECISIONS = ("float32", "float16", "bfloat16")
ALIASES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentPlan:
    """A component to export: its kind in the bundle, the checkpoint's part it comes from, and its graph's key."""

    kind: str
    part: Part
    config: Mapping[str, Any]
    dtype: str

    @property
    def key(self) -> str:
        return graph_key(self.kind, self.config, self.dtype)


def choose_precisions(checkpoint: Checkpoint, dtype: str = "float32", vae_dtype: str | None = None) -> dict[str, str]:
    """A precision for each component.

    The VAE follows `vae_dtype`; without one it follows `dtype`, but for a VAE whose configuration says
    `force_upcast` (SDXL's, which overflows in float16) it is float32.
    """
    chosen = _precision(dtype)
    upcast = bool(checkpoint.parts["vae"].config.get("force_upcast", False)) and chosen == "float16"
    vae = _precision(vae_dtype) if vae_dtype else ("float32" if upcast else chosen)
    return {kind: vae if kind.startswith("vae") else chosen for kind in _kinds(checkpoint)}


def _precision(name: str) -> str:
    full = ALIASES.get(name, name)
    if full not in PRECISIONS:
        raise ArgumentError(f"unknown precision {name!r}", expected=f"one of {', '.join([*ALIASES, *PRECISIONS])}")
    return full


def _kinds(checkpoint: Checkpoint) -> list[str]:
    encoders = [name for name in ("text_encoder", "text_encoder_2") if name in checkpoint.parts]
    return [*encoders, "unet", "vae_decoder", "vae_encoder"]


def plan_components(checkpoint: Checkpoint, dtypes: Mapping[str, str] | None = None) -> list[ComponentPlan]:
    """The components in the order of their export; text encoders first, as the gate feeds the UNet their output."""
    plans = []
    for kind in _kinds(checkpoint):
        part = checkpoint.parts["vae" if kind.startswith("vae") else kind]
        config = component_config(kind, part.config, part.class_name, checkpoint.family)
        plans.append(ComponentPlan(kind=kind, part=part, config=config, dtype=(dtypes or {}).get(kind, "float32")))
    return plans


def component_config(kind: str, config: Mapping[str, Any], class_name: str, family: str) -> dict[str, Any]:
    """A part's configuration, with what else decides a text encoder's graph: its class and the family's own layer."""
    if not kind.startswith("text_encoder"):
        return dict(config)
    return {**config, "_class": class_name, "_layer": 2 if family == "sdxl" else 0}
