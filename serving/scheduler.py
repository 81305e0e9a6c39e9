"""The scheduler: one thread that owns all slots, admits and ends requests between ticks, and ticks."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping

from ..errors import EngineFailedError, FewstepError
from ..runtime.arrays import Float32, Shape
from ..runtime.device.base import Slots
from ..runtime.pipeline import Pipeline
from .batch_sizes import BatchSizes
from .cpu_lock import CpuLock
from .estimates import Estimates
from .job import Job
from .observe import Observer
from .policy import Candidate, choose

log = logging.getLogger("fewstep.serving")


class Scheduler:
    """Takes jobs that are prepared, gives them back denoised.

    pools: slots and buckets by latent shape (C, h, w). `finished` gets a job whose latents are ready; `failed` gets
    the error once the engine has raised, after which nothing runs any more. Both are called on the tick thread.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        pools: Mapping[Shape, tuple[Slots, BatchSizes]],
        *,
        estimates: Estimates,
        finished: Callable[[Job], None],
        failed: Callable[[FewstepError], None],
        observer: Observer,
        cpu: CpuLock,
        most_slots: int,
    ) -> None:
        self._pipeline, self._pools, self._observer = pipeline, pools, observer
        self._estimates, self._finished, self._failed, self._cpu = estimates, finished, failed, cpu
        self._most_slots = most_slots
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._waiting: list[Job] = []
        self._active: list[Job] = []
        self._ticks = 0
        self._tick_began: float | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="fewstep-tick", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, job: Job) -> None:
        self._inbox.put(job)

    def wake(self) -> None:
        """Look at the tickets again: one was cancelled or is too late."""
        self._inbox.put(None)

    def close(self, timeout: float | None = None) -> None:
        self._closing = True
        self.wake()
        if self._thread.is_alive():
            self._thread.join(timeout)

    @property
    def ticks(self) -> int:
        return self._ticks

    @property
    def waiting(self) -> int:
        """Requests that are prepared and have no slot."""
        return len(self._waiting)

    @property
    def slots_in_use(self) -> int:
        return sum(len(j.slots) for j in list(self._active))

    @property
    def tick_age_s(self) -> float:
        """Seconds since the tick in progress began; 0 when there is none."""
        began = self._tick_began
        return 0.0 if began is None else time.monotonic() - began

    def _run(self) -> None:
        try:
            while not self._closing:
                self._receive(block=not self._active and not self._waiting)
                with self._cpu.tick():
                    self._receive(block=False)
                    self._drop_settled()
                    self._admit()
                    if self._active:
                        self._tick()
        except BaseException as error:  # a thread of the server outlives whatever a library raises
            log.exception("an evaluation failed: the engine is taken out of service")
            failure = EngineFailedError(f"an evaluation failed ({type(error).__name__})", remedy="Restart the server.")
            self._failed(failure)
        finally:
            self._tick_began = None

    def _receive(self, *, block: bool) -> None:
        """Take what came in; wait for it with `block`."""
        try:
            while True:
                job = self._inbox.get(block=block)
                block = False
                if job is not None:
                    self._waiting.append(job)
                elif self._closing:
                    return
        except queue.Empty:
            return

    def _drop_settled(self) -> None:
        """End what was cancelled, what is too late, and what failed elsewhere."""
        now = time.monotonic()
        for job in [*self._waiting, *self._active]:
            if job.ticket.expired(now):
                job.ticket.expire()
        self._waiting = [j for j in self._waiting if not j.ticket.done]
        for job in [j for j in self._active if j.ticket.done]:
            self._end(job)

    def _admit(self) -> None:
        """Give slots to who waits, earliest due first; nobody is overtaken because his request has many images.

        What there is beyond `most_slots` is for short requests.
        """
        if not self._waiting:
            return
        blocked: set[Shape] = set()
        for job in sorted(self._waiting, key=lambda j: self._candidate(j).due(1.0)):
            slots = self._pools[job.prepared.shape][0]
            free = len(slots.free) - (0 if job.ticket.short else slots.count - self._most_slots)
            if free < job.images or (job.prepared.shape in blocked and not job.ticket.short):
                blocked.add(job.prepared.shape)
                continue
            self._waiting.remove(job)
            job.admit(slots)
            self._active.append(job)
            self._observer.observe("queue", job.queue_ms)

    def _tick(self) -> None:
        by_candidate = {self._candidate(j): j for j in self._active}
        choice = choose(list(by_candidate), time.monotonic(), tick=self._ticks)
        chosen = [(by_candidate[c], by_candidate[c].behind[:n]) for c, n in choice.taken]
        slots, buckets = self._pools[chosen[0][0].prepared.shape]
        slot_ids = [job.slots[i] for job, images in chosen for i in images]
        previews: dict[int, Float32] = {}
        for job, images in chosen:
            previews |= job.preview_targets(images)
        self._tick_began = began = time.monotonic()
        slots.tick(slot_ids, previews or None, rows=choice.bucket)
        times = slots.take_times()  # on a GPU this waits for the evaluation
        self._tick_began = None
        took_ms = 1e3 * (time.monotonic() - began)
        self._ticks += 1
        rows = sum(job.rows * len(images) for job, images in chosen)
        if rows <= choice.bucket:
            buckets.observe(choice.bucket, took_ms)
        self._observer.tick(took_ms, rows=rows, bucket=max(rows, choice.bucket), slots=len(slot_ids))
        for job, _ in chosen:
            job.account(times)
            job.report(slots, self._pipeline.vae.preview)
            if job.done:
                self._collect(job, slots)

    def _collect(self, job: Job, slots: Slots) -> None:
        try:
            job.collect(slots)
        except FewstepError as error:
            job.ticket.fail(error)
        self._end(job)
        if not job.ticket.done:
            self._finished(job)

    def _end(self, job: Job) -> None:
        job.release(self._pools[job.prepared.shape][0])
        self._active.remove(job)

    def _candidate(self, job: Job) -> Candidate:
        shape = job.prepared.shape
        tail_s = self._estimates.decode_s(shape, job.images) + job.second_s
        return job.candidate(self._pools[shape][1], alone_s=job.ticket.alone_s, tail_s=tail_s, in_turn=self._cpu.used)
