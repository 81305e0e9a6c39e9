"""Original checkpoints: one safetensors file in the layout of CompVis's and Stability's own code.

Each of our names has exactly one original name, so a file is read by asking for the names that a graph needs. Two
things are more than a name: OpenCLIP keeps query, key and value in one matrix, and its text projection transposed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from ...errors import CorruptError, UnsupportedError
from ...families import all_families, known_models
from ...weights.original import THIRDS, original_name
from ...weights.stored import Stored

REFUSED = {
    "model.diffusion_model.joint_blocks.": "SD 3",
    "model.diffusion_model.double_blocks.": "Flux",
    "double_blocks.": "Flux",
    "joint_blocks.": "SD 3",
    "transformer_blocks.0.attn.add_k_proj.": "SD 3 or Flux",
    "single_transformer_blocks.": "Flux",
    "control_model.": "a ControlNet",
    "controlnet_cond_embedding.": "a ControlNet",
    "input_hint_block.": "a ControlNet",
    "encoder_pooling.": "DeepFloyd-IF",
    "encoder_hid_proj.": "DeepFloyd-IF or Kandinsky",
    "conditioner.embedders.0.model.": "the SDXL refiner",
    "model.diffusion_model.input_blocks.1.0.time_stack.": "Stable Video Diffusion",
}
"""Beginnings of names that tell models which are not exported."""

TINY_MARK = "decoder.layers.0.weight"
"""A tensor that tiny autoencoders have in diffusers' layout."""

_PREFIXES = {
    "unet": ("model.diffusion_model.", "diffusion_model.", "unet.", ""),
    "vae": ("first_stage_model.", "vae.", ""),
}
_MARKS = {
    "unet": {"input_blocks.0.0.weight": "original", "conv_in.weight": "diffusers"},
    "vae": {
        "decoder.mid.block_1.conv1.weight": "original",
        "decoder.mid_block.resnets.0.conv1.weight": "diffusers",
        TINY_MARK: "diffusers",
    },
    "text_encoder": {
        "text_model.embeddings.token_embedding.weight": "diffusers",
        "embeddings.token_embedding.weight": "diffusers",
        "token_embedding.weight": "open_clip",
    },
}

_EDM = {
    "edm_mean": "Playground v2.5",
    "edm_vpred.sigma_max": "an EDM model that predicts v",
}
"""Tensors by which files say that their model was trained in EDM's formulation."""


def _encoder_prefixes(name: str) -> list[str]:
    """What a text encoder's tensors begin with in the files of any family, so that another family's are found too."""
    return [p for f in all_families() for e in f.text_encoders if e.name == name for p in e.prefixes]


def find_layout(part: str, names: Mapping[str, Any]) -> tuple[str, str] | None:
    """How a file names a part: (`original`, `open_clip` or `diffusers`, the prefix), or `None` if it lacks the part."""
    prefixes = _PREFIXES.get(part) or _encoder_prefixes(part)
    for prefix in prefixes:
        for mark, layout in _MARKS["text_encoder" if part.startswith("text_encoder") else part].items():
            if prefix + mark in names:
                return layout, prefix
    return None


def refuse_others(names: Iterable[str], file: str) -> None:
    """`UnsupportedError` for a file of a model that is not exported, by its name."""
    listed = list(names)
    if any(n.startswith("conditioner.embedders.1.") for n in listed):
        return
    for beginning, model in REFUSED.items():
        if any(n.startswith(beginning) for n in listed):
            raise UnsupportedError(f"{file} is {model}", expected=known_models())


def scheduler_changes(names: Collection[str], file: str) -> dict[str, Any]:
    """What a single file's marker tensors say of its scheduler, in diffusers' words.

    `v_pred` stands for v-prediction and `ztsnr` for betas rescaled to a zero terminal signal-to-noise ratio, which
    wants trailing timesteps (Lin et al., arXiv:2305.08891). `UnsupportedError` for EDM's formulation.
    """
    for mark, model in _EDM.items():
        if mark in names:
            raise UnsupportedError(
                f"{file} is {model} (it has the tensor {mark!r})",
                expected="a model that predicts noise or v under the base's noise schedule",
            )
    changes: dict[str, Any] = {}
    if "v_pred" in names:
        changes["prediction_type"] = "v_prediction"
    if "ztsnr" in names:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return changes


def translate(
    part: str, layout: str, prefix: str, config: Mapping[str, Any], tensors: Mapping[str, Stored], keys: Iterable[str]
) -> dict[str, Stored]:
    """The tensors of a file under our names: those of `keys` that it has, each still in place.

    Only a text projection is copied. Raises `CorruptError` when a UNet's file holds weights that no key asks for.
    """
    if layout == "diffusers":
        own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        used = {prefix + k for k in keys}
    else:
        names = {k: original_name(part, k.removeprefix("text_model."), config) for k in keys}
        own = {k: _piece(k, tensors[prefix + n]) for k, n in names.items() if n and prefix + n in tensors}
        used = {prefix + n for n in names.values() if n}
    if part == "unet":
        left = sorted(n for n in tensors if n.startswith(prefix) and n not in used)
        if left:
            raise CorruptError(
                f"the UNet's file holds {len(left)} weights that the configuration has no place for: "
                f"{', '.join(left[:5])}{' ...' if len(left) > 5 else ''}",
                expected="weights of the base checkpoint's UNet",
                remedy="Give a base of the same architecture, or a UNet folder with its own config.json.",
            )
    return own


def _piece(key: str, stored: Stored) -> Stored:
    """What a key takes of the original tensor: all of it, a third of it, or its transpose."""
    third = next((i for i, name in enumerate(THIRDS) if f".self_attn.{name}." in key), None)
    if third is not None and stored.shape[0] % 3 == 0:
        size = len(stored.data) // 3
        rows = stored.shape[0] // 3
        return Stored(
            dtype=stored.dtype,
            shape=(rows, *stored.shape[1:]),
            data=stored.data[third * size : (third + 1) * size],
            release=stored.release,
        )
    if key.endswith("text_projection.weight") and len(stored.shape) == 2:
        rows, columns = stored.shape
        bytes_each = stored.data.reshape(rows, columns, -1)
        turned = np.ascontiguousarray(bytes_each.transpose(1, 0, 2)).reshape(-1)
        return Stored(dtype=stored.dtype, shape=(columns, rows), data=turned)
    return stored
