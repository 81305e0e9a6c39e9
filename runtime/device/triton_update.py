"""A tick's own work in three kernels of Triton: rows gathered, guidance and update, positions moved on.

The same arithmetic in torch (`torch_update.py`, `torch_tables.py`) is 48 kernels, in a CUDA graph 0.1 ms a step. The
kernels are torch operators, so that whatever records operators records them. They are run by Triton's interpreter in
the tests, against the NumPy kernels, and not on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024
"""Elements of a latent that one program works on."""


@triton.jit
def _gather_kernel(
    slot_of_row, position, scalars, latent, sample, timestep, size, columns, floats, integers,
    SCALE: tl.constexpr, TIME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, at = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slot_of_row + row)
    own = scalars + slot * floats + tl.load(position + slot * integers) * columns
    x = tl.load(latent + slot * floats + at, mask=at < size, other=0.0)
    # in_i = input_scale x
    tl.store(sample + row * size + at, tl.load(own + SCALE) * x, mask=at < size)
    if tl.program_id(1) == 0:
        tl.store(timestep + row, tl.load(own + TIME))


@triton.jit
def _advance_kernel(
    out, rows_of, weights, slots, position, scalars, b, write, draw_at, latent, history, draws, held,
    mask, kept_latent, kept_noise, x0, variance, bounds,
    size, cells, columns, floats, integers, work, drawn, kept_floats,
    K: tl.constexpr, H_X: tl.constexpr, H_OUT: tl.constexpr, A: tl.constexpr, C: tl.constexpr, C_PREV: tl.constexpr,
    X0_X: tl.constexpr, X0_OUT: tl.constexpr, HOLDS: tl.constexpr, LATENT: tl.constexpr, NOISE: tl.constexpr,
    LIMIT: tl.constexpr, CLIP_H: tl.constexpr, CLIP_X: tl.constexpr, SPREAD: tl.constexpr,
    PREVIEWS: tl.constexpr, BLENDS: tl.constexpr, CLIPS: tl.constexpr, THRESHOLDS: tl.constexpr,
    SPREADS: tl.constexpr, FRAMES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i, at = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    slot = tl.load(slots + i)
    step = tl.load(position + slot * integers)
    own = scalars + slot * floats + step * columns
    negative = tl.load(out + tl.load(rows_of + 2 * i) * size + at, mask=inside, other=0.0).to(tl.float32)
    positive = tl.load(out + tl.load(rows_of + 2 * i + 1) * size + at, mask=inside, other=0.0).to(tl.float32)
    # u + g (c - u) = (1 - g) u + g c
    if FRAMES == 1:
        output = tl.load(weights + 2 * i) * negative + tl.load(weights + 2 * i + 1) * positive
    else:  # by frame
        own_weights = weights + 2 * i * FRAMES + at // (size // FRAMES)
        output = tl.load(own_weights, mask=inside, other=0.0) * negative
        output += tl.load(own_weights + FRAMES, mask=inside, other=0.0) * positive
    x = tl.load(latent + slot * floats + at, mask=inside, other=0.0)
    previous = tl.load(held + slot * work + at, mask=inside, other=0.0)
    draw = tl.load(draw_at + slot * integers + step)
    noise = tl.load(draws + slot * drawn + draw * size + at, mask=inside, other=0.0)
    if SPREADS:
        log = tl.load(own + SPREAD)  # n exp(log v); of slots whose noise is not spread, v may be anything
        said = tl.load(variance + tl.load(rows_of + 2 * i + 1) * size + at, mask=inside, other=0.0).to(tl.float32)
        noise = noise * tl.exp(tl.where(log != 0.0, log * said, 0.0))
    # H[write] = h_x x + h_out out
    kept = tl.load(own + H_X) * x + tl.load(own + H_OUT) * output
    # x0 = x0_x x + x0_out out
    implied = tl.load(own + X0_X) * x + tl.load(own + X0_OUT) * output
    limit = tl.load(own + LIMIT)
    bound, divisor = limit, 1.0
    if THRESHOLDS:
        bound, divisor = tl.load(bounds + 2 * i), tl.load(bounds + 2 * i + 1)
    clipped = tl.where(limit > 0.0, tl.minimum(tl.maximum(implied, -bound), bound) / divisor, implied)
    if CLIPS:
        kept += tl.load(own + CLIP_H) * (clipped - implied)  # + h d
    target = tl.load(write + slot * integers + step)
    # x' = a x + sum_k b[k] H[k] + c n_i + c_prev n_{i-1}
    new = tl.load(own + A) * x + tl.load(own + C) * noise + tl.load(own + C_PREV) * previous
    for k in tl.static_range(K):
        factor = tl.load(b + slot * floats + step * K + k)
        if factor != 0.0:  # what a factor of zero stands before may be anything
            if target == k:
                new += factor * kept
            else:
                new += factor * tl.load(history + slot * work + k * size + at, mask=inside, other=0.0)
    tl.store(history + slot * work + target * size + at, kept, mask=inside)
    if PREVIEWS:
        tl.store(x0 + i * size + at, clipped, mask=inside)
    if CLIPS:
        new += tl.load(own + CLIP_X) * (clipped - implied)  # + x d
    if BLENDS:
        # m x' + f_z (1 - m) z + f_n (1 - m) n
        new = tl.load(mask + slot * kept_floats + at % cells, mask=inside, other=0.0) * new
        new += tl.load(own + LATENT) * tl.load(kept_latent + slot * kept_floats + at, mask=inside, other=0.0)
        new += tl.load(own + NOISE) * tl.load(kept_noise + slot * kept_floats + at, mask=inside, other=0.0)
    tl.store(latent + slot * floats + at, new, mask=inside)
    tl.store(held + slot * work + at, tl.where(tl.load(own + HOLDS) != 0.0, noise, previous), mask=inside)


@triton.jit
def _move_kernel(slots, position, count, length, integers, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    slot = tl.load(slots + at, mask=at < count, other=0)
    moved = tl.load(position + slot * integers, mask=at < count, other=0) + 1
    tl.store(position + slot * integers, tl.where(moved < length, moved, length - 1), mask=at < count)


@torch.library.custom_op("fewstep::gather", mutates_args=("sample", "timestep"))
def gather(
    slot_of_row: torch.Tensor,
    position: torch.Tensor,
    scalars: torch.Tensor,
    latent: torch.Tensor,
    sample: torch.Tensor,
    timestep: torch.Tensor,
    scale_column: int,
    time_column: int,
) -> None:
    """Write each row's network input into `sample` [R, *shape], of any float type, and its `timestep` [R].

    slot_of_row: int64 [R]. position: int64 [S]. scalars: float32 [S, L, N]. latent: float32 [S, *shape]. Those by slot
    are fields of one record, and so equally far from one slot to the next.
    """
    size = latent[0].numel()
    _gather_kernel[len(slot_of_row), triton.cdiv(size, BLOCK)](
        slot_of_row, position, scalars, latent, sample, timestep,
        size, scalars.shape[2], latent.stride(0), position.stride(0),
        SCALE=scale_column, TIME=time_column, BLOCK=BLOCK,
    )  # fmt: skip


@torch.library.custom_op("fewstep::advance", mutates_args=("latent", "history", "held", "x0", "position"))
def advance(
    out: torch.Tensor,
    rows_of: torch.Tensor,
    weights: torch.Tensor,
    slots: torch.Tensor,
    position: torch.Tensor,
    scalars: torch.Tensor,
    b: torch.Tensor,
    write: torch.Tensor,
    draw_at: torch.Tensor,
    latent: torch.Tensor,
    history: torch.Tensor,
    draws: torch.Tensor,
    held: torch.Tensor,
    mask: torch.Tensor,
    kept_latent: torch.Tensor,
    kept_noise: torch.Tensor,
    x0: torch.Tensor,
    variance: torch.Tensor,
    bounds: torch.Tensor,
    columns: list[int],
    previews: bool,
    blends: bool,
    clips: bool,
    thresholds: bool,
    spreads: bool,
) -> None:
    """Guidance over the network's rows `out` [R, *shape], the update of each slot, and its position moved on.

    columns: of `scalars`, those of h_x, h_out, a, c, c_prev, x0_x, x0_out, holds, kept_latent, kept_noise, limit,
    clip_h, clip_x, spread. variance: [R, *shape], read where noise is spread. bounds: float32 [A, 2], read where images
    have bounds of their own: how far x0 may reach, and what is then divided by. The other arrays are as
    `TorchSlotState` and `Batch` have them.
    """
    size, count = latent[0].numel(), len(slots)
    h_x, h_out, a, c, c_prev, x0_x, x0_out, holds, of_latent, of_noise, limit, clip_h, clip_x, spread = columns
    _advance_kernel[count, triton.cdiv(size, BLOCK)](
        out, rows_of, weights, slots, position, scalars, b, write, draw_at, latent, history, draws, held,
        mask, kept_latent, kept_noise, x0, variance, bounds, size, mask[0].numel(), scalars.shape[2],
        latent.stride(0), position.stride(0), held.stride(0), draws.stride(0), mask.stride(0),
        K=b.shape[2], H_X=h_x, H_OUT=h_out, A=a, C=c, C_PREV=c_prev, X0_X=x0_x, X0_OUT=x0_out, HOLDS=holds,
        LATENT=of_latent, NOISE=of_noise, LIMIT=limit, CLIP_H=clip_h, CLIP_X=clip_x,
        SPREAD=spread, PREVIEWS=previews, BLENDS=blends, CLIPS=clips, THRESHOLDS=thresholds, SPREADS=spreads,
        FRAMES=weights[0, 0].numel(), BLOCK=BLOCK,
    )  # fmt: skip
    _move_kernel[1,](slots, position, count, scalars.shape[1], position.stride(0), BLOCK=triton.next_power_of_2(count))
