"""What a search is asked, checked before anything is computed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import ArgumentError, UnknownNameError, UnsupportedError
from ..runtime import Pipeline
from ..runtime.arguments import check_integer, check_real
from ..runtime.arrays import Float32
from ..schedules.names import resolve_sampler
from .noise import ONE_NOISE
from .sets import Counts, check_prompts, prompts_digest, usual_prompts

METHODS = ("auto", "klub", "trajectory", "endpoint", "rows")
STUDENT_STEPS = 8
"""Of a few-step student's own result, which its fewer steps are judged by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSettings:
    """What a search is asked; all but the budget decides what it finds."""

    sampler: str
    steps: tuple[int, ...]
    method: str
    guidance: float
    size: tuple[int, int]
    negative: str | None
    prompts: tuple[str, ...]
    counts: Counts
    teacher_steps: int
    student: bool
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)
    pictures: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        plain = ("sampler", "steps", "method", "guidance", "size", "negative", "teacher_steps", "student", "seed")
        return {
            **{k: getattr(self, k) for k in plain},
            "prompts": prompts_digest(self.prompts),
            "pairs": [self.counts.search, self.counts.choose, self.counts.held_out],
            "options": dict(self.options),
            "pictures": list(self.pictures),
        }


def read_settings(
    pipeline: Pipeline,
    *,
    sampler: str | None,
    steps: Sequence[int],
    prompts: Sequence[str] | None,
    guidance: float | None,
    size: tuple[int, int] | None,
    negative: str | None,
    method: str,
    pairs: int,
    held_out: int,
    teacher_steps: int,
    seed: int,
    student: bool | None,
    options: Mapping[str, Any] | None,
    pictures: Sequence[Float32],
) -> SearchSettings:
    """Check what a search is asked and fill in the bundle's own; `ArgumentError`, `UnknownNameError`."""
    own = pipeline.bundle.defaults
    if method not in METHODS:
        raise UnknownNameError("method", method, METHODS)
    counts = sorted({check_integer("steps", n, 1, 100) for n in steps})
    if not counts:
        raise ArgumentError("no numbers of steps", expected="at least one, like steps=(5, 8, 10)")
    name = sampler or own.sampler or str(pipeline.bundle.scheduler["_class_name"])
    given = own.guidance if guidance is None else check_real("guidance", guidance, 0.0, 1000.0)
    is_student = (own.preset is not None or own.steps <= STUDENT_STEPS // 2) if student is None else student
    if is_student and counts[-1] >= STUDENT_STEPS:
        raise ArgumentError(
            f"{counts[-1]} steps of a model that was distilled to few",
            expected=f"fewer than its own {STUDENT_STEPS}, by which they are judged",
            remedy="Ask for fewer steps (--steps 1,2,4), or pass student=False (--no-student).",
        )
    if resolve_sampler(name).name in ONE_NOISE and not is_student:
        raise UnsupportedError(
            f"a search for {name} on a model that was not distilled for it",
            expected="a sampler of base models (see: fewstep samplers), or student=True",
        )
    width, height = size or pipeline.size
    each = check_integer("pairs", pairs, 4, 4096)
    return SearchSettings(
        sampler=resolve_sampler(name).name,
        steps=tuple(counts),
        method=method,
        guidance=float(given),
        size=(width, height),
        negative=negative,
        prompts=tuple(check_prompts(usual_prompts() if prompts is None else list(prompts))),
        counts=Counts(search=each, choose=each, held_out=check_integer("held_out", held_out, 8, 4096)),
        teacher_steps=check_integer("teacher_steps", teacher_steps, 100, 1000),
        student=is_student,
        seed=check_integer("seed", seed, 0, 2**31),
        options=dict(options or {}),
        pictures=tuple(hashlib.sha256(np.asarray(p, np.float32).tobytes()).hexdigest() for p in pictures),
    )
