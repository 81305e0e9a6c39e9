"""How near a schedule comes to the teacher on pairs it was not found on, with intervals by bootstrap over pairs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..runtime.arrays import UInt8
from .network import Floats

RESAMPLES = 2000
SHARE = 0.95


def interval(values: Floats, seed: int = 0) -> dict[str, float]:
    """The mean of values by pair, and the bootstrap interval that holds 95% of resampled means."""
    means = _resampled(values[None, :], seed)[:, 0]
    low, high = np.quantile(means, [(1 - SHARE) / 2, (1 + SHARE) / 2])
    return {"mean": short(values.mean()), "low": short(low), "high": short(high)}


def ratio_interval(values: Floats, others: Floats, seed: int = 0) -> dict[str, float]:
    """The ratio of two means over the same pairs, and its interval with both resampled together."""
    means = _resampled(np.stack([values, others]), seed)
    low, high = np.quantile(means[:, 0] / means[:, 1], [(1 - SHARE) / 2, (1 + SHARE) / 2])
    return {"mean": short(values.mean() / others.mean()), "low": short(low), "high": short(high)}


def _resampled(values: Floats, seed: int) -> Floats:
    """Means of resampled pairs, float64 [RESAMPLES, M] of values [M, N]."""
    count = values.shape[1]
    drawn = np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))
    return np.asarray(values[:, drawn].mean(axis=2).T)


def compare(distances: Mapping[str, Floats], found: str) -> dict[str, Any]:
    """Figures of one number of steps: each schedule's distance, which known one is best, and how the found one does.

    distances: by name, the root mean square distance to the teacher's latent by pair, float64 [N].
    """
    known = {name: d for name, d in distances.items() if name != found}
    best = min(known, key=lambda name: float(known[name].mean()))
    return {
        "pairs": len(distances[found]),
        "latent_rmse": interval(distances[found]),
        "best_known": best,
        "ratio": ratio_interval(distances[found], known[best]),
        "wins": short(np.mean(distances[found] < known[best])),
        "known": {name: interval(d) for name, d in sorted(known.items(), key=lambda item: float(item[1].mean()))},
    }


def picture_figures(pictures: UInt8, teachers: UInt8) -> dict[str, dict[str, float]]:
    """PSNR in dB and SSIM of pictures uint8 [N, H, W, 3] against the teacher's."""
    return {
        "psnr": interval(np.array([psnr(a, b) for a, b in zip(pictures, teachers, strict=True)])),
        "ssim": interval(np.array([ssim(a, b) for a, b in zip(pictures, teachers, strict=True)])),
    }


def psnr(picture: UInt8, other: UInt8) -> float:
    """10 log10(255^2 / mean square error); at most 99, which equal pictures have."""
    error = float(np.mean((picture.astype(np.float64) - other.astype(np.float64)) ** 2))
    return 99.0 if error == 0.0 else min(99.0, float(10 * np.log10(255.0**2 / error)))


def ssim(picture: UInt8, other: UInt8) -> float:
    """Structural similarity of grey pictures with a Gaussian window of 11 and sigma 1.5 (Wang et al. 2004, eq. 13)."""
    x, y = (np.asarray(p, np.float64) @ np.array([0.299, 0.587, 0.114]) for p in (picture, other))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mx, my = _blurred(x), _blurred(y)
    vx, vy, cov = _blurred(x * x) - mx * mx, _blurred(y * y) - my * my, _blurred(x * y) - mx * my
    index = ((2 * mx * my + c1) * (2 * cov + c2)) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return float(np.mean(index))


def _blurred(grey: npt.NDArray[np.float64]) -> Floats:
    """The mean under the window, where it lies wholly in the picture."""
    window = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window /= window.sum()
    for axis in (0, 1):
        grey = np.apply_along_axis(lambda line: np.convolve(line, window, mode="valid"), axis, grey)
    return grey


def equal_error_steps(error: float, curve: Sequence[tuple[int, float]]) -> float | None:
    """How many steps a schedule needs for this error, by its curve of (steps, error); `None` where it never gets there.

    Between steps ln(error) is linear in ln(steps).
    """
    points = sorted(curve)
    if error >= points[0][1]:
        return float(points[0][0])
    for (n, e), (m, f) in itertools.pairwise(points):
        if f <= error < e:
            share = np.log(e / error) / np.log(e / f)
            return float(np.exp(np.log(n) + share * (np.log(m) - np.log(n))))
    return None


def short(value: Any) -> float:
    """Five digits, which figures have."""
    return float(f"{float(value):.5g}")
