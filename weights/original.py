"""What CompVis's and Stability's own code calls a weight, from what diffusers and transformers call it.

The layout names blocks by their place in a list (`input_blocks.4.1`), where diffusers names them by level and kind
(`down_blocks.1.attentions.0`). Each of our names has exactly one original name, which follows from the component's
configuration. OpenCLIP keeps query, key and value in one matrix.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

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
THIRDS = ("q_proj", "k_proj", "v_proj")
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_VAE_BLOCK = re.compile(r"(?:down|up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.+)")
_TEXT_BLOCK = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


def original_name(part: str, key: str, config: Mapping[str, Any]) -> str | None:
    """The original layout's name of a weight or module, without prefix; `None` where it has none.

    For OpenCLIP, query, key and value give the name of the matrix that holds all three.
    """
    if part == "unet":
        return _unet_name(key, config)
    if part == "vae":
        return _vae_name(key, config)
    return _text_name(key)


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
    if name.removeprefix("self_attn.") in THIRDS:
        return f"{place}attn.in_proj_{what}"
    inner = _swap(name, _TEXT_LAYER)
    return None if inner is None else f"{place}{inner}.{what}"
