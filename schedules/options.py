"""Range checks of options, by name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..errors import ArgumentError, UnknownNameError
from ..values import LARGEST, shown

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
    elif name in ("lower_order_final", "euler_at_final", "large_variance", "learned_variance"):
        if not isinstance(value, bool):
            raise ArgumentError(f"{name}={shown(value)}", expected="True or False")
    elif name == "disable_corrector":
        if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(i, int) for i in value):
            raise ArgumentError(f"{name}={shown(value)}", expected="step numbers")
    elif name == "order":
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 4:
            raise ArgumentError(f"order={shown(value)}", expected="an integer from 1 to 4")
    elif name == "shifted_timestep":
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 1000:
            raise ArgumentError(f"shifted_timestep={shown(value)}", expected="an integer from 0 to 1000")
    elif isinstance(value, bool) or not isinstance(value, int | float) or not _is_level(value):
        raise ArgumentError(f"{name}={shown(value)}", expected="a number of at least 0")
    elif name in _UNIT_RANGE and value > 1:
        raise ArgumentError(f"{name}={shown(value)}", expected="a number from 0 to 1")


def _is_level(value: float) -> bool:
    """Whether a number is at least 0 and a float's: infinity is a level, an integer beyond all floats is none."""
    return 0 <= value <= LARGEST or value == math.inf


def check_spacing_option(name: str, value: Any) -> None:
    """Check a spacing's option: whole numbers for counts, positive finite ones otherwise; raises ArgumentError."""
    if name in ("steps_offset", "original_steps"):
        least = 0 if name == "steps_offset" else 1
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= 1000:
            raise ArgumentError(f"{name}={shown(value)}", expected=f"an integer from {least} to 1000")
    elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= LARGEST:
        raise ArgumentError(f"{name}={shown(value)}", expected="a finite number above 0")
