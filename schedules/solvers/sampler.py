"""What a person and the compiler need to know of a sampler, stated at the function that solves it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from ...errors import ArgumentError

Space = Literal["ve", "vp"]
Group = Literal["sigma", "ddpm", "lambda", "distilled", "edm"]
Solve = TypeVar("Solve", bound=Callable[..., Any])

GROUPS: tuple[Group, ...] = ("sigma", "ddpm", "lambda", "distilled", "edm")
"""Steps in sigma, along DDPM's timesteps, in lambda; for distilled networks, for EDM's. Listings follow this order."""

COMPAT_ARGUMENTS = ("published", "restart", "mix_raw", "variance_floor", "single")
"""Arguments that choose diffusers' reading of a sampler; set by the compatibility layer alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """One sampler.

    solve: the function that runs it on symbols, in coordinates `space`; presets: arguments that make it this one.
    latent_space: the coordinates of the latents that diffusers' scheduler of this sampler hands around.
    order: of accuracy in the step size, as stated by its source (for stochastic ones, with the noise taken away).
    stages: evaluations of the network per step, and extra_evaluations beside them (PLMS: 1).
    draws: when it draws noise: "never", "always", or in words. exact: whether, given the true x0 and a schedule
    that ends at sigma 0, it ends on it.
    infinite_top: whether it can start where no signal is left at all (zero terminal SNR), rather than just below.
    schedule: the spacing it takes if none is asked for.
    clips: where x0 is clipped or thresholded, whether eps stays the network's own ("x0") or becomes that of the clipped
    x0 ("eps").
    diffusers: its scheduler class there. aliases: its other names, with the options that each implies.
    """

    name: str
    solve: Callable[..., Any]
    space: Space
    group: Group
    order: int
    source: str
    latent_space: Space
    presets: Mapping[str, Any] = field(default_factory=dict)
    stages: int = 1
    extra_evaluations: int = 0
    draws: str = "never"
    exact: bool = True
    infinite_top: bool = False
    schedule: str = "trailing"
    diffusers: str | None = None
    clips: Literal["x0", "eps"] = "x0"
    aliases: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """The keyword options that a caller may set, with their defaults."""
        hidden = (*self.presets, *COMPAT_ARGUMENTS)
        return {name: value for name, value in _defaults(self.solve).items() if name not in hidden}

    @property
    def summary(self) -> str:
        return (self.solve.__doc__ or "").split("\n")[0].rstrip(".")


SAMPLERS: dict[str, Sampler] = {}


def sampler(
    name: str | None = None, *, aliases: Iterable[str] | Mapping[str, Mapping[str, Any]] = (), **facts: Any
) -> Callable[[Solve], Solve]:
    """Register the decorated function as a sampler; several times on one function, one for each set of presets.

    name: the function's own if None. facts: the fields of `Sampler`. The class's name in diffusers becomes an alias of
    the sampler whose presets are the function's defaults.
    """

    def register(solve: Solve) -> Solve:
        names = dict(aliases) if isinstance(aliases, Mapping) else {alias: {} for alias in aliases}
        if facts.get("diffusers") and facts.get("presets", {}).items() <= _defaults(solve).items():
            names[facts["diffusers"]] = {}
        own = {"latent_space": facts["space"], **facts}
        _insert(Sampler(name=name or solve.__name__, solve=solve, aliases=names, **own))
        return solve

    return register


def _insert(record: Sampler) -> None:
    """Put a record at the end of its group; before those of its own function, as decorators run from the bottom up."""
    if record.name in SAMPLERS:
        raise ArgumentError(f"two samplers named {record.name!r}", remedy="Give one of them another name.")
    records = list(SAMPLERS.values())
    rank = GROUPS.index(record.group)
    later = (
        i
        for i, other in enumerate(records)
        if GROUPS.index(other.group) > rank or (other.group == record.group and other.solve is record.solve)
    )
    records.insert(next(later, len(records)), record)
    SAMPLERS.clear()
    SAMPLERS.update({other.name: other for other in records})


def _defaults(solve: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(solve).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
