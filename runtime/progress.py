"""Progress for people: a bar of a call's evaluations with the time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .result import Step


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
