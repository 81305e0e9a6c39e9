"""Figures from samples: percentiles, a bootstrap interval for a ratio of medians, a line through step counts, PSNR."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

RESAMPLES = 4000


def percentiles(samples: Sequence[float]) -> dict[str, float]:
    """p50, p90, p99, smallest and number of some milliseconds."""
    values = np.asarray(samples, np.float64)
    p50, p90, p99 = np.percentile(values, (50, 90, 99))
    return {
        "p50": round(float(p50), 4),
        "p90": round(float(p90), 4),
        "p99": round(float(p99), 4),
        "min": round(float(values.min()), 4),
        "n": len(values),
    }


def ratio_of_medians(
    theirs: Sequence[float], ours: Sequence[float], *, paired: bool = True, seed: int = 0
) -> dict[str, float]:
    """How many times longer theirs take, with its 95% bootstrap interval.

    Samples of one round were taken next to each other, so whole rounds are resampled: what the machine was doing then
    weighs on both. Without `paired` each side is resampled by itself.
    """
    a, b = np.asarray(theirs, np.float64), np.asarray(ours, np.float64)
    rounds = min(len(a), len(b))
    rng = np.random.default_rng(seed)
    if paired:
        a, b = a[:rounds], b[:rounds]
        first = second = rng.integers(0, rounds, (RESAMPLES, rounds))
    else:
        first, second = (rng.integers(0, len(side), (RESAMPLES, len(side))) for side in (a, b))
    drawn = np.median(a[first], axis=1) / np.median(b[second], axis=1)
    low, high = np.percentile(drawn, (2.5, 97.5))
    ratio = float(np.median(a) / np.median(b))
    return {"ratio": round(ratio, 4), "low": round(float(low), 4), "high": round(float(high), 4), "rounds": rounds}


def fixed_and_per_step(medians: Mapping[int, float]) -> dict[str, float] | None:
    """Least squares of total = fixed + steps * per_step, in milliseconds; `None` with fewer than two step counts."""
    if len(medians) < 2:
        return None
    steps = np.array(sorted(medians), np.float64)
    totals = np.array([medians[int(s)] for s in steps])
    slope, fixed = np.polyfit(steps, totals, 1)
    return {"fixed_ms": round(float(fixed), 4), "per_step_ms": round(float(slope), 4)}


def stage_percentiles(stages: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Percentiles by stage; evaluations are pooled, one sample each."""
    names = sorted({n for s in stages for n in s})
    pooled: dict[str, list[float]] = {}
    for name in names:
        for stage in stages:
            value = stage.get(name, 0.0)
            pooled.setdefault(name, []).extend(value if isinstance(value, list) else [value])
    return {("each evaluation" if n == "evaluations" else n): percentiles(v) for n, v in pooled.items() if v and any(v)}


def psnr(output: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float | None:
    """Peak signal-to-noise ratio of uint8 images in dB; `None` when they are equal."""
    error = float(np.mean((output.astype(np.float64) - expected.astype(np.float64)) ** 2))
    return None if error == 0.0 else round(10 * math.log10(255.0**2 / error), 2)


def relative_error(output: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float | None:
    """||output - expected|| / ||expected||, in float64; `None` where the output is not finite."""
    a, b = output.astype(np.float64), expected.astype(np.float64)
    error = float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-30))
    return error if math.isfinite(error) else None
