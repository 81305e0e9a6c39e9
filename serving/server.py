"""`fewstep.Server`: many callers, one pipeline; their requests share every evaluation of the UNet."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Unpack

from ..bundle import Bundle
from ..engines.backends.registry import load_backend, makes_in_memory
from ..engines.base import Engine
from ..engines.parallel import ParallelEngine
from ..errors import (
    ArgumentError,
    EngineFailedError,
    FewstepError,
    UnavailableError,
    UnsupportedError,
)
from ..runtime.arrays import Shape
from ..runtime.keywords import CallArguments, LoadOptions
from ..runtime.library import open_bundle
from ..runtime.loader import load
from ..runtime.pipeline import Pipeline
from ..runtime.prepare import Prepared, latent_shape
from ..runtime.request import Request, check_among, check_integer, check_size
from ..runtime.result import Result
from ..runtime.second_pass import SecondPass, TwoPasses, plan_passes
from .coders import Coders
from .cpu_lock import CpuLock
from .observe import Counters, Observer, ServerStats
from .room import Held, Room, kept
from .scheduler import Scheduler
from .ticket import Ticket
from .warm_up import make_pools

log = logging.getLogger("fewstep.serving")
WATCH_S = 0.1


class SubmitArguments(CallArguments, total=False):
    """What `Server.submit` takes beside the prompt."""

    deadline_s: float | None
    previews: bool
    name: str | None
    owner: str | None
    second: SecondPass | None


class Server:
    """Serves a pipeline to many callers: continuous batching over slots, bounded, with deadlines.

    pipeline: a `Pipeline`, or what `fewstep.load` takes (then `options` are that's). sizes: (width, height) in pixels
    that requests may ask for; the pipeline's own by default. most_slots: images in progress by size. buckets: row
    counts to evaluate with (default: those of 1, 2, 3, 4, 6, 8, 12, 16 up to `most_rows` that the engine admits and
    that are worth it, measured); a single one makes an image's bits independent of its company. row_threads: threads
    among which the rows of an evaluation are split, on a CPU; one a core when the pipeline was loaded with
    `threads=1`, else one. queue: images accepted beyond the slots. most_work_s: seconds of work accepted ahead of a
    request. (An eighth on top of slots, queue and work is kept for requests that are short beside what is there.)
    hung_s: after a tick of that length the engine counts as failed. image: warm the VAE's encoder too.

    Everything is warm when the constructor returns. Thread-safe. A context manager: leaving it drains and closes.
    """

    def __init__(
        self,
        pipeline: Pipeline | Bundle | str | os.PathLike[str],
        *,
        sizes: Sequence[tuple[int, int]] | None = None,
        most_slots: int = 32,
        most_rows: int = 16,
        buckets: Sequence[int] | None = None,
        row_threads: int | None = None,
        queue: int = 64,
        most_work_s: float = 60.0,
        hung_s: float = 60.0,
        image: bool = False,
        observer: Observer | None = None,
        **options: Unpack[LoadOptions],
    ) -> None:
        if isinstance(pipeline, Pipeline) and options:
            raise ArgumentError(f"{', '.join(options)} given beside a pipeline", expected="them given to fewstep.load")
        if "devices" in options:
            raise ArgumentError("a server was asked for several devices", expected="a server for each")
        refuse_clips(pipeline.bundle if isinstance(pipeline, Pipeline) else pipeline)
        self.pipeline: Pipeline = pipeline if isinstance(pipeline, Pipeline) else load(pipeline, **options)
        self.most_slots = check_integer("most_slots", most_slots, 1, 4096)
        self._queue = check_integer("queue", queue, 0, 1_000_000)
        self._most_work_s, self._hung_s = _positive("most_work_s", most_work_s), _positive("hung_s", hung_s)
        self.sizes = tuple(dict.fromkeys(check_size(self.pipeline.bundle, s) for s in sizes or [self.pipeline.size]))
        self._counters = Counters(observer)
        unet, ways = self.pipeline.engines["unet"], _ways(self.pipeline, row_threads)
        self._ways = ways
        self._split: dict[int, ParallelEngine] = {}
        self._cpu = CpuLock(used=unet.device == "cpu" and ways == 1)
        self._pools, self._estimates = make_pools(
            self.pipeline,
            self._in_parallel,
            self.sizes,
            slots=self.most_slots + kept(self.most_slots),
            rows=_candidates(buckets, check_integer("most_rows", most_rows, 1, 1024)),
            fixed=buckets is not None,
            image=image,
        )
        self._state = "ready"
        self._lock = threading.Condition()
        self._room = Room(images=self.most_slots + self._queue, work_s=self._most_work_s)
        self._outstanding: dict[Ticket, Held] = {}
        self._accepted = 0
        self._scheduler = Scheduler(
            self.pipeline,
            self._pools,
            most_slots=self.most_slots,
            estimates=self._estimates,
            finished=lambda job: self._coders.decode(job),
            failed=self._engine_failed,
            observer=self._counters,
            cpu=self._cpu,
        )
        self._coders = Coders(
            self.pipeline,
            most_images=self.most_slots,
            estimates=self._estimates,
            prepared=self._scheduler.put,
            failed=self._engine_failed,
            observer=self._counters,
            cpu=self._cpu,
        )
        self._stop = threading.Event()
        self._watch = threading.Thread(target=self._watch_over, name="fewstep-watch", daemon=True)
        self._scheduler.start()
        self._watch.start()

    def __repr__(self) -> str:
        sizes = ", ".join(f"{w}x{h}" for w, h in self.sizes)
        return f"<Server of {self.pipeline.bundle.name!r}: {sizes}, {self.state}, {len(self._outstanding)} outstanding>"

    @property
    def state(self) -> str:
        """`"ready"`, `"swapping"`, `"draining"`, `"failed"` or `"closed"`."""
        return self._state

    @property
    def ready(self) -> bool:
        return self._state == "ready"

    def submit(
        self,
        prompt: str | Sequence[str],
        *,
        deadline_s: float | None = None,
        previews: bool = False,
        name: str | None = None,
        owner: str | None = None,
        second: SecondPass | None = None,
        **options: Unpack[CallArguments],
    ) -> Ticket:
        """Accept a request; returns at once.

        Takes what a pipeline's call takes, and `deadline_s`: seconds from now after which it ends with
        `DeadlineError`. previews: its steps can show what they see. name: for logs. owner: whose it is; one caller's
        requests take three quarters of the room at most. second: a second pass, as `in_two_passes` makes it, of one of
        the server's sizes.

        Raises `ArgumentError` for what is wrong with it, `QueueFullError` when there is too much work already and
        `UnavailableError` when the server is draining, closed or failed.
        """
        arrival = time.monotonic()  # making the request is a part of the work
        about: dict[str, Any] = {"deadline_s": deadline_s, "previews": previews, "name": name, "owner": owner}
        if second is None:
            return self.submit_request(self.request(prompt, **options), arrival=arrival, **about)
        self._check_open()
        with self._counting_refusals():
            passes = plan_passes(self.pipeline, prompt, second, options, sizes=self.sizes)
        return self.submit_request(passes.first, passes=passes, arrival=arrival, **about)

    def _in_parallel(self, engine: Engine) -> Engine:
        """The engine with its rows evaluated in parallel, where that pays: the same for the same engine."""
        if self._ways < 2 or isinstance(engine, ParallelEngine):
            return engine
        if id(engine) not in self._split:
            self._split[id(engine)] = ParallelEngine(engine, ways=self._ways)
        return self._split[id(engine)]

    def request(self, prompt: str | Sequence[str], **options: Unpack[CallArguments]) -> Request:
        """What a call means, checked, for `submit_request`; its pictures have the size that the model takes.

        Raises `ArgumentError`, and `UnavailableError` when the server is draining, closed or failed.
        """
        self._check_open()
        with self._counting_refusals():
            return self.pipeline.request(prompt, sizes=self.sizes, **options)

    def submit_request(
        self,
        request: Request,
        *,
        passes: TwoPasses | None = None,
        prepare: Callable[[], Prepared] | None = None,
        deadline_s: float | None = None,
        previews: bool = False,
        name: str | None = None,
        owner: str | None = None,
        arrival: float | None = None,
    ) -> Ticket:
        """As `submit`, for a request that was made before.

        passes: the call whose first request it is, where it has two. prepare: called on the encode thread in place of
        `Pipeline.prepare`, for noise or latents of the caller's own. arrival: when it was asked for, in seconds
        of `time.monotonic`; now by default.
        """
        self._check_open()
        if deadline_s is not None:
            _positive("deadline_s", deadline_s)
        with self._counting_refusals():
            each = [(r, *self.check(r)) for r in (request, *([passes.checked] if passes else []))]
        work_s = sum(self._estimates.work_s(*one) for one in each)
        alone_s, *later_s = (self._estimates.alone_s(*one) for one in each)
        about: dict[str, Any] = {"previews": previews, "name": name, "arrival": arrival, "passes": passes}
        ticket = Ticket(request, deadline_s=deadline_s, alone_s=alone_s + sum(later_s), second_s=sum(later_s), **about)
        held = Held(images=request.images, work_s=work_s, owner=owner)
        with self._lock:
            self._check_open()
            ticket.short = self._admit(held)
            self._outstanding[ticket] = held
            self._accepted += 1
        ticket.on_done(self._settled)
        self._coders.encode(ticket, prepare)
        return ticket

    def generate(self, prompt: str | Sequence[str], **options: Unpack[SubmitArguments]) -> Result:
        """Submit and wait; options as `submit`'s."""
        return self.submit(prompt, **options).result()

    async def agenerate(self, prompt: str | Sequence[str], **options: Unpack[SubmitArguments]) -> Result:
        """Submit and wait, for asyncio; cancelling the task cancels the request."""
        return await self.submit(prompt, **options)

    def stats(self) -> ServerStats:
        with self._lock:
            work_s, outstanding = sum(h.work_s for h in self._outstanding.values()), len(self._outstanding)
        outcomes, counters, factor = self._counters.outcomes, self._counters, self.pipeline.bundle.latent.factor
        known = {n: outcomes.get(n, 0) for n in ("ok", "CancelledError", "DeadlineError")}
        return ServerStats(
            state=self._state,
            accepted=self._accepted,
            rejected=sum(counters.rejections.values()),
            finished=known["ok"],
            failed=sum(outcomes.values()) - sum(known.values()),
            cancelled=known["CancelledError"],
            late=known["DeadlineError"],
            outstanding=outstanding,
            waiting=self._scheduler.waiting,
            slots_in_use=self._scheduler.slots_in_use,
            most_slots=self.most_slots,
            ticks=counters.ticks,
            rows=counters.rows,
            padding=counters.padding,
            tick_s=1e-3 * counters.tick_ms,
            work_s=work_s,
            buckets={f"{w * factor}x{h * factor}": b.costs_ms for (_, h, w), (_, b) in self._pools.items()},
        )

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests and wait for those accepted; whether all are settled."""
        with self._lock:
            if self._state in {"ready", "swapping"}:
                self._state = "draining"
            return self._lock.wait_for(lambda: not self._outstanding, timeout)

    def load_weights(self, bundle: Any = None, *, loras: Any = None, gate: bool = True) -> dict[str, float]:
        """`Pipeline.load_weights` between requests: those accepted are finished first, others meanwhile are refused."""
        with self._lock:
            self._check_open()
            self._state = "swapping"
            self._lock.wait_for(lambda: not self._outstanding)
        try:
            return self.pipeline.load_weights(bundle, loras=loras, gate=gate)
        finally:
            with self._lock:
                if self._state == "swapping":
                    self._state = "ready"

    def give_up(self) -> None:
        """Take no more requests, and fail what is not settled with `UnavailableError`, without waiting."""
        with self._lock:
            if self._state != "closed":
                self._state = "draining"
        self._fail_all(UnavailableError("the server was closed before the request was finished"))

    def close(self) -> None:
        """End at once: what is not settled fails with `UnavailableError`."""
        with self._lock:
            if self._state == "closed":
                return
            self._state = "closed"
        self.give_up()
        self._stop.set()
        self._scheduler.close(timeout=self._hung_s)
        self._coders.close(timeout=self._hung_s)
        self._watch.join()
        for parallel in self._split.values():
            parallel.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.drain()
        self.close()

    def _check_open(self) -> None:
        if self._state == "failed":
            raise EngineFailedError("the engine has failed", remedy="Restart the server.")
        if self._state != "ready":
            raise UnavailableError(f"the server is {self._state}")

    def check(self, request: Request) -> tuple[Shape, int]:
        """The request's latent shape and the UNet rows of an image; `ArgumentError` if this server does not take it."""
        shape = latent_shape(self.pipeline.bundle, request)
        check_among((request.width, request.height), self.sizes, own=request.own_size)
        if request.images > self.most_slots:
            raise ArgumentError(f"{request.images} images in one request", expected=f"at most {self.most_slots}")
        rows = 2 if request.guided and not self.pipeline.bundle.guidance_embedding else 1
        if rows > self._pools[shape][1].most_rows:
            raise ArgumentError("guidance takes two rows of the UNet", expected="guidance of at most 1 on this server")
        return shape, rows

    def check_room(self) -> None:
        """`QueueFullError` or `UnavailableError` where not even a short request is taken: ask before reading one."""
        with self._lock:
            self._check_open()
            self._admit(Held(images=1, work_s=0.0))

    def _admit(self, held: Held) -> bool:
        """Whether there is room, and the request is short; `QueueFullError` where there is none."""
        with self._counting_refusals():
            return self._room.admit(held, self._outstanding.values())

    @contextmanager
    def _counting_refusals(self) -> Iterator[None]:
        try:
            yield
        except FewstepError as error:
            self._counters.rejected(type(error).__name__)
            raise

    def _settled(self, ticket: Ticket) -> None:
        error = ticket.error
        outcome = "ok" if error is None else type(error).__name__
        self._counters.ended(outcome, 1e3 * (time.monotonic() - ticket.arrival))
        with self._lock:
            self._outstanding.pop(ticket, None)
            self._lock.notify_all()

    def _engine_failed(self, error: FewstepError) -> None:
        with self._lock:
            if self._state != "closed":
                self._state = "failed"
        self._fail_all(error)

    def _fail_all(self, error: FewstepError) -> None:
        for ticket in list(self._outstanding):
            ticket.fail(error)

    def _watch_over(self) -> None:
        """Expire what is too late wherever it is, and notice a tick that does not come back."""
        while not self._stop.wait(WATCH_S):
            now = time.monotonic()
            with self._lock:
                tickets = list(self._outstanding)
            for ticket in tickets:
                if ticket.expired(now):
                    ticket.expire()
            age_s = self._scheduler.tick_age_s
            if age_s > self._hung_s and self._state in {"ready", "draining"}:
                log.error("a tick has been running for %.1f s: the engine is taken out of service", age_s)
                self._engine_failed(EngineFailedError(f"an evaluation has been running for {age_s:.1f} s"))


def refuse_clips(source: Bundle | str | os.PathLike[str]) -> None:
    """Raise `UnsupportedError` for a bundle that makes clips: whoever waits behind one waits for minutes."""
    bundle = open_bundle(source)
    if bundle.model.clips:
        raise UnsupportedError(
            f"the bundle {bundle.name!r} makes clips",
            expected="one that makes pictures, for a server",
            remedy="Make clips with: fewstep run BUNDLE --image FILE",
        )


def _ways(pipeline: Pipeline, asked: int | None) -> int:
    """Parts of the UNet's rows that are evaluated at once; by default one a core for engines of one thread."""
    if asked is not None:
        return check_integer("row_threads", asked, 1, 1024)
    name = pipeline.engines["unet"].backend
    alone = pipeline.threads == 1 and not makes_in_memory(name) and load_backend(name).splits_rows
    return (os.cpu_count() or 1) if alone else 1


def _candidates(buckets: Sequence[int] | None, most_rows: int) -> list[int]:
    if buckets is None:
        return [r for r in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64) if r <= most_rows]
    return sorted({check_integer("buckets", b, 1, 1024) for b in buckets})


def _positive(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ArgumentError(f"{name} is {value!r}", expected="a positive number")
    return float(value)
