"""Grids and smoothing factors from what was seen: where the ends of a grid lie, and how channels are evened out.

The factor of channel c is a_c^alpha / w_c^(1 - alpha), with a_c the largest magnitude of what is read and w_c that of
the weights which read it (Xiao et al. 2023, arXiv:2211.10438, equation 4). alpha is chosen for each tensor by the error
that rounding makes in the sums, where a step of d spreads d^2 / 12:

    E = (d_x^2 / 12) ||W f||_F^2 + sum over o of (d_o^2 / 12) sum over c of E[x_c^2] / f_c^2
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from ..engines.graph.quantized import LINEAR, Float32, IntegerGrid, IntegerGrids, IntegerLayer
from .probe import Seen

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7)
ENDS = ("widest", "usual")
"""The ends of a grid: of all that was seen, or the mean of the evaluations' own ends, which cuts rare ones off."""
LEAST_GAIN = 0.1
"""Of the error, for factors to be worth having."""
TINY = 1e-5


def make_grids(
    seen: Seen,
    layers: Sequence[IntegerLayer],
    weights: Callable[[str], npt.NDArray[np.float32]],
    ends: str,
    *,
    smooth: bool = True,
) -> IntegerGrids:
    """Grids of all tensors that these layers read or give, and factors where they gain.

    smooth: whether there are factors; steps of floats grow with what they hold, so that outliers cost others little.
    """
    take_low, take_high = (np.min, np.max) if ends == "widest" else (np.mean, np.mean)
    low = {n: np.asarray(take_low(v, axis=0)) for n, v in seen.low.items()}
    high = {n: np.asarray(take_high(v, axis=0)) for n, v in seen.high.items()}
    smoothing: dict[str, Float32] = {}
    readers: dict[str, list[IntegerLayer]] = {}
    for layer in layers if smooth else ():
        if layer.kind == LINEAR and low[layer.input].ndim == 1:
            readers.setdefault(layer.input, []).append(layer)
    for name, reading in readers.items():
        matrix = np.concatenate([np.asarray(weights(layer.weight), np.float32) for layer in reading])
        factors = _factors(low[name], high[name], seen.squares[name], matrix)
        if factors is not None:
            smoothing[name] = factors
    tensors = {n: _grid(low[n], high[n], smoothing.get(n)) for n in low}
    return IntegerGrids(tensors=tensors, smoothing=smoothing)


def _grid(low: Float32, high: Float32, factors: Float32 | None) -> IntegerGrid:
    if factors is not None:
        low, high = low / factors, high / factors
    return IntegerGrid.of(float(low.min()), float(high.max()))


def _factors(low: Float32, high: Float32, squares: Float32, matrix: Float32) -> Float32 | None:
    """The factors of the best alpha, float32 [C]; `None` where none gains."""
    read, weigh = np.maximum(np.maximum(-low, high), TINY), np.maximum(np.abs(matrix).max(axis=0), TINY)
    least, best = (1.0 - LEAST_GAIN) * _error(low, high, squares, matrix, np.ones_like(read)), None
    for alpha in ALPHAS:
        factors = np.asarray(read**alpha / weigh ** (1.0 - alpha), np.float32)
        factors /= np.exp(np.mean(np.log(factors)))
        error = _error(low, high, squares, matrix, factors)
        if error < least:
            least, best = error, factors
    return best


def _error(low: Float32, high: Float32, squares: Float32, matrix: Float32, factors: Float32) -> float:
    """E above, up to the twelfth."""
    step = (max(float((high / factors).max()), 0.0) - min(float((low / factors).min()), 0.0)) / 255.0
    scaled = matrix * factors
    steps = np.abs(scaled).max(axis=1) / 127.0
    return step**2 * float(np.sum(scaled**2)) + float(np.sum(steps**2)) * float(np.sum(squares / factors**2))
