"""What a live session makes frames of: a prompt and parameters, all of which may change from frame to frame."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...bundle import Bundle
from ...errors import ArgumentError, UnknownNameError
from ...families.decoders import FULL, TINY, TINY_DECODER
from ...runtime.pipeline import Pipeline
from ...runtime.programs import asked_or_own, choose_sampling, usual_steps
from ...runtime.request import Request, check_integer
from .noise import MODES

MOST_STEPS = 50
LOWEST_STRENGTH = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveSettings:
    """Parameters of the coming frames; `None` leaves one to the bundle.

    steps: evaluations of the UNet a frame takes, with a picture as without one. strength: how much of an input
    picture is made anew; a schedule of about `steps / strength` steps is entered `steps` before its end, or all steps
    are spaced by it where the bundle's pipeline does that (`respaces`). sampler_options: of sampler and schedule, by
    name. noise:
    `"fixed"` (the seed's own for every frame, so that frames hang together), `"walk"` (moves on by `walk` of the way
    to the next seed's noise a frame) or `"fresh"` (another seed a frame). size: (width, height) in pixels. decoder:
    `"full"` or `"tiny"`; where the bundle has a tiny one, that is taken.
    """

    prompt: str = ""
    negative: str | None = None
    seed: int = 0
    steps: int | None = None
    strength: float = 0.6
    guidance: float | None = None
    sampler: str | None = None
    schedule: str | None = None
    sampler_options: Mapping[str, Any] | None = None
    size: tuple[int, int] | None = None
    noise: str = "fixed"
    walk: float = 0.05
    decoder: str | None = None

    def __post_init__(self) -> None:
        check_integer("seed", self.seed, 0, 2**63)
        if self.steps is not None:
            check_integer("steps", self.steps, 1, MOST_STEPS)
        _between("strength", self.strength, LOWEST_STRENGTH, 1.0)
        _between("walk", self.walk, 0.0, 1.0)
        if self.guidance is not None:
            _between("guidance", self.guidance, 0.0, 100.0)
        if self.noise not in MODES:
            raise UnknownNameError("noise", str(self.noise), MODES)
        if self.sampler_options is not None and not isinstance(self.sampler_options, Mapping):
            raise ArgumentError(
                f"sampler_options is {str(self.sampler_options)[:40]!r}", expected='options by name, like {"rho": 5}'
            )
        for name in ("sampler", "schedule", "negative", "decoder"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ArgumentError(f"{name} is {value!r}", expected="a string")

    @property
    def moves(self) -> bool:
        """Whether a frame differs from the one before although nothing was changed."""
        return self.noise == "fresh" or (self.noise == "walk" and self.walk > 0)

    def changed(self, changes: Mapping[str, Any]) -> LiveSettings:
        """These settings with some replaced; the others, a negative prompt among them, stay as they are.

        Raises `UnknownNameError` for a name that is no setting and `ArgumentError` for a value that cannot be.
        """
        known = {f.name for f in dataclasses.fields(self)}
        for name in changes:
            if name not in known:
                raise UnknownNameError("setting", str(name)[:40], known)
        return dataclasses.replace(self, **changes)

    def request(self, pipeline: Pipeline, *, image: bool) -> Request:
        """The request of a frame, with `image` from a picture (a placeholder, to be replaced by the frame's own).

        `ArgumentError` for what the bundle cannot make.
        """
        _, schedule = asked_or_own(pipeline.bundle, self.sampler, self.schedule)
        steps, strength = usual_steps(pipeline.bundle, schedule) if self.steps is None else self.steps, self.strength
        scheduled = steps
        if image and not self._spaced_anew(pipeline.bundle, steps):
            scheduled = max(steps, math.ceil(steps / self.strength - 1e-9))
            # half a step more than the steps that are kept, so that rounding keeps them
            strength = min(1.0, (steps + 0.5) / scheduled)
        return pipeline.request(
            self.prompt,
            negative=self.negative,
            steps=scheduled,
            sampler=self.sampler,
            schedule=self.schedule,
            options=self.sampler_options or {},
            guidance=self.guidance,
            seed=self.seed,
            size=self.size or pipeline.size,
            image=np.full((8, 8, 3), 128, np.uint8) if image else None,
            strength=strength if image else 1.0,
            decoder=self.decoder or (TINY if TINY_DECODER in pipeline.bundle.components else FULL),
        )

    def _spaced_anew(self, bundle: Bundle, steps: int) -> bool:
        sampler, schedule = asked_or_own(bundle, self.sampler, self.schedule)
        options = self.sampler_options or {}
        chosen = choose_sampling(bundle, sampler=sampler, schedule=schedule, steps=steps, options=options)
        return bundle.respaces and chosen.spaces_anew


def _between(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ArgumentError(f"{name} is {str(value)[:40]!r}", expected="a number")
    if not low <= value <= high:  # False for NaN
        raise ArgumentError(f"{name} is {value}", expected=f"a number from {low:g} to {high:g}")
