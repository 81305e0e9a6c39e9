"""Models of one process: loaded when they are asked for, within a budget of bytes, least recently used first out."""

from __future__ import annotations

import gc
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Protocol

from ..errors import ArgumentError, FewstepError, UnavailableError
from .server import Server

log = logging.getLogger("fewstep.serving")
STATES = ("resident", "leaving", "loading", "out")
RETRIED_AFTER_S = 60.0
"""A model that could not be loaded is tried again after so long, or when that is asked for by name."""
LOOKED_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model that a process can have.

    load: makes its server. nbytes: memory while it is resident. sizes: (width, height) in pixels that it makes, if they
    are known before it is loaded. pictures: that an image may come with, for controls or as prompts.
    """

    name: str
    load: Callable[[], Server]
    nbytes: int = 0
    sizes: tuple[tuple[int, int], ...] = ()
    pictures: int = 0


class ResidentObserver(Protocol):
    """Is told what becomes of models, from several threads."""

    def model_used(self, name: str, *, resident: bool) -> None:
        """A request asked for a model that is, or is not, resident."""

    def model_loaded(self, name: str, took_ms: float) -> None:
        """A model was loaded, in so many milliseconds, those included in which others made room for it."""

    def model_left(self, name: str) -> None:
        """A model made room, or was unloaded."""


class Lease:
    """A model that stays loaded until this is closed, once `future` is done; a context manager that closes it."""

    def __init__(self, place: _Residence, changed: threading.Condition) -> None:
        self._place, self._changed = place, changed
        self._server: Server | None = None
        self.future: Future[None] = Future()
        self.future.set_running_or_notify_cancel()

    def begin(self) -> None:
        """The model is there, and stays (for the one who loads it, who holds the lock)."""
        self._server, self._place.used = self._place.server, time.monotonic()
        self._place.holds += 1

    @property
    def server(self) -> Server:
        self.future.result(0)  # raises what went wrong
        if self._server is None:
            raise UnavailableError("the lease has ended")
        return self._server

    def close(self) -> None:
        with self._changed:
            if self in self._place.waiting:
                self._place.waiting.remove(self)
            if self._server is not None:
                self._server = None
                self._place.holds -= 1
                self._changed.notify_all()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(slots=True)
class _Residence:
    model: ServedModel
    listed: bool = True
    server: Server | None = None
    leaving: bool = False
    loading: bool = False
    used: float = 0.0
    holds: int = 0
    pins: int = 0
    waiting: list[Lease] = field(default_factory=list)
    error: FewstepError | None = None
    failed_at: float = 0.0


class Residents:
    """Which models are loaded. Thread-safe; loading and unloading are done one after the other, on a thread of its own.

    budget: bytes that the resident ones may take together, by what each says of itself; `None`: no bound. A model that
    is to make room finishes what it has accepted; meanwhile its requests wait until it is loaded again. A model that is
    pinned (by a live session) makes room for none.
    """

    def __init__(
        self, models: Sequence[ServedModel], *, budget: int | None = None, observer: ResidentObserver | None = None
    ) -> None:
        self._places = {m.name: _Residence(m) for m in models}
        if len(self._places) < len(models) or not models:
            names = ", ".join(sorted(m.name for m in models)) or "none"
            raise ArgumentError(f"models named {names}", expected="one or more, each with a name of its own")
        _check_fits(max(models, key=lambda m: m.nbytes), budget)
        self.budget, self._observer = budget, observer
        self._changed = threading.Condition()
        self._jobs: queue.SimpleQueue[tuple[str, str, Future[None]] | None] = queue.SimpleQueue()
        self._pending: dict[tuple[str, str], Future[None]] = {}
        self._refusing = self._closed = False
        self._thread = threading.Thread(target=self._run, name="fewstep-models", daemon=True)

    def start(self) -> list[Future[None]]:
        """Begin, with those models that fit together, in their order; what is done when each is there."""
        taken, first = 0, []
        for name, place in self._places.items():
            taken += place.model.nbytes
            if self.budget is not None and taken > self.budget:
                break
            first.append(self.load(name))
        self._thread.start()
        return first

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(n for n, p in tuple(self._places.items()) if p.listed)

    def offer(self, model: ServedModel) -> None:
        """Have a model more, or again after `withdraw`; `ArgumentError` for one that the budget does not take."""
        _check_fits(model, self.budget)
        with self._changed:
            place = self._places.setdefault(model.name, _Residence(model))
            place.listed = True
            if place.server is None and not place.loading:
                place.model, place.error = model, None

    def withdraw(self, name: str) -> None:
        """List a model no more, unless it is loaded or about to be; what waits for it is served all the same."""
        with self._changed:
            place = self._places[name]
            place.listed = place.server is not None or place.loading

    @property
    def with_pictures(self) -> bool:
        """Whether a model says that its requests may come with pictures of controls or as prompts."""
        return any(p.model.pictures for p in tuple(self._places.values()))

    def model(self, name: str) -> ServedModel:
        return self._places[name].model

    def servers(self) -> Mapping[str, Server]:
        """Those that are resident."""
        with self._changed:
            return {n: p.server for n, p in self._places.items() if p.server is not None}

    @property
    def nbytes(self) -> int:
        """What the resident models take together, by what each says of itself."""
        with self._changed:
            return sum(p.model.nbytes for p in self._places.values() if p.server is not None)

    def state(self, name: str) -> str:
        """One of `STATES`."""
        place = self._places[name]
        if place.server is not None:
            return "leaving" if place.leaving else "resident"
        return "loading" if place.loading else "out"

    def error(self, name: str) -> FewstepError | None:
        """Why the model could not be loaded when that was tried last."""
        return self._places[name].error

    @contextmanager
    def hold(self, name: str, *, pin: bool = False) -> Iterator[Server]:
        """The model's server, which stays within; `UnavailableError` where the model is not resident."""
        with self._changed:
            place = self._places[name]
            if place.server is None or place.leaving:
                raise UnavailableError(f"the model {name!r} is not loaded now", remedy="Try again later.")
            server, place.used = place.server, time.monotonic()
            place.holds += 1
            place.pins += pin
        try:
            yield server
        finally:
            with self._changed:
                place.holds -= 1
                place.pins -= pin
                self._changed.notify_all()

    def lease(self, name: str) -> Lease:
        """A lease of the model for a request, which is loaded first where it is not resident."""
        place = self._places[name]
        lease = Lease(place, self._changed)
        with self._changed:
            resident = place.server is not None and not place.leaving
            if resident:
                lease.begin()
            else:
                place.waiting.append(lease)
        if self._observer is not None:
            self._observer.model_used(name, resident=resident)
        if resident:
            _settle(lease.future, None)
        elif (refused := self.load(name)).done() and (error := refused.exception()) is not None:
            _settle(lease.future, error)
        return lease

    def load(self, name: str) -> Future[None]:
        """Have the model loaded, if it is not; done when it is there. Fails with what went wrong."""
        return self._ask("load", name)

    def unload(self, name: str) -> Future[None]:
        """Have the model finish what it has accepted, and leave; done when it is gone."""
        return self._ask("unload", name)

    def failed_lately(self, name: str) -> bool:
        """Whether the model could not be loaded, so short a time ago that it is not tried again for a request."""
        place = self._places[name]
        return place.error is not None and time.monotonic() - place.failed_at < RETRIED_AFTER_S

    def refuse(self) -> None:
        """Load nothing from now on; `UnavailableError` to those who wait for it."""
        with self._changed:
            self._refusing = True
            waiting = [*self._pending.values(), *(lease.future for p in self._places.values() for lease in p.waiting)]
        for future in waiting:
            _settle(future, UnavailableError("the server is draining"))

    def close(self) -> None:
        """End every server at once, and the thread."""
        self.refuse()
        with self._changed:
            self._closed = True
            servers = [p.server for p in self._places.values() if p.server is not None]
            self._changed.notify_all()
        self._jobs.put(None)
        for server in servers:
            server.close()

    def _ask(self, kind: str, name: str) -> Future[None]:
        with self._changed:
            known = self._pending.get((kind, name))
            if known is not None:
                return known
            future: Future[None] = Future()
            future.set_running_or_notify_cancel()
            if self._refusing:
                future.set_exception(UnavailableError("the server is draining"))
                return future
            self._pending[kind, name] = future
            self._places[name].loading = kind == "load"
            self._jobs.put((kind, name, future))
            return future

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            kind, name, future = job
            error: FewstepError | None = None
            try:
                if self._refusing:
                    raise UnavailableError("the server is draining")
                if kind == "load":
                    self._load(self._places[name])
                else:
                    self._leave(self._places[name])
            except FewstepError as told:
                error = told
            except BaseException as unexpected:  # libraries in Rust raise what is no Exception: the thread outlives it
                log.exception("the model %s could not be loaded", name)
                error = FewstepError(f"the model could not be loaded ({type(unexpected).__name__})")
            self._done(kind, name, error)
            _settle(future, error)

    def _done(self, kind: str, name: str, error: FewstepError | None) -> None:
        place = self._places[name]
        with self._changed:
            self._pending.pop((kind, name), None)
            place.loading = ("load", name) in self._pending
            leases: list[Lease] = []
            if kind == "load":
                # that there is no room now says nothing of the model
                place.error, place.failed_at = None if type(error) is UnavailableError else error, time.monotonic()
                leases, place.waiting = place.waiting, []
                for lease in leases if error is None else ():
                    lease.begin()
        for lease in leases:
            _settle(lease.future, error)
        if error is not None:
            log.warning("the model %s: %s", name, error)

    def _load(self, place: _Residence) -> None:
        began = time.monotonic()
        if place.server is not None:
            if place.server.state != "failed":
                return
            self._leave(place)
        self._make_room(place.model.nbytes)
        server = place.model.load()
        with self._changed:
            closed = self._closed
            if not closed:
                place.server, place.used = server, time.monotonic()
        if closed:
            server.close()
        elif self._observer is not None:
            self._observer.model_loaded(place.model.name, 1e3 * (time.monotonic() - began))

    def _make_room(self, needed: int) -> None:
        """Have models leave, least recently used first, until so many bytes fit."""
        while self.budget is not None and self.nbytes + needed > self.budget:
            with self._changed:
                resident = [p for p in self._places.values() if p.server is not None and not p.pins]
            if not resident:
                raise UnavailableError(
                    "no model can make room: live sessions are open on all that are loaded", remedy="Try again later."
                )
            self._leave(min(resident, key=lambda p: p.used))

    def _leave(self, place: _Residence) -> None:
        """Have a model finish what it has accepted, and close its server."""
        server = place.server
        if server is None:
            return
        with self._changed:
            if place.pins:
                raise UnavailableError(
                    f"live sessions are open on {place.model.name!r}", remedy="Try again when they have ended."
                )
            place.leaving = True
            self._changed.wait_for(lambda: not place.holds or self._closed)
        while server.state in {"ready", "swapping", "draining"}:
            if server.drain(LOOKED_S) or self._closed:
                break
        server.close()
        with self._changed:
            place.server, place.leaving = None, False
        del server
        gc.collect()  # engines are large, and whether a cycle holds one is not left to chance
        if self._observer is not None:
            self._observer.model_left(place.model.name)


def _check_fits(model: ServedModel, budget: int | None) -> None:
    if budget is not None and model.nbytes > budget:
        raise ArgumentError(
            f"{model.name!r} takes {model.nbytes} bytes", expected=f"at most the budget of {budget} bytes"
        )


def _settle(future: Future[None], error: BaseException | None) -> None:
    """Tell those who wait; the first to tell them is heard."""
    with suppress(InvalidStateError):
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
