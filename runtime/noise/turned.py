"""Noise on the way from one seed's to another's: A1111's variation seeds."""

from __future__ import annotations

import numpy as np

from ..arrays import Float32

PARALLEL = 0.9995
"""The mean cosine from which on two noises are mixed linearly."""
LEAST_SINE = 1e-6
"""Below it two columns lie on one line, and are mixed linearly too."""


def turned(noise: Float32, other: Float32, share: float) -> Float32:
    """Unit noise float32 [B, C, h, w] turned towards another's by a share of the angle between them.

    Spherical interpolation of each column of each channel, as the web UI's `slerp` of [C, h, w] along its second axis:
    sin((1 - s) a) / sin(a) noise + sin(s a) / sin(a) other.
    """
    return np.stack([_turned(n, o, share) for n, o in zip(noise, other, strict=True)])


def _turned(noise: Float32, other: Float32, share: float) -> Float32:
    unit, other_unit = (n / np.linalg.norm(n, axis=1, keepdims=True) for n in (noise, other))
    cosine = np.sum(unit * other_unit, axis=1, keepdims=True)
    mixed: Float32 = noise * np.float32(1.0 - share) + other * np.float32(share)
    if cosine.mean() > PARALLEL:
        return mixed
    angle = np.arccos(np.clip(cosine, -1.0, 1.0))
    sine = np.sin(angle)
    with np.errstate(divide="ignore", invalid="ignore"):
        turn = (np.sin((1.0 - share) * angle) * noise + np.sin(share * angle) * other) / sine
    return np.where(sine < LEAST_SINE, mixed, turn).astype(np.float32)
