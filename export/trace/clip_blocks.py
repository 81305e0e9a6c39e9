"""The blocks of clips' networks in a form that traces in a moment, and that computes no more than comes out.

diffusers' own ask how many rows there are by dividing products of sizes, and blend pictures in with clips. Where sizes
are symbols such questions take most of a trace. The indicator [R, F] that they hand on says both sizes.

A clip's UNet attends to a single token, its picture. A softmax over one score is 1, so the attention is that token's
value whatever the queries are: neither queries nor keys are computed, and their weights are left out of the graph.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import UNetSpatioTemporalConditionModel
from diffusers.models.resnet import SpatioTemporalResBlock
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from torch import nn


def plain_clip_blocks(module: nn.Module) -> None:
    """Give a clip's UNet or decoder these forms of its blocks, the same functions."""
    for part in module.modules():
        if isinstance(part, UNetSpatioTemporalConditionModel):
            part.forward = partial(_unet, part)
        elif isinstance(part, SpatioTemporalResBlock):
            part.forward = partial(_residual_block, part)
        elif isinstance(part, TransformerSpatioTemporalModel):
            part.forward = partial(_transformer, part)
            for block in (*part.transformer_blocks, *part.temporal_transformer_blocks):
                block.attn2.to_q = block.attn2.to_k = nn.Identity()
                block.attn2.forward = partial(_only_token, block.attn2)


def _unet(
    model: Any, sample: torch.Tensor, timestep: torch.Tensor, *, return_dict: bool = False, **told: torch.Tensor
) -> tuple[torch.Tensor]:
    """diffusers' forward, in which torch's `repeat_interleave` stands that exporters translate wrongly."""
    rows, frames = sample.shape[:2]
    embedding = model.time_embedding(model.time_proj(timestep).to(sample.dtype))
    numbers = model.add_time_proj(told["added_time_ids"].flatten()).reshape(rows, -1)
    embedding = embedding + model.add_embedding(numbers.to(embedding.dtype))
    videos = torch.zeros(rows, frames, dtype=sample.dtype, device=sample.device)
    shared = {"temb": _by_frame(embedding, frames), "image_only_indicator": videos}
    seen = {**shared, "encoder_hidden_states": _by_frame(told["encoder_hidden_states"], frames)}

    def given(block: Any) -> dict[str, torch.Tensor]:
        return seen if getattr(block, "has_cross_attention", False) else shared

    states = model.conv_in(sample.flatten(0, 1))
    skips = [states]
    for block in model.down_blocks:
        states, made = block(hidden_states=states, **given(block))
        skips += made
    states = model.mid_block(hidden_states=states, **seen)
    for i, block in enumerate(model.up_blocks):
        kept, skips = skips[-len(block.resnets) :], skips[: -len(block.resnets)]
        size = skips[-1].shape[2:] if i + 1 < len(model.up_blocks) else None
        more = {"res_hidden_states_tuple": tuple(kept), "upsample_size": size}
        states = block(hidden_states=states, **more, **given(block))
    out = model.conv_out(model.conv_act(model.conv_norm_out(states)))
    return (out.unflatten(0, (rows, frames)),)


def _by_frame(rows: torch.Tensor, frames: int) -> torch.Tensor:
    """[R, ...] as [R F, ...], each row for every frame."""
    return rows[:, None].expand(-1, frames, *[-1] * (rows.ndim - 1)).flatten(0, 1)


def _residual_block(
    block: Any, hidden_states: torch.Tensor, temb: torch.Tensor | None = None, image_only_indicator: Any = None
) -> torch.Tensor:
    """Pictures [R F, C, H, W] through the block of each, then through that of all frames."""
    sizes = image_only_indicator.shape
    spatial = block.spatial_res_block(hidden_states, temb).unflatten(0, sizes).transpose(1, 2)
    temporal = block.temporal_res_block(spatial, None if temb is None else temb.unflatten(0, sizes))
    return _blended(block.time_mixer, spatial, temporal).transpose(1, 2).flatten(0, 1)


def _transformer(
    model: Any, hidden_states: torch.Tensor, encoder_hidden_states: Any, image_only_indicator: Any, **_: Any
) -> tuple[torch.Tensor]:
    """Pictures [R F, C, H, W] through attention within each, and between the frames of every place."""
    sizes, (_, _, height, width) = image_only_indicator.shape, hidden_states.shape
    states = model.proj_in(model.norm(hidden_states).permute(0, 2, 3, 1).flatten(1, 2))  # [R F, H W, C]
    numbers = model.time_proj(torch.arange(sizes[1], device=states.device))
    places = model.time_pos_embed(numbers.to(states.dtype))  # [F, C]
    picture = encoder_hidden_states.unflatten(0, sizes)[:, 0]
    for spatial, temporal in zip(model.transformer_blocks, model.temporal_transformer_blocks, strict=True):
        states = spatial(states, encoder_hidden_states=encoder_hidden_states)
        mixed = _temporal_block(temporal, states.unflatten(0, sizes).transpose(1, 2) + places, picture)
        states = _blended(model.time_mixer, states, mixed.transpose(1, 2).flatten(0, 1))
    out = model.proj_out(states).unflatten(1, (height, width)).permute(0, 3, 1, 2)
    return (out + hidden_states,)


def _temporal_block(block: Any, states: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
    """States [R, H W, F, C] with those of other frames, and the picture [R, 1, D]."""
    before, states = states, block.ff_in(block.norm_in(states))
    states = states + before if block.is_res else states
    attended = block.attn1(block.norm1(states).flatten(0, 1)).unflatten(0, states.shape[:2])
    states = attended + states
    states = block.attn2(states, picture)[:, None] + states
    out: torch.Tensor = block.ff(block.norm3(states))
    return out + states if block.is_res else out


def _only_token(attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
    """Attention to one token [N, 1, D]: softmax(s) v = v, [N, 1, C] for all queries."""
    value: torch.Tensor = attn.to_out[0](attn.to_v(encoder_hidden_states))
    return value


def _blended(mixer: Any, spatial: torch.Tensor, temporal: torch.Tensor) -> torch.Tensor:
    """s x + (1 - s) y with the share that the mixer learned; decoders count it the other way round.

    s = 1 / (1 + e^-m) in so many words: a Sigmoid in a graph is a part of a SiLU, and counted as one.
    """
    share = (1.0 / (1.0 + torch.exp(-mixer.mix_factor.float()))).to(spatial.dtype)
    share = 1.0 - share if mixer.switch_spatial_to_temporal_mix else share
    return share * spatial + (1.0 - share) * temporal
