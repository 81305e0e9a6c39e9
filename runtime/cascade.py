"""A cascade: pipelines of which the first makes a picture of a text, and each later one makes it larger."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Unpack

import numpy as np

from ..errors import ArgumentError
from .caller import Closable, on_a_thread
from .keywords import CallArguments
from .pipeline import Pipeline
from .progress import step_bar
from .request import Request
from .result import Result, Step

SHARED = (
    *("prompt", "negative", "prompt_embeds", "negative_prompt_embeds", "prompt_syntax", "long_prompts"),
    *("seed", "seed_device", "shared_stream", "images_per_prompt"),
)
"""Arguments of a call that every stage gets; the others are a stage's own."""


class Cascade(Closable):
    """Stages that are run one after another for each call, on the same texts.

    A stage is given the floats that the one before made (its result's `latents`), not its rounded picture. Texts are
    encoded once, by the first stage's encoders: the later stages use these, so that their own may be left out of their
    bundles, or be never opened (`keep_text_encoders=False`). Raises `ArgumentError` for stages that do not belong
    together.
    """

    def __init__(self, stages: Sequence[Pipeline]) -> None:
        if len(stages) < 2:
            raise ArgumentError(f"a cascade of {len(stages)} stages", expected="two or more")
        self.stages = tuple(stages)
        first, *later = self.stages
        if first.bundle.model.pictures == "told":
            raise ArgumentError(
                f"a cascade that begins with {first.bundle.model.title}", expected="a model that makes a picture first"
            )
        for stage in later:
            if stage.bundle.model.pictures != "told":
                raise ArgumentError(
                    f"{stage.bundle.model.title} as a later stage of a cascade",
                    expected="a model that makes pictures larger",
                )
            if _text(first) != _text(stage):
                raise ArgumentError(
                    f"stages of texts of {_text(first)} and {_text(stage)}", expected="stages of one model"
                )
            stage.text = first.text

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        later: Sequence[Mapping[str, Any]] = (),
        cancel: threading.Event | None = None,
        on_step: Callable[[Step], None] | None = None,
        progress: bool = False,
        **given: Unpack[CallArguments],
    ) -> Result:
        """The last stage's result. Arguments are those of `Call`; what `SHARED` names goes to all stages, the rest to
        the first, and `later` has the rest of each other stage, like `[{"steps": 50, "guidance": 4.0}]`.

        Everything is checked before the first evaluation. on_step is told of all evaluations of all stages, of which
        progress draws a bar.
        """
        if not progress:
            return self.run(prompt, later=later, cancel=cancel, on_step=on_step, **given)[-1]
        with step_bar(on_step) as drawn:
            return self.run(prompt, later=later, cancel=cancel, on_step=drawn, **given)[-1]

    async def acall(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        later: Sequence[Mapping[str, Any]] = (),
        cancel: threading.Event | None = None,
        on_step: Callable[[Step], None] | None = None,
        progress: bool = False,
        **given: Unpack[CallArguments],
    ) -> Result:
        """As a call, for asyncio; see `Pipeline.acall`."""
        return await on_a_thread(
            lambda told: self(prompt, later=later, cancel=cancel, on_step=told, progress=progress, **given), on_step
        )

    def __repr__(self) -> str:
        return f"<Cascade of {', '.join(repr(s.bundle.name) for s in self.stages)}>"

    def close(self) -> None:
        """Close every stage."""
        for stage in self.stages:
            stage.close()

    def run(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        later: Sequence[Mapping[str, Any]] = (),
        cancel: threading.Event | None = None,
        on_step: Callable[[Step], None] | None = None,
        **given: Unpack[CallArguments],
    ) -> tuple[Result, ...]:
        """As a call, with the results of all stages; the last one's parameters are the first's, and what came then."""
        requests = self.requests(prompt, later=later, **given)
        total, done = sum(r.program.evaluations for r in requests), 0
        results: list[Result] = []
        for stage, request in zip(self.stages, requests, strict=True):
            if results and request.told is not None:
                request = replace(request, told=replace(request.told, pixels=results[-1].latents))
            shown = None if on_step is None else counted_among(on_step, done, total)
            results.append(stage.run(request, cancel=cancel, on_step=shown))
            done += request.program.evaluations
        own = [*later, *[{}] * (len(results) - 1 - len(later))]
        then = [_words(stage.bundle.name, given) for stage, given in zip(self.stages[1:], own, strict=True)]
        named = tuple({**p, "then": then} for p in results[0].parameters)
        return (*results[:-1], replace(results[-1], parameters=named))

    def requests(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        later: Sequence[Mapping[str, Any]] = (),
        **given: Unpack[CallArguments],
    ) -> tuple[Request, ...]:
        """A checked request a stage; those of later stages are told of an empty picture, in place of what comes."""
        first, *others = self.stages
        if len(later) > len(others):
            raise ArgumentError(f"arguments of {len(later)} later stages", expected=f"at most {len(others)}")
        requests, asked = [first.request(prompt, **given)], dict[str, Any](given)
        shared = {k: asked[k] for k in SHARED if k in asked}
        shared["seed"] = list(requests[0].seeds) if requests[0].images > 1 else requests[0].seeds[0]
        each = int(given.get("images_per_prompt") or 1)
        if each > 1:
            prompt, shared = once_an_image(prompt, shared, each)
        for i, stage in enumerate(others):
            own = dict(later[i]) if i < len(later) else {}
            fixed = sorted({*SHARED, "image"} & own.keys())
            if fixed:
                raise ArgumentError(
                    f"{', '.join(fixed)} for a later stage",
                    expected="arguments of its own, like steps or guidance",
                )
            request = stage.request(prompt, **shared, image=np.zeros((1, 3, 8, 8), np.float32), **own)
            if request.images != requests[0].images:
                raise ArgumentError(f"{requests[0].images} images and {request.images}", expected="as many a stage")
            requests.append(request)
        return tuple(requests)


def _words(bundle: str, given: Mapping[str, Any]) -> str:
    """A later stage as the command line's `--then` takes it."""
    shown = {k: f"{v[0]}x{v[1]}" if k == "size" else v for k, v in given.items() if k != "options"}
    shown |= given.get("options") or {}
    return ",".join([bundle, *(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in shown.items())])


def _text(stage: Pipeline) -> list[tuple[object, ...]]:
    """The shapes of what a stage's UNet takes of a text."""
    return [c.shape for c in stage.bundle.conditions if c.argument is not None]


def counted_among(on_step: Callable[[Step], None], done: int, total: int) -> Callable[[Step], None]:
    """Steps of a stage counted among those of all."""
    return lambda step: on_step(replace(step, index=done + step.index, total=total))


def once_an_image(prompt: Any, shared: Mapping[str, Any], each: int) -> tuple[Any, dict[str, Any]]:
    """Prompts and embeddings once an image, since seeds are told for each."""
    rest = {k: v for k, v in shared.items() if k != "images_per_prompt"}

    def often(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [v for v in value for _ in range(each)]
        return np.repeat(np.asarray(value), each, axis=0) if getattr(value, "ndim", 0) else value

    texts = [prompt] * each if isinstance(prompt, str) else often(prompt)
    several = {k: often(v) if k.endswith("embeds") or k == "negative" else v for k, v in rest.items()}
    return texts, several
