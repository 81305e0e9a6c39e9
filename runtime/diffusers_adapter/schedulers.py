"""A pipeline's scheduler: an object of diffusers', or of a caller's subclass, read anew for every call.

A subclass may bring its own `set_timesteps`, which is run as diffusers' pipelines run it, and whose levels become the
program; whatever else it or its instance changes of diffusers' class is refused by name.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import ArgumentError, MissingExtraError, UnsupportedError
from ...schedules import Program, program_from_diffusers
from ...schedules.compat.classes import CLASSES
from ...schedules.compat.held import held_layout
from ...schedules.names import resolve_sampler
from ..library import open_library
from ..programs import start_step
from .components import FrozenConfig, UnsupportedAttributeError

OWN = "set_timesteps"
_HARMLESS = {OWN, "_compatibles", "config_name", "config"}
_TABLES = ("betas", "alphas_cumprod", "final_alpha_cumprod")


@dataclass(frozen=True, slots=True)
class SchedulerView:
    """A scheduler where diffusers is not installed: its configuration, printed as diffusers prints it."""

    config: FrozenConfig

    @property
    def compatibles(self) -> Any:
        raise UnsupportedAttributeError(
            "scheduler.compatibles without diffusers", remedy="Install it with: pip install 'fewstep[export]'"
        )

    def __repr__(self) -> str:
        shown = {k: v for k, v in self.config.items() if not k.startswith("_") or k in ("_class_name",)}
        return f"{self.config['_class_name']} {json.dumps(shown, indent=2, sort_keys=True)}\n"


def make_scheduler(config: Mapping[str, Any]) -> Any:
    """diffusers' object of a bundle's scheduler, or a view of it where diffusers is not installed."""
    try:
        return open_library().make_scheduler(config)
    except MissingExtraError:
        return SchedulerView(FrozenConfig(config))


def check_scheduler(value: Any) -> Any:
    """A scheduler that a pipeline may be given: an object of diffusers', or its configuration with `_class_name`.

    Raises `ArgumentError` for what is none, `UnsupportedError` for a class that the samplers do not cover and for a
    subclass that changes more than `set_timesteps`.
    """
    if not isinstance(getattr(value, "config", value), Mapping):
        raise ArgumentError(f"the scheduler is {type(value).__name__}", expected="a scheduler of diffusers")
    name = class_of(value)
    if name not in CLASSES:
        resolve_sampler(name)
        raise UnsupportedError(f"the scheduler {name}", expected=f"one of {', '.join(CLASSES)}")
    _check_changes(value)
    return value


def class_of(value: Any) -> str:
    """The name of diffusers' class that a scheduler is of, or is a subclass of."""
    stock = _stock(value)
    if stock is not None:
        return stock.__name__
    return str(getattr(value, "config", value).get("_class_name") or type(value).__name__)


def config_of(value: Any) -> dict[str, Any]:
    """A scheduler's configuration as it is now, with diffusers' class."""
    _check_changes(value)
    return {**getattr(value, "config", value), "_class_name": class_of(value)}


def has_own_levels(value: Any) -> bool:
    """Whether the caller's own `set_timesteps` decides a scheduler's levels."""
    return OWN in _changed(value)


@dataclass(frozen=True, slots=True)
class OwnLevels:
    """The levels that a caller's `set_timesteps` made: the steps asked for, and the program by a picture's strength."""

    steps: int
    compile: Callable[[float | None], Program]


def run_own_levels(
    value: Any,
    *,
    steps: int,
    timesteps: Sequence[float] | None,
    sigmas: Sequence[float] | None,
    options: Mapping[str, Any],
    handed: Mapping[str, Any],
) -> OwnLevels:
    """Run a caller's `set_timesteps` as diffusers' pipelines do, and read the levels that the scheduler then holds.

    handed: what a pipeline hands it besides; a strength among that, it has spaced its steps by itself.
    """
    given = {k: v for k, v in (("timesteps", timesteps), ("sigmas", sigmas)) if v is not None}
    if len(given) > 1:
        raise ArgumentError("both timesteps and sigmas were given", remedy="Pass one of them.")
    parameters = inspect.signature(value.set_timesteps).parameters
    rest = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in (*given, *(() if rest else handed)):
        if name not in parameters:
            raise ArgumentError(f"set_timesteps of {type(value).__name__} takes no {name}", remedy=f"Leave {name} out.")
    if given:
        value.set_timesteps(**given, device="cpu", **handed)
    else:
        value.set_timesteps(steps, device="cpu", **handed)
    held = _numbers(value.timesteps)
    levels = None if getattr(value, "sigmas", None) is None else _numbers(value.sigmas)
    layout = held_layout(
        class_of(value),
        held,
        levels,
        steps=int(value.num_inference_steps or len(held)),
        init_noise=float(getattr(value, "init_noise_sigma", 1.0)),
    )
    config = config_of(value)
    asked = len(held) if given else steps

    def compile_from(strength: float | None) -> Program:
        left_out = 0 if strength is None or "strength" in handed else start_step(asked, strength)
        return program_from_diffusers(config, steps=len(held), start=left_out, layout=layout, **options)

    return OwnLevels(steps=asked, compile=compile_from)


def _stock(value: Any) -> type | None:
    """diffusers' own class among those of an object."""
    return next(
        (c for c in type(value).__mro__ if c.__module__.startswith("diffusers.") and c.__name__ in CLASSES), None
    )


def _changed(value: Any) -> set[str]:
    """The names of diffusers' class that a subclass, or the object itself, has otherwise."""
    stock = _stock(value)
    if stock is None:
        return set()
    above = type(value).__mro__[: type(value).__mro__.index(stock)]
    names = {n for c in above for n in vars(c) if hasattr(stock, n) and not n.startswith("__")}
    return names | {n for n in vars(value) if callable(getattr(stock, n, None))}


def _check_changes(value: Any) -> None:
    more = sorted(_changed(value) - _HARMLESS)
    if more:
        raise UnsupportedError(
            f"{type(value).__name__} changes {', '.join(more)} of diffusers' {class_of(value)}",
            expected=f"a subclass that changes {OWN} alone, for the steps themselves run in the program",
        )
    stock: Any = _stock(value)
    if stock is None:
        return
    fresh = stock.from_config(value.config)
    for name in _TABLES:
        ours, theirs = (getattr(s, name, None) for s in (value, fresh))
        if ours is not None and theirs is not None and not np.array_equal(_numbers(ours), _numbers(theirs)):
            raise UnsupportedError(
                f"{name} of the scheduler is not what its configuration says",
                expected="a scheduler whose numbers are its configuration's, such as trained_betas",
            )


def _numbers(values: Any) -> list[float]:
    """A tensor or a list as numbers."""
    plain = values.detach().cpu().numpy() if hasattr(values, "detach") else values
    return [float(v) for v in np.asarray(plain, np.float64).ravel()]
