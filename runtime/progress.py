"""Streams of steps: followed to their end, and shown to people as a bar with the time left."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import TypeVar

from ..errors import CancelledError
from .result import Step

T = TypeVar("T")


@contextmanager
def step_bar(
    on_step: Callable[[Step], None] | None = None, *, total: int | None = None
) -> Iterator[Callable[[Step], None]]:
    """What draws each step it is told of, and tells `on_step` too: a widget in notebooks, elsewhere a line on stderr.

    total: of evaluations, where it is known before the first one.
    """
    from tqdm.auto import tqdm

    with tqdm(total=total, unit="it", desc="denoise", leave=False) as drawn:

        def told(step: Step) -> None:
            drawn.total = step.total
            drawn.update(step.index + 1 - drawn.n)
            if on_step is not None:
                on_step(step)

        yield told


def follow(
    stream: Generator[Step, None, T],
    on_step: Callable[[Step], None] | None,
    cancels: Sequence[threading.Event | None],
) -> T:
    """Run a stream of steps to its end; `CancelledError` between two of them once one of the events is set."""
    with closing(stream):
        while True:
            try:
                step = next(stream)
            except StopIteration as stop:
                outcome: T = stop.value
                return outcome
            if on_step is not None:
                on_step(step)
            if any(c is not None and c.is_set() for c in cancels):
                raise CancelledError(f"the request was cancelled after {step.index + 1} of {step.total} evaluations")
