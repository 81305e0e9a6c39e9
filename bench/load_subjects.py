"""What `bench/load.py` puts load on: continuous batching, one at a time, static batches, and a plain diffusers server.

All take the same `Ask`s, hold the same number of requests, and run on threads of this process.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import fewstep
from fewstep.errors import QueueFullError

OUTSTANDING = 96
STATIC_BATCH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request of the load: what a pipeline is called with."""

    prompt: str
    seed: int
    steps: int
    sampler: str
    guidance: float
    size: tuple[int, int]

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

    def __init__(self, pipeline: fewstep.Pipeline, sizes: list[tuple[int, int]]) -> None:
        self.server = fewstep.Server(
            pipeline, sizes=sizes, most_slots=OUTSTANDING, queue=0, most_work_s=1e6, most_rows=8
        )
        self._tickets: set[Any] = set()

    def submit(self, ask: Ask, done: Done) -> bool:
        options = {"seed": ask.seed, "steps": ask.steps, "sampler": ask.sampler, "guidance": ask.guidance}
        try:
            ticket = self.server.submit(ask.prompt, size=ask.size, **options)
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


class Queued:
    """A thread that serves a queue in order of arrival: `make` gets the requests of one batch."""

    def __init__(self, name: str, make: Callable[[list[Ask]], None], *, batch: int = 1) -> None:
        self.name, self._make, self._batch = name, make, batch
        self._waiting: deque[tuple[Ask, Done]] = deque()
        self._changed = threading.Condition()
        self._closing, self._running = False, False
        self._busy_s, self._images = 0.0, 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, ask: Ask, done: Done) -> bool:
        with self._changed:
            if len(self._waiting) >= OUTSTANDING:
                return False
            self._waiting.append((ask, done))
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
            self._make([ask for ask, _ in batch])
            self._busy_s += time.perf_counter() - began
            self._images += len(batch)
            for _, done in batch:
                done(True)

    def _take(self) -> list[tuple[Ask, Done]]:
        """The oldest request, and those that wait and are of its kind."""
        kind = self._waiting[0][0].kind
        batch = [w for w in self._waiting if w[0].kind == kind][: self._batch]
        for taken in batch:
            self._waiting.remove(taken)
        return batch


def pipeline_maker(pipeline: fewstep.Pipeline) -> Callable[[list[Ask]], None]:
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


def diffusers_maker(checkpoint: str, threads: int) -> Callable[[list[Ask]], None]:
    """A request as one call of diffusers' own pipeline, in float32, with the scheduler that the sampler stands for."""
    import diffusers
    import torch
    from fewstep.schedules.solvers.registry import SAMPLERS

    torch.set_num_threads(threads)
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    pipe = diffusers.DiffusionPipeline.from_pretrained(checkpoint, torch_dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    config = pipe.scheduler.config

    def make(asks: list[Ask]) -> None:
        for ask in asks:
            pipe.scheduler = getattr(diffusers, str(SAMPLERS[ask.sampler].diffusers)).from_config(config)
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
