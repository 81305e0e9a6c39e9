"""What no table of linear rows can hold, refused by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from ..errors import ArgumentError, UnsupportedError

P = ParamSpec("P")
T = TypeVar("T")

NOT_LINEAR = {
    "use_clipped_model_output": "recomputes eps from a clamped x0",
    "guidance_rescale": "divides by standard deviations of the image",
}
NOT_DONE = {
    "use_flow_sigmas": "flow matching",
    "use_dynamic_shifting": "flow matching",
    "solver_p": "a predictor of another class",
    "shift_terminal": "flow matching",
}


def refuse_options(options: Mapping[str, Any], *, clips: bool = False) -> None:
    """Raise UnsupportedError for an option that is set and that cannot be, or is not, done.

    clips: whether x0 may be clipped, as diffusers' conventions know it and fewstep's own do not.
    """
    for name, value in options.items():
        if not value:
            continue
        if name == "clip_sample" and not clips:
            raise UnsupportedError(
                f"clip_sample={value!r} in fewstep's own conventions",
                remedy="Pass compat='diffusers', or leave it out.",
            )
        if name in NOT_LINEAR:
            raise UnsupportedError(
                f"{name}={value!r}: it {NOT_LINEAR[name]}, which no table of coefficients can do",
                remedy=f"Set {name} to {0.0 if name == 'guidance_rescale' else False}.",
            )
        if name in NOT_DONE:
            raise UnsupportedError(f"{name}={value!r} ({NOT_DONE[name]})", remedy=f"Leave {name} out.")


def finite_arithmetic(function: Callable[P, T]) -> Callable[P, T]:
    """`ArgumentError` where a function's numbers leave what a float holds, or are divided by zero."""

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except ArithmeticError as error:
            raise ArgumentError(
                f"options, betas, timesteps or sigmas with which no step can be computed ({error})",
                expected="numbers of a network's own magnitude",
            ) from error

    return checked
