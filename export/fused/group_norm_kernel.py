"""Group normalisation and SiLU over channels-last memory, in three kernels of Triton: moments, factors, application.

torch's own copies a channels-last tensor into planes first (aten/src/ATen/native/cuda/group_norm_kernel.cu), and the
convolution behind it copies it back. Here a tensor is read twice and written once. The operator is run by Triton's
interpreter in the tests, against torch's in float64, and not on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MOST_TILES = 128
"""Parts that a picture's positions are divided into for the moments; one program combines them."""
ELEMENTS = 4096
"""Of a tensor, held by a program at once."""


@triton.jit
def _moments_kernel(
    x, means, squares, positions, channels, rows_per_tile,
    STEPS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    picture, tile = tl.program_id(0), tl.program_id(1)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    begin, own = tile * rows_per_tile, channel < channels
    base = x + picture.to(tl.int64) * positions * channels
    # sums of x - x_0, as those of x itself cancel where a mean is large beside the deviations (Chan et al. 1983)
    first = tl.load(base + begin * channels + channel, mask=own, other=0.0).to(tl.float32)
    total = tl.zeros((CHANNELS,), tl.float32)
    square = tl.zeros((CHANNELS,), tl.float32)
    end = tl.minimum(begin + rows_per_tile, positions)
    for step in range(STEPS):
        row = begin + step * ROWS + tl.arange(0, ROWS)
        inside = (row < end)[:, None] & own[None, :]
        value = tl.load(base + row[:, None] * channels + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        value = tl.where(inside, value - first[None, :], 0.0)
        total += tl.sum(value, axis=0)
        square += tl.sum(value * value, axis=0)
    count = (end - begin).to(tl.float32)
    target = (picture * tl.num_programs(1) + tile) * channels + channel
    tl.store(means + target, first + total / count, mask=own)
    tl.store(squares + target, square - total * total / count, mask=own)


@triton.jit
def _factors_kernel(
    means, squares, weight, bias, scale, shift, positions, channels, rows_per_tile, tiles, per_group, eps,
    TILES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    picture, group = tl.program_id(0), tl.program_id(1)
    tile, within = tl.arange(0, TILES), tl.arange(0, CHANNELS)
    inside = (tile < tiles)[:, None] & (within < per_group)[None, :]
    channel = group * per_group + within
    at = (picture * tiles + tile)[:, None] * channels + channel[None, :]
    count = tl.minimum(rows_per_tile, positions - tile * rows_per_tile).to(tl.float32)[:, None]
    count = tl.where(inside, count, 0.0)
    mean = tl.load(means + at, mask=inside, other=0.0)
    total = tl.sum(tl.sum(count, axis=0), axis=0)
    middle = tl.sum(tl.sum(count * mean, axis=0), axis=0) / total
    # M = sum_t M_t + n_t (mean_t - mean)^2
    apart = tl.load(squares + at, mask=inside, other=0.0) + count * (mean - middle) * (mean - middle)
    deviation = tl.sqrt(tl.sum(tl.sum(apart, axis=0), axis=0) / total + eps)
    own = within < per_group
    # y = w (x - mean) / sqrt(var + eps) + b, as a factor and a term for each channel
    factor = tl.load(weight + channel, mask=own, other=0.0).to(tl.float32) / deviation
    term = tl.load(bias + channel, mask=own, other=0.0).to(tl.float32) - middle * factor
    tl.store(scale + picture * channels + channel, factor, mask=own)
    tl.store(shift + picture * channels + channel, term, mask=own)


@triton.jit
def _apply_kernel(
    x, scale, shift, out, positions, channels,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    picture = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    own = channel < channels
    inside = (row < positions)[:, None] & own[None, :]
    at = picture.to(tl.int64) * positions * channels + row[:, None] * channels + channel[None, :]
    factor = tl.load(scale + picture * channels + channel, mask=own, other=0.0)
    term = tl.load(shift + picture * channels + channel, mask=own, other=0.0)
    y = factor[None, :] * tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + term[None, :]
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    tl.store(out + at, y, mask=inside)


@torch.library.custom_op("fewstep::group_norm", mutates_args=())
def group_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float, silu: bool
) -> torch.Tensor:
    """`torch.nn.functional.group_norm(x, ...)`, then SiLU if asked; in float32 within, of x's dtype and layout.

    x: [N, C, *positions] of any float dtype, channels last in memory; another layout is copied into it first. weight,
    bias: [C]. groups: a divisor of C.
    """
    rows = x.movedim(1, -1).contiguous()
    pictures, channels = rows.shape[0], rows.shape[-1]
    positions = rows[0].numel() // channels
    out = torch.empty_like(rows)
    wide = min(triton.next_power_of_2(channels), 128)
    tall = max(1, ELEMENTS // wide)
    blocks = triton.cdiv(channels, wide)
    per_tile = triton.cdiv(positions, min(MOST_TILES, triton.cdiv(positions, tall)))
    tiles = triton.cdiv(positions, per_tile)
    of_tiles, of_pictures = {"dtype": torch.float32, "device": x.device}, (pictures, channels)
    means, squares = (torch.empty((pictures, tiles, channels), **of_tiles) for _ in range(2))
    scale, shift = (torch.empty(of_pictures, **of_tiles) for _ in range(2))
    _moments_kernel[pictures, tiles, blocks](
        rows, means, squares, positions, channels, per_tile,
        STEPS=triton.cdiv(per_tile, tall), ROWS=tall, CHANNELS=wide,
    )  # fmt: skip
    _factors_kernel[pictures, groups](
        means, squares, weight, bias, scale, shift, positions, channels, per_tile, tiles, channels // groups, eps,
        TILES=triton.next_power_of_2(tiles), CHANNELS=triton.next_power_of_2(channels // groups),
    )  # fmt: skip
    _apply_kernel[pictures, triton.cdiv(positions, tall), blocks](
        rows, scale, shift, out, positions, channels, ROWS=tall, CHANNELS=wide, SILU=silu
    )
    return out.movedim(-1, 1)


@group_norm.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float, silu: bool) -> torch.Tensor:
    return torch.empty_like(x.movedim(1, -1), memory_format=torch.contiguous_format).movedim(-1, 1)
