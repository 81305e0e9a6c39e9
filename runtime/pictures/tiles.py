"""Tiles of what is too large for one pass of the autoencoder, blended where they overlap, as diffusers does it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import ArgumentError
from ..arrays import Float32

OVERLAP = 0.25
WHEN = ("auto", True, False)
AUTO_PIXELS = 1536 * 1536
"""`"auto"` tiles pictures of more pixels: one pass of SD's decoder in float32 takes about 7 GB at this size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """Sides of a tile, in latent cells and in pixels: of the size that the autoencoder was trained at."""

    cells: int
    pixels: int

    @classmethod
    def of(cls, config: Mapping[str, Any], factor: int) -> Tiling:
        """diffusers' tile of an autoencoder with this configuration."""
        size = config.get("sample_size", 512)
        pixels = int(size[0] if isinstance(size, (list, tuple)) else size)
        return cls(cells=max(1, pixels // factor), pixels=pixels)

    def wanted(self, when: str | bool, height: int, width: int) -> bool:
        """Whether a latent of this size is to be tiled."""
        if when is False or max(height, width) <= self.cells:
            return False
        return when is True or height * width * (self.pixels // self.cells) ** 2 > AUTO_PIXELS


def check_when(name: str, when: object) -> str | bool:
    """`"auto"`, `True` or `False`."""
    if not isinstance(when, (str, bool)) or when not in WHEN:
        raise ArgumentError(f"{name} is {when!r}", expected="'auto', True or False")
    return when


def run_tiled(whole: Float32, run: Callable[[Float32], Float32], *, tile: int, tile_out: int, out: Float32) -> Float32:
    """Run tiles of `whole` [..., H, W] through `run` and put them together in `out` [..., H', W'].

    tile, made: a tile's side before and after. Neighbours overlap by a quarter, over which the earlier fades into the
    later linearly.
    """
    step, overlap = int(tile * (1 - OVERLAP)), int(tile_out * OVERLAP)
    kept = tile_out - overlap
    above: list[Float32] = []
    for i, top in enumerate(range(0, whole.shape[-2], step)):
        row: list[Float32] = []
        for j, left in enumerate(range(0, whole.shape[-1], step)):
            one = run(np.ascontiguousarray(whole[..., top : top + tile, left : left + tile]))
            if i:
                _fade(above[j].swapaxes(-1, -2), one.swapaxes(-1, -2), overlap)
            if j:
                _fade(row[j - 1], one, overlap)
            row.append(one)
            place = out[..., i * kept : (i + 1) * kept, j * kept : (j + 1) * kept]
            place[...] = one[..., : place.shape[-2], : place.shape[-1]]
        above = row
    return out


def _fade(before: Float32, after: Float32, overlap: int) -> None:
    """Blend the beginning of `after`'s last axis from the end of `before`'s, in place."""
    extent = min(before.shape[-1], after.shape[-1], overlap)
    if extent:
        share = (np.arange(extent) / extent).astype(np.float32)
        after[..., :extent] = before[..., -extent:] * (1 - share) + after[..., :extent] * share
