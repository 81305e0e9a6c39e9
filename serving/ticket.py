"""A ticket: what a caller holds while a server works on its request."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ..errors import CancelledError, DeadlineError, FewstepError
from ..runtime.request import Request
from ..runtime.result import Result, Step
from ..runtime.second_pass import TwoPasses

KEPT_STEPS = 16
_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A part of the work on a request, in seconds of `time.monotonic`, and when its evaluations were made."""

    name: str
    began_at: float
    ended_at: float
    evaluations: tuple[float, ...] = ()


class Ticket:
    """A request that a server has accepted: wait for it, follow it, or cancel it. Thread-safe.

    `arrival` and `deadline` are seconds of `time.monotonic`; `alone_s` is what it should take alone. A ticket is
    settled once, with a `Result` or an error. `short` says that it may have places kept for short requests. `passes` is
    the call where it has two, `request` then being the first, and `second_s` what the second should take alone.
    `stages` are those that are done.
    """

    def __init__(
        self,
        request: Request,
        *,
        deadline_s: float | None = None,
        previews: bool = False,
        name: str | None = None,
        alone_s: float = 0.0,
        arrival: float | None = None,
        passes: TwoPasses | None = None,
        second_s: float = 0.0,
    ) -> None:
        self.request, self.previews, self.alone_s = request, previews, alone_s
        self.passes, self.second_s = passes, second_s
        self.stages: list[Stage] = []
        self.short = False
        self.number = next(_numbers)
        self.name = name or f"request-{self.number}"
        self.arrival = time.monotonic() if arrival is None else arrival
        self.deadline = None if deadline_s is None else self.arrival + deadline_s
        self._future: Future[Result] = Future()
        self._future.set_running_or_notify_cancel()  # from now on only the server settles it
        self._settling = False
        self._steps: deque[Step] = deque(maxlen=KEPT_STEPS)
        self._changed = threading.Condition()
        self._listeners: list[Callable[[], object]] = []

    @property
    def evaluations(self) -> int:
        """Of all passes."""
        return self.request.program.evaluations if self.passes is None else self.passes.evaluations

    @property
    def warnings(self) -> tuple[str, ...]:
        """What of the request went against the model or had no effect."""
        return self.request.warnings if self.passes is None else self.passes.warnings

    @property
    def done(self) -> bool:
        return self._future.done()

    @property
    def error(self) -> BaseException | None:
        """Why it failed; `None` while it is not settled or when it ended well."""
        return self._future.exception() if self._future.done() else None

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the images; raises what went wrong, and `TimeoutError` after `timeout` seconds."""
        return self._future.result(timeout)

    def cancel(self) -> bool:
        """Give the request up: callers see `CancelledError` at once, its slots are free before the next tick.

        False when it was settled already.
        """
        return self.fail(CancelledError("the request was cancelled"))

    def on_done(self, call: Callable[[Ticket], object]) -> None:
        """Call when settled (from the thread that settles it), at once if it is."""
        self._future.add_done_callback(lambda _: call(self))

    def on_step(self, call: Callable[[], object]) -> None:
        """Call whenever all images have made an evaluation (from the thread that ticks: it must be quick)."""
        with self._changed:
            self._listeners.append(call)

    def steps(self) -> Iterator[Step]:
        """Its steps as they are made, until it is settled; a slow reader loses the oldest.

        Raises what went wrong. With `previews`, each step can decode what it sees.
        """
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._steps or self.done)
                if not self._steps:
                    break
                step = self._steps.popleft()
            yield step
        self.result()

    def __await__(self) -> Generator[Any, None, Result]:
        return self._wait().__await__()

    def future(self) -> asyncio.Future[Result]:
        """What the running loop can wait for; cancelling it does not cancel the request."""
        return asyncio.wrap_future(self._future)

    async def _wait(self) -> Result:
        """The result; a task that is cancelled while it waits cancels the request."""
        try:
            return await self.future()
        except asyncio.CancelledError:
            self.cancel()
            raise

    async def asteps(self) -> AsyncIterator[Step]:
        """`steps` for asyncio; leaving the loop does not cancel the request."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()
        wake = _waker(loop, changed)
        with self._changed:
            self._listeners.append(wake)
        self._future.add_done_callback(lambda _: wake())
        try:
            while True:
                changed.clear()
                while self._steps:
                    yield self._steps.popleft()
                if self.done and not self._steps:
                    break
                await changed.wait()
        finally:
            with self._changed:
                self._listeners.remove(wake)
        self.result()

    def expired(self, now: float) -> bool:
        return self.deadline is not None and now >= self.deadline

    def expire(self) -> bool:
        """Settle it as too late."""
        waited = time.monotonic() - self.arrival
        return self.fail(
            DeadlineError(f"the request was not finished after {waited:.2f} s", expected="to end by its deadline")
        )

    def report(self, step: Step) -> None:
        """A step was made (for the server)."""
        with self._changed:
            self._steps.append(step)
            listeners = list(self._listeners)
            self._changed.notify_all()
        for call in listeners:
            call()

    def finish(self, result: Result) -> bool:
        """Settle it with images (for the server)."""
        return self._settle(lambda: self._future.set_result(result))

    def fail(self, error: FewstepError) -> bool:
        """Settle it with an error (for the server)."""
        return self._settle(lambda: self._future.set_exception(error))

    def _settle(self, settle: Callable[[], None]) -> bool:
        with self._changed:
            if self._future.done():
                return False
            first = not self._settling
            self._settling = True
        if first:
            settle()
            with self._changed:
                self._changed.notify_all()
        return first


def _waker(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> Callable[[], None]:
    def wake() -> None:
        with suppress(RuntimeError):  # the loop was closed: nobody reads any more
            loop.call_soon_threadsafe(event.set)

    return wake
