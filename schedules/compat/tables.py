"""The tables that a diffusers scheduler holds, in its own float32.

`Tables.single = False` makes them in float64 instead, to show that what is left of a difference is float32's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import ArgumentError
from ..levels import Level
from ..noise import ZERO_SNR_FLOOR, beta_fields, cosine_betas

Array = npt.NDArray[np.float64]
Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """alpha_bar as a diffusers scheduler holds it, in float32 (or float64 if not `single`).

    floored: whether zero terminal SNR is kept at alpha_bar 2^-24 (Euler, DPM, UniPC) or exactly at 0.
    """

    config: Mapping[str, Any]
    alpha_bar: Floats
    single: bool

    @classmethod
    def of(cls, config: Mapping[str, Any], *, rescales: bool, floored: bool, single: bool) -> Tables:
        dtype: Any = np.float32 if single else np.float64
        betas = _betas(config, dtype)
        rescale = rescales and bool(config.get("rescale_betas_zero_snr"))
        alpha_bar = _cumprod(dtype(1) - betas)
        if rescale:
            root = np.sqrt(alpha_bar)
            first, last = root[0], root[-1]
            root = (root - last) * (first / (first - last))
            squared = root**2
            alphas = np.concatenate([squared[:1], squared[1:] / squared[:-1]])
            alpha_bar = _cumprod(dtype(1) - (dtype(1) - alphas))
            if floored:
                alpha_bar[-1] = ZERO_SNR_FLOOR
        return cls(config=config, alpha_bar=alpha_bar, single=single)

    @property
    def count(self) -> int:
        return len(self.alpha_bar)

    @property
    def dtype(self) -> Any:
        return np.float32 if self.single else np.float64

    @property
    def sigmas(self) -> Floats:
        one = self.dtype(1)
        result: Floats = np.sqrt((one - self.alpha_bar) / self.alpha_bar)
        return result

    def rounded(self, values: Floats) -> Array:
        """The values as the table's float type holds them, in float64."""
        return np.asarray(np.asarray(values).astype(self.dtype), np.float64)

    def at_timestep(self, t: float) -> Level:
        """The level of an integer timestep, straight from alpha_bar."""
        index = int(t)
        if not 0 <= index < self.count:
            raise ArgumentError(
                f"timestep {index} of {self.count}", remedy="Use fewer steps, or a smaller steps_offset."
            )
        ab = float(self.alpha_bar[index])
        return Level(float(index), math.inf if ab == 0.0 else math.sqrt((1 - ab) / ab))

    def timestep_of(self, sigma: float) -> float:
        """diffusers' `_sigma_to_t`: linear in ln(sigma) between training timesteps, mixed float types and all."""
        logs = np.log(self.sigmas)
        log_sigma = np.log(np.maximum(np.float64(sigma), 1e-10))
        low = int(np.clip(np.count_nonzero(log_sigma - logs >= 0) - 1, 0, self.count - 2))
        w = np.clip((logs[low] - log_sigma) / (logs[low] - logs[low + 1]), 0, 1)
        return float((1 - w) * low + w * (low + 1))

    def at_sigma(self, sigma: float) -> Level:
        sigma = float(self.rounded(np.array(sigma)))
        return Level(self.timestep_of(sigma), sigma)


def linspace_single(start: float, end: float, count: int) -> npt.NDArray[np.float32]:
    """torch.linspace in float32: counted from both ends to the middle, each value rounded once."""
    first, last = np.float32(start), np.float32(end)
    step = float(np.float32((last - first) / np.float32(count - 1)))
    index = np.arange(count)
    up, down = float(first) + step * index, float(last) - step * (count - 1 - index)
    return np.where(index < count // 2, up, down).astype(np.float32)


def _betas(config: Mapping[str, Any], dtype: Any) -> Floats:
    trained, count, start, end, name = beta_fields(config)
    if trained is not None:
        return np.array(trained, dtype)
    if name == "squaredcos_cap_v2":
        return cosine_betas(count).astype(dtype)
    line = linspace_single if dtype is np.float32 else np.linspace
    if name == "linear":
        result: Floats = line(start, end, count)
        return result
    squared: Floats = line(start**0.5, end**0.5, count) ** 2
    return squared


def _cumprod(alphas: Floats) -> Floats:
    """torch.cumprod on the CPU: accumulated in double, each product rounded."""
    result: Floats = np.cumprod(alphas.astype(np.float64)).astype(alphas.dtype)
    return result
