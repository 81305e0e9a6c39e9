"""A second pass at a higher resolution: the first's picture, or its latent, made larger and denoised by a strength."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import ArgumentError
from .arguments import check_real
from .arrays import UInt8
from .cascade import counted_among, once_an_image
from .pictures.upscale import check_upscaler, enlarge_latents, enlarge_pictures
from .pipeline import Pipeline
from .request import Request
from .result import Result, Step

MOST_SCALE = 16.0
OF_THE_FIRST = ("image", "mask", "mask_threshold", "strength", "size", "latents", "seed")
"""Arguments of a call that the second pass has of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SecondPass:
    """What is asked of a second pass.

    scale: times the first's width and height, rounded down to what the model takes; or size: (width, height). strength:
    how much is denoised anew, 0 to 1. steps: of its schedule, of which it runs `strength` (`None`: the first's).
    upscaler: `"lanczos"` or `"nearest"` for the picture, `"latent"` or
    `"latent-nearest"` for what it was decoded from.
    """

    scale: float | None = 2.0
    size: tuple[int, int] | None = None
    strength: float = 0.5
    steps: int | None = None
    upscaler: str = "lanczos"

    def __post_init__(self) -> None:
        check_upscaler(self.upscaler)
        check_real("the second pass's strength", self.strength, 0.0, 1.0)
        if self.size is None:
            check_real("the second pass's scale", self.scale, 1.0, MOST_SCALE)

    def described(self) -> dict[str, Any]:
        """What a picture's parameters say of it."""
        size = None if self.size is None else f"{self.size[0]}x{self.size[1]}"
        shown = {"scale": self.scale if size is None else None, "size": size, "strength": self.strength}
        shown |= {"steps": self.steps, "upscaler": self.upscaler}
        return {k: v for k, v in shown.items() if v is not None}

    def size_from(self, width: int, height: int, unit: int) -> tuple[int, int]:
        """(width, height) of the second pass after a first of these, in multiples of `unit`."""
        if self.size is not None:
            return self.size
        scale = 1.0 if self.scale is None else self.scale
        wide, high = (int(side * scale) // unit * unit for side in (width, height))
        return wide, high


def in_two_passes(
    pipe: Pipeline,
    prompt: str | Sequence[str] | None = None,
    *,
    second: SecondPass | None = None,
    cancel: threading.Event | None = None,
    on_step: Callable[[Step], None] | None = None,
    **given: Any,
) -> Result:
    """Make images, then make them larger: the second call's result, whose parameters are the first's and the pass.

    As two calls, the second with the first's pictures, seeds and arguments, and the strength. given: the arguments of a
    call. Everything of both is checked before the first evaluation; on_step is told of all evaluations. Raises
    `ArgumentError` for models that do not start from pictures.
    """
    asked = SecondPass() if second is None else second
    if pipe.bundle.model.pictures != "start" or pipe.bundle.model.clips:
        raise ArgumentError(f"a second pass of {pipe.bundle.model.title}", expected="a model that starts from pictures")
    first = pipe.request(prompt, **given)
    width, height = asked.size_from(first.width, first.height, pipe.bundle.latent.unit)
    blank = [np.zeros((height, width, 3), np.uint8)] * first.images
    checked = _second(pipe, prompt, given, first, asked, blank, (width, height))
    total = first.program.evaluations + checked.program.evaluations
    shown = None if on_step is None else counted_among(on_step, 0, total)
    made = pipe.run(first, cancel=cancel, on_step=shown)
    if asked.upscaler.startswith("latent"):
        factor = pipe.bundle.latent.factor
        latents = enlarge_latents(made.latents, (width // factor, height // factor), asked.upscaler)
        request = replace(checked, start_latents=latents)
    else:
        larger = enlarge_pictures(made.images, (width, height), asked.upscaler)
        request = _second(pipe, prompt, given, first, asked, larger, (width, height))
    shown = None if on_step is None else counted_among(on_step, first.program.evaluations, total)
    result = pipe.run(request, cancel=cancel, on_step=shown)
    timings = {**result.timings, "first": dict(made.timings), "total": result.timings["total"] + made.timings["total"]}
    parameters = tuple({**p, "hires": asked.described()} for p in made.parameters)
    return replace(result, parameters=parameters, truncated=made.truncated, timings=timings)


def _second(
    pipe: Pipeline,
    prompt: Any,
    given: Mapping[str, Any],
    first: Request,
    asked: SecondPass,
    pictures: Sequence[UInt8],
    size: tuple[int, int],
) -> Request:
    """The request of the second pass, which begins with these pictures."""
    shared = {k: v for k, v in given.items() if k not in OF_THE_FIRST}
    each = int(given.get("images_per_prompt") or 1)
    if each > 1:
        prompt, shared = once_an_image(prompt, shared, each)
    seeds = list(first.seeds) if first.images > 1 else first.seeds[0]
    shared |= {"variation_seed": list(first.variation_seeds)} if first.variation_seeds else {}
    if asked.steps is not None:
        shared = {k: v for k, v in shared.items() if k not in ("timesteps", "sigmas")} | {"steps": asked.steps}
    shown = list(pictures) if first.images > 1 else pictures[0]
    return pipe.request(prompt, **shared, seed=seeds, image=shown, strength=asked.strength, size=size)
