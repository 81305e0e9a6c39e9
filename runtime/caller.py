"""What is called for images: in a thread or from asyncio, under `with`, with a bar of its progress."""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self, TypeVar, Unpack

from ..errors import CancelledError
from .call import takes_a_call
from .keywords import CallArguments
from .progress import step_bar
from .request import Request
from .result import Result, Step

T = TypeVar("T")


class Closable(ABC):
    """What holds engines until it is closed, at the end of a `with` or by `close`."""

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ImageMaker(Closable):
    """One loaded bundle, on a device or on several: makes a request of a call, and runs it."""

    @abstractmethod
    def request(self, prompt: str | Sequence[str] | None = None, **given: Unpack[CallArguments]) -> Request: ...

    @abstractmethod
    def run(
        self,
        request: Request,
        *,
        cancel: threading.Event | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> Result: ...

    @takes_a_call
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        cancel: threading.Event | None = None,
        on_step: Callable[[Step], None] | None = None,
        progress: bool = False,
        **given: Unpack[CallArguments],
    ) -> Result:
        """Make images. `Call` documents every argument; `options` are those of the sampler.

        cancel: ends the call between two evaluations once it is set. on_step: is told of each evaluation (of several
        devices, the first one's). progress: draw a bar with the time left, in notebooks a widget.

        Raises `ArgumentError` before anything is computed; `NonFiniteError` and `BlackImageError` instead of
        returning a broken image; `CancelledError` once `cancel` is set; `OutOfMemoryError` with what would fit;
        `UnavailableError` once this is closed.
        """
        if cancel is not None and cancel.is_set():
            raise CancelledError("the request was cancelled before it began")
        request = self.request(prompt, **given)
        if not progress:
            return self.run(request, cancel=cancel, on_step=on_step)
        with step_bar(on_step, total=request.program.evaluations) as drawn:
            return self.run(request, cancel=cancel, on_step=drawn)

    @takes_a_call
    async def acall(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        cancel: threading.Event | None = None,
        on_step: Callable[[Step], None] | None = None,
        progress: bool = False,
        **given: Unpack[CallArguments],
    ) -> Result:
        """As a call, for asyncio: the event loop goes on meanwhile. `on_step` is told on another thread.

        Cancelling the task ends the request after the evaluation that is running. Many callers at once are what
        `fewstep.Server.agenerate` is for.
        """
        return await on_a_thread(
            lambda told: self(prompt, cancel=cancel, on_step=told, progress=progress, **given), on_step
        )


async def on_a_thread(work: Callable[[Callable[[Step], None]], T], on_step: Callable[[Step], None] | None = None) -> T:
    """What `work` returns, which tells a function of each step; that ends it once this task was cancelled."""
    left = threading.Event()

    def told(step: Step) -> None:
        if left.is_set():
            raise CancelledError(f"the task was cancelled after {step.index + 1} of {step.total} evaluations")
        if on_step is not None:
            on_step(step)

    try:
        return await asyncio.to_thread(work, told)
    except asyncio.CancelledError:
        left.set()
        raise
