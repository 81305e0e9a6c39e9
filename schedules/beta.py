"""The quantile of the beta distribution, which the beta schedule needs and NumPy does not have."""

from __future__ import annotations

import math


def beta_quantile(p: float, a: float, b: float) -> float:
    """The x in [0, 1] whose regularised incomplete beta function I_x(a, b) is p.

    Bisection on the half where x (rather than 1 - x) is small, polished by Newton's method; relative error about
    1e-13 for a, b of order one.
    """
    if p <= 0.0:
        return 0.0
    if p >= 1.0:
        return 1.0
    if p > _regularised(0.5, a, b):
        return 1.0 - _lower_quantile(1.0 - p, b, a)
    return _lower_quantile(p, a, b)


def _lower_quantile(p: float, a: float, b: float) -> float:
    """The quantile where it is at most 1/2."""
    low, high = 0.0, 0.5
    log_norm = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    x = min(0.5, math.pow(p * a * math.exp(-log_norm), 1 / a))
    if x == 0.0:
        return 0.0
    for _ in range(200):
        error = _regularised(x, a, b) - p
        low, high = (low, x) if error > 0 else (x, high)
        density = math.exp(log_norm + (a - 1) * math.log(x) + (b - 1) * math.log1p(-x))
        following = x - error / density
        if not low < following < high:
            following = (low + high) / 2
        if abs(following - x) <= 1e-16 * x:
            return following
        x = following
    return x


def _regularised(x: float, a: float, b: float) -> float:
    """I_x(a, b) for x <= 1/2, by the power series x^a/(a B) (1 + sum_n (1-b)...(n-b)/n! a/(a+n) x^n)."""
    if x <= 0.0:
        return 0.0
    term = total = 1.0
    for n in range(1, 2000):
        term *= (n - b) / n * x
        total += term * a / (a + n)
        if abs(term) < 1e-18 * abs(total):
            break
    log_norm = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    return math.exp(log_norm + a * math.log(x)) / a * total
