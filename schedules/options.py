"""Range checks of options, by name."""

from __future__ import annotations

import math
from typing import Any

from ..errors import ArgumentError, UnknownNameError

_SOLVER_TYPES = (("midpoint", "heun"), ("bh1", "bh2"))
_UNIT_RANGE = ("eta",)


def check_option(name: str, value: Any, default: Any = None) -> None:
    """Check a sampler's option; raises ArgumentError, or UnknownNameError for a choice that does not exist.

    default: the option's default, which tells one sampler's choices from another's.
    """
    if name == "solver_type":
        choices = next((types for types in _SOLVER_TYPES if default in types), ())
        if value not in choices:
            raise UnknownNameError(name, str(value), choices)
    elif name in ("lower_order_final", "euler_at_final", "large_variance"):
        if not isinstance(value, bool):
            raise ArgumentError(f"{name}={value!r}", expected="True or False")
    elif name == "disable_corrector":
        if not all(isinstance(i, int) for i in value):
            raise ArgumentError(f"{name}={value!r}", expected="step numbers")
    elif name == "order":
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 4:
            raise ArgumentError(f"order={value!r}", expected="an integer from 1 to 4")
    elif isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value) or value < 0:
        raise ArgumentError(f"{name}={value!r}", expected="a number of at least 0")
    elif name in _UNIT_RANGE and value > 1:
        raise ArgumentError(f"{name}={value!r}", expected="a number from 0 to 1")


def check_spacing_option(name: str, value: Any) -> None:
    """Check a spacing's option: whole numbers for counts, positive finite ones otherwise; raises ArgumentError."""
    if name in ("steps_offset", "original_steps"):
        least = 0 if name == "steps_offset" else 1
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= 1000:
            raise ArgumentError(f"{name}={value!r}", expected=f"an integer from {least} to 1000")
    elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ArgumentError(f"{name}={value!r}", expected="a finite number above 0")
