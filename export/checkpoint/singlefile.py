"""Original checkpoints: one safetensors file in the layout of CompVis's and Stability's own code.

The layout names blocks by their place in a list (`input_blocks.4.1`), where diffusers names them by level and kind
(`down_blocks.1.attentions.0`). Each of our names has exactly one original name, which follows from the component's
configuration; so a file is read by asking for the names that a graph needs. Two things are more than a name:
OpenCLIP keeps query, key and value in one matrix, and its text projection transposed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from ...errors import CorruptError, UnsupportedError
from ...families import all_families, known_models
from .weights import Stored

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

_UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
_VAE_MIDDLE = {"resnets.0": "block_1", "attentions.0": "attn_1", "resnets.1": "block_2"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_TEXT = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
}
_TEXT_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_THIRDS = ("q_proj", "k_proj", "v_proj")
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_VAE_BLOCK = re.compile(r"(?:down|up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.+)")
_TEXT_BLOCK = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


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


def original_name(part: str, key: str, config: Mapping[str, Any]) -> str | None:
    """The original layout's name of a weight or module, without prefix; `None` where it has none.

    For OpenCLIP, query, key and value give the name of the matrix that holds all three.
    """
    if part == "unet":
        return _unet_name(key, config)
    if part == "vae":
        return _vae_name(key, config)
    return _text_name(key)


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
    third = next((i for i, name in enumerate(_THIRDS) if f".self_attn.{name}." in key), None)
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


def _swap(name: str, table: Mapping[str, str]) -> str | None:
    """Exchange the beginning of a dotted name by a table; `None` if it is not in it."""
    for ours, theirs in table.items():
        if name == ours or name.startswith(f"{ours}."):
            return theirs + name[len(ours) :]
    return None


def _layers(config: Mapping[str, Any]) -> list[int]:
    each = config["layers_per_block"]
    levels = len(config["block_out_channels"])
    return [each] * levels if isinstance(each, int) else list(each)


def _unet_name(key: str, config: Mapping[str, Any]) -> str | None:
    block = _BLOCK.fullmatch(key)
    if not block:
        if key.startswith("mid_block."):
            return _inner("middle_block.", _swap(key.removeprefix("mid_block."), _MIDDLE), key)
        return _swap(key, _UNET)
    side, kind, rest = block[1], block[3], block[5]
    level, at = int(block[2]), int(block[4])
    layers = _layers(config)
    if side == "down":
        first = 1 + sum(n + 1 for n in layers[:level])
        if kind == "downsamplers":
            return f"input_blocks.{first + layers[level]}.0.op{rest.removeprefix('conv')}"
        place = f"input_blocks.{first + at}."
    else:
        counts = [n + 1 for n in reversed(layers)]
        first = sum(counts[:level])
        if kind == "upsamplers":
            attends = "CrossAttn" in config["up_block_types"][level]
            return f"output_blocks.{first + counts[level] - 1}.{2 if attends else 1}.{rest}"
        place = f"output_blocks.{first + at}."
    return _inner(place, f"{0 if kind == 'resnets' else 1}.{rest}", key)


def _inner(place: str, rest: str | None, key: str) -> str | None:
    """A block's place and what is inside it: attentions keep their inner names, residual blocks do not."""
    if rest is None or ".resnets." not in key:
        return None if rest is None else place + rest
    number, _, name = rest.partition(".")
    inner = _swap(name, _RESNET)
    return None if inner is None else f"{place}{number}.{inner}"


def _vae_name(key: str, config: Mapping[str, Any]) -> str | None:
    half, _, rest = key.partition(".")
    if half not in ("encoder", "decoder"):
        return key
    if rest.startswith("mid_block."):
        name = _swap(rest.removeprefix("mid_block."), _VAE_MIDDLE)
        if name is None or not name.startswith("attn_1."):
            return None if name is None else f"{half}.mid.{name}"
        inner = _swap(name.removeprefix("attn_1."), _VAE_ATTENTION)
        return None if inner is None else f"{half}.mid.attn_1.{inner}"
    block = _VAE_BLOCK.fullmatch(rest)
    if not block:
        return f"{half}.{rest.replace('conv_norm_out', 'norm_out')}"
    level = int(block[1]) if half == "encoder" else len(config["block_out_channels"]) - 1 - int(block[1])
    place = f"{half}.{'down' if half == 'encoder' else 'up'}.{level}."
    if block[2] == "resnets":
        return f"{place}block.{block[3]}.{block[4].replace('conv_shortcut', 'nin_shortcut')}"
    return f"{place}{'downsample' if half == 'encoder' else 'upsample'}.{block[4]}"


def _text_name(key: str) -> str | None:
    block = _TEXT_BLOCK.fullmatch(key)
    if not block:
        return _swap(key, _TEXT)
    number, name, what = block[1], block[2], block[3]
    place = f"transformer.resblocks.{number}."
    if name.removeprefix("self_attn.") in _THIRDS:
        return f"{place}attn.in_proj_{what}"
    inner = _swap(name, _TEXT_LAYER)
    return None if inner is None else f"{place}{inner}.{what}"
