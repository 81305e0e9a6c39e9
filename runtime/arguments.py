"""Range checks of a request's numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..errors import ArgumentError
from ..values import shown

LARGEST_SEED = 2**64 - 1
LARGEST_LEVEL = 1e9
"""Of a timestep or sigma; the highest that any schedule here has is about 4096."""


def check_integer(name: str, value: object, low: int, high: int) -> int:
    """The value as an integer; `ArgumentError` unless it is one from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ArgumentError(f"{name} is {shown(value)}", expected="an integer")
    if not low <= value <= high:
        raise ArgumentError(f"{name} is {shown(value)}", expected=f"an integer from {low} to {high}")
    return int(value)


def check_real(name: str, value: object, low: float, high: float) -> float:
    """The value as a float; `ArgumentError` unless it is a finite number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise ArgumentError(f"{name} is {shown(value)}", expected="a number")
    if not low <= value <= high or not math.isfinite(value):
        raise ArgumentError(f"{name} is {shown(value)}", expected=f"a finite number from {low:g} to {high:g}")
    return float(value)


def check_flag(name: str, value: object) -> None:
    """Raise `ArgumentError` unless the value is `True` or `False`: `"no"` would count as true."""
    if not isinstance(value, (bool, np.bool_)):
        raise ArgumentError(f"{name} is {shown(value)}", expected="True or False")


def check_levels(name: str, levels: Sequence[float] | None, least: int) -> list[float] | None:
    """Explicit timesteps or sigmas as a list of finite numbers."""
    if levels is None:
        return None
    try:
        values = [float(v) for v in levels]
    except (TypeError, ValueError, OverflowError) as error:
        raise ArgumentError(f"{name} is {shown(levels)}", expected="a list of numbers") from error
    if len(values) < least or not all(abs(v) <= LARGEST_LEVEL for v in values):
        raise ArgumentError(
            f"{name} is {shown(values)}", expected=f"at least {least} finite numbers, of {LARGEST_LEVEL:g} at most"
        )
    return values


def check_pair(name: str, value: object, low: int, high: int) -> tuple[int, int]:
    """Two integers from `low` to `high`."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ArgumentError(f"{name} is {shown(value)}", expected="two integers")
    first, second = value
    return check_integer(name, first, low, high), check_integer(name, second, low, high)


def check_seed(seed: object) -> None:
    """Raise `ArgumentError` unless `seed` is an integer from 0 to 2^64 - 1."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise ArgumentError(f"seed is {shown(seed)}", expected="an integer")
    if not 0 <= int(seed) <= LARGEST_SEED:
        raise ArgumentError(
            f"seed is {shown(seed)}",
            expected=f"an integer from 0 to {LARGEST_SEED}",
            remedy="Leave it out for a random one." if int(seed) == -1 else "",
        )
