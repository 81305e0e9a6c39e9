"""A second pass at a higher resolution: the first's picture, or its latent, made larger and denoised by a strength."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import ArgumentError
from .arguments import check_real
from .cascade import counted_among, once_an_image
from .pictures.images import pillow_images, to_unit
from .pictures.resize import Pictures
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TwoPasses:
    """A call in two passes, checked before the first evaluation.

    first: its first request. checked: the second, which holds no picture yet. asked: the pass. factor: pixels a side of
    a latent's cell.
    """

    first: Request
    checked: Request
    asked: SecondPass
    factor: int

    @property
    def evaluations(self) -> int:
        """Of both."""
        return self.first.program.evaluations + self.checked.program.evaluations

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.first.warnings, *self.checked.warnings)))

    def second(self, made: Result) -> Request:
        """The second pass's request, after what the first made."""
        width, height = self.checked.width, self.checked.height
        if self.asked.upscaler.startswith("latent"):
            cells = width // self.factor, height // self.factor
            return replace(self.checked, start_latents=enlarge_latents(made.latents, cells, self.asked.upscaler))
        larger = enlarge_pictures(made.images, (width, height), self.asked.upscaler)
        pixels = np.stack([to_unit(p, width, height) for p in pillow_images(np.stack(larger))])
        return replace(self.checked, pictures=Pictures(pixels=pixels, masks=None))

    def result(self, made: Result, last: Result) -> Result:
        """The second pass's result, whose parameters are the first's and the pass."""
        total = last.timings["total"] + made.timings["total"]
        timings = {**last.timings, "first": dict(made.timings), "total": total}
        parameters = tuple({**p, "hires": self.asked.described()} for p in made.parameters)
        return replace(last, parameters=parameters, truncated=made.truncated, timings=timings)


def plan_passes(
    pipe: Pipeline,
    prompt: str | Sequence[str] | None,
    asked: SecondPass,
    given: Mapping[str, Any],
    *,
    sizes: Sequence[tuple[int, int]] | None = None,
) -> TwoPasses:
    """A call in two passes; given: its arguments. sizes: (width, height) that may be made, where not any may.

    Raises `ArgumentError` for what is wrong with either pass, and for models that do not start from pictures.
    """
    if pipe.bundle.model.pictures != "start" or pipe.bundle.model.clips:
        raise ArgumentError(f"a second pass of {pipe.bundle.model.title}", expected="a model that starts from pictures")
    among: dict[str, Any] = {} if sizes is None else {"sizes": sizes}
    first = pipe.request(prompt, **among, **given)
    size = asked.size_from(first.width, first.height, pipe.bundle.latent.unit)
    if sizes is not None and size not in sizes:
        raise ArgumentError(
            f"the second pass's size is {size[0]}x{size[1]}",
            expected=f"one of {', '.join(f'{w}x{h}' for w, h in sizes)}",
        )
    checked = _second(pipe, prompt, given, first, asked, size)
    return TwoPasses(
        first=first, checked=replace(checked, pictures=None), asked=asked, factor=pipe.bundle.latent.factor
    )


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
    passes = plan_passes(pipe, prompt, SecondPass() if second is None else second, given)
    total, done = passes.evaluations, passes.first.program.evaluations
    made = pipe.run(passes.first, cancel=cancel, on_step=on_step and counted_among(on_step, 0, total))
    again = passes.second(made)
    return passes.result(made, pipe.run(again, cancel=cancel, on_step=on_step and counted_among(on_step, done, total)))


def _second(
    pipe: Pipeline, prompt: Any, given: Mapping[str, Any], first: Request, asked: SecondPass, size: tuple[int, int]
) -> Request:
    """The request of the second pass, from an empty picture."""
    shared = {k: v for k, v in given.items() if k not in OF_THE_FIRST}
    each = int(given.get("images_per_prompt") or 1)
    if each > 1:
        prompt, shared = once_an_image(prompt, shared, each)
    seeds = list(first.seeds) if first.images > 1 else first.seeds[0]
    shared |= {"variation_seed": list(first.variation_seeds)} if first.variation_seeds else {}
    if asked.steps is not None:
        shared = {k: v for k, v in shared.items() if k not in ("timesteps", "sigmas")} | {"steps": asked.steps}
    blank = np.zeros((size[1], size[0], 3), np.uint8)
    return pipe.request(prompt, **shared, seed=seeds, image=blank, strength=asked.strength, size=size)
