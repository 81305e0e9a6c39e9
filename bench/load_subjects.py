"""What `bench/load.py` puts load on: continuous batching, one at a time, static batches, a plain diffusers server.

All take the same `Ask`s, hold the same number of requests, and run on threads of this process.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fewstep.errors import QueueFullError
from fewstep.runtime import Pipeline
from fewstep.serving import Server

OUTSTANDING = 96
STATIC_BATCH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request of the load: what a pipeline is called with, and whose it is."""

    prompt: str
    seed: int
    steps: int
    sampler: str
    guidance: float
    size: tuple[int, int]
    peer: str = ""

    @property
    def kind(self) -> tuple[int, str, float, tuple[int, int]]:
        """What requests must have in common to be one batch, and what decides their time alone."""
        return self.steps, self.sampler, self.guidance, self.size


Done = Callable[[bool], None]


class Subject(Protocol):
    """Something that makes images. `submit` calls `done(ok)` from any thread; False when it refuses at once."""

    name: str

    def submit(self, ask: Ask, done: Done) -> bool: ...

    def forget(self) -> None:
        """Give up all that is not finished, and wait until nothing runs."""

    def figures(self) -> dict[str, Any]: ...

    def close(self) -> None: ...


class Continuous:
    """`fewstep.Server`."""

    name = "continuous"

    def __init__(self, pipeline: Pipeline, sizes: list[tuple[int, int]], *, rows: int) -> None:
        self.server = Server(pipeline, sizes=sizes, most_slots=OUTSTANDING, queue=0, most_work_s=1e6, most_rows=rows)
        self._tickets: set[Any] = set()

    def submit(self, ask: Ask, done: Done) -> bool:
        options = {"seed": ask.seed, "steps": ask.steps, "sampler": ask.sampler, "guidance": ask.guidance}
        try:
            ticket = self.server.submit(ask.prompt, size=ask.size, owner=ask.peer or None, **options)
        except QueueFullError:
            return False
        self._tickets.add(ticket)
        ticket.on_done(lambda t: (self._tickets.discard(t), done(t.error is None)))
        return True

    def forget(self) -> None:
        for ticket in list(self._tickets):
            ticket.cancel()
        while self.server.stats().slots_in_use:
            time.sleep(0.005)

    def figures(self) -> dict[str, Any]:
        """Rows, padding, ticks and busy seconds so far."""
        stats = self.server.stats()
        return {"rows": stats.rows, "padding": stats.padding, "ticks": stats.ticks, "busy_s": stats.tick_s}

    def close(self) -> None:
        self.server.close()


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    ask: Ask
    done: Done
    begin: float
    due: float


class Queued:
    """A thread that serves a queue: `make` gets the requests of one batch.

    In order of arrival; or with `times`, which gives the seconds after its arrival by which a request must begin and
    be finished, those first that can still be in time, the earliest due of them first.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[list[Ask]], None],
        *,
        batch: int = 1,
        times: Callable[[Ask], tuple[float, float]] | None = None,
    ) -> None:
        self.name, self._make, self._batch, self._times = name, make, batch, times
        self._waiting: list[_Waiting] = []
        self._changed = threading.Condition()
        self._closing, self._running = False, False
        self._error: BaseException | None = None
        self._busy_s, self._images = 0.0, 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, ask: Ask, done: Done) -> bool:
        with self._changed:
            if self._error is not None:
                raise self._error
            if len(self._waiting) >= OUTSTANDING:
                return False
            begin, due = self._times(ask) if self._times else (float("inf"), 0.0)
            now = time.perf_counter()
            self._waiting.append(_Waiting(ask, done, now + begin, now + due))
            self._changed.notify_all()
        return True

    def forget(self) -> None:
        with self._changed:
            self._waiting.clear()
            self._changed.wait_for(lambda: not self._running)

    def figures(self) -> dict[str, Any]:
        return {"images": self._images, "busy_s": self._busy_s}

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._running = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if self._closing:
                    return
                batch = self._take()
                self._running = True
            began = time.perf_counter()
            try:
                self._make([w.ask for w in batch])
            except BaseException as error:
                with self._changed:
                    self._error, self._running = error, False
                    self._changed.notify_all()
                return
            self._busy_s += time.perf_counter() - began
            self._images += len(batch)
            for waited in batch:
                waited.done(True)

    def _take(self) -> list[_Waiting]:
        """The request whose turn it is, and those that wait and are of its kind."""
        now = time.perf_counter()
        first = min(self._waiting, key=lambda w: (w.begin < now, w.due))
        batch = [first, *(w for w in self._waiting if w is not first and w.ask.kind == first.ask.kind)][: self._batch]
        for taken in batch:
            self._waiting.remove(taken)
        return batch


def pipeline_maker(pipeline: Pipeline) -> Callable[[list[Ask]], None]:
    """Requests of one kind as one call of a pipeline."""

    def make(asks: list[Ask]) -> None:
        first = asks[0]
        pipeline(
            [a.prompt for a in asks],
            seed=[a.seed for a in asks],
            steps=first.steps,
            sampler=first.sampler,
            guidance=first.guidance,
            size=first.size,
        )

    return make


def diffusers_maker(checkpoint: str, threads: int, samplers: Sequence[str]) -> Callable[[list[Ask]], None]:
    """A request as one call of diffusers' own pipeline, in float32, with the scheduler that the sampler stands for."""
    import diffusers
    import torch
    from fewstep.schedules.names import resolve_sampler
    from fewstep.schedules.solvers.registry import find_sampler

    torch.set_num_threads(threads)
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    pipe = diffusers.DiffusionPipeline.from_pretrained(checkpoint, torch_dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    config = pipe.scheduler.config
    schedulers = {n: getattr(diffusers, str(find_sampler(resolve_sampler(n).name).diffusers)) for n in samplers}

    def make(asks: list[Ask]) -> None:
        for ask in asks:
            pipe.scheduler = schedulers[ask.sampler].from_config(config)
            pipe(
                ask.prompt,
                num_inference_steps=ask.steps,
                guidance_scale=ask.guidance,
                width=ask.size[0],
                height=ask.size[1],
                generator=torch.Generator().manual_seed(ask.seed),
                output_type="np",
            )

    return make
