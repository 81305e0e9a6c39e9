"""The service behind the application: models that are being loaded, are there, or have failed to load."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import asynccontextmanager, contextmanager, nullcontext

from ...errors import DeadlineError, FewstepError, QueueFullError, UnavailableError
from ...runtime.pictures.control import pictures_beside
from ..model_folder import ModelFolder
from ..resident import Lease, ResidentObserver, Residents, ServedModel
from ..server import Server

MOST_WAITING = 64
"""Requests that wait for models to be loaded; more are told to come again."""


class Service:
    """Loads servers on a thread of its own, so that health can be asked for meanwhile.

    models: what requests can name, the first being what they get where they name none; or what makes the one server
    that there is. budget: bytes of the models that are loaded at a time (see `Residents`). folder: where models lie
    that may be loaded beside those.
    """

    def __init__(
        self,
        models: Sequence[ServedModel] | Callable[[], Server],
        *,
        budget: int | None = None,
        observer: ResidentObserver | None = None,
        folder: ModelFolder | None = None,
    ) -> None:
        self.folder = folder
        listed = [ServedModel(name="model", load=models)] if callable(models) else models
        self.residents = Residents(listed, budget=budget, observer=observer)
        self.first = self.residents.names[0]
        self._draining = self._was_ready = False
        self._beginning: list[Future[None]] = []
        self._waiting = 0

    @property
    def others(self) -> tuple[str, ...]:
        """Names of the models beside the first."""
        return self.residents.names[1:]

    def start(self) -> None:
        if not self._beginning:
            self._beginning = self.residents.start()

    def wait(self, timeout: float | None = None) -> Server:
        """The first model's server, once all are loaded that fit; raises what went wrong with it."""
        wait(self._beginning, timeout)
        return self.server

    async def begun(self) -> None:
        """Wait until the models that fit at the start are there, or have failed to come."""
        if self._beginning:
            await asyncio.wait([asyncio.wrap_future(f) for f in self._beginning])

    @property
    def server(self) -> Server:
        """The first model's server; `UnavailableError` while it is not there, from what went wrong if that is why."""
        if self.error is not None:
            raise UnavailableError("the model could not be loaded") from self.error
        server = self.residents.servers().get(self.first)
        if server is None or not self._ready:
            raise UnavailableError(f"the model {self.first!r} is not loaded now" if self._ready else _STARTING)
        return server

    @property
    def error(self) -> FewstepError | None:
        """Why the first model could not be loaded at the start."""
        error = self._beginning[0].exception() if self._beginning and self._beginning[0].done() else None
        return error if isinstance(error, FewstepError) else None

    @property
    def _ready(self) -> bool:
        """Whether the models are there, or have been, that fit at the start."""
        if not self._was_ready and self._beginning:
            self._was_ready = all(f.done() for f in self._beginning) and self.error is None
        return self._was_ready

    @property
    def state(self) -> str:
        """`"starting"`, `"ready"`, `"draining"`, `"failed"` or `"closed"`: of all models, where one is loaded."""
        if self.error is not None:
            return "failed"
        states = {s.state for s in self.residents.servers().values()}
        if self._draining and states <= {"ready", "swapping", "draining"}:
            return "draining"
        if not self._ready:
            return "starting"
        return next((s for s in ("failed", "closed") if s in states), "ready")

    def sizes(self, name: str) -> tuple[tuple[int, int], ...]:
        """(width, height) in pixels that a model makes; `UnavailableError` where that is known once it is loaded."""
        known = self.residents.model(name).sizes
        return known or (self.server if name == self.first else self.residents.servers()[name]).sizes

    @property
    def takes_pictures(self) -> bool:
        """Whether one of the models takes control pictures or pictures as prompts, as far as that is known."""
        servers = self.residents.servers().values()
        return self.residents.with_pictures or any(pictures_beside(s.pipeline.bundle) for s in servers)

    @asynccontextmanager
    async def using(self, name: str, *, timeout: float) -> AsyncIterator[Server]:
        """A model's server, which stays loaded within; waits while it is being loaded.

        `UnavailableError` while the service starts, ends, or where the model cannot be loaded; `QueueFullError` where
        too many wait, `DeadlineError` after `timeout` seconds.
        """
        if self._draining:
            raise UnavailableError("the server is draining")
        if not self._ready:
            raise UnavailableError("the model could not be loaded" if self.error else _STARTING) from self.error
        if self.residents.state(name) != "resident":
            self._check_waiting(name)
        with self.residents.lease(name) as lease:
            if not lease.future.done():
                await self._loaded(lease, timeout)
            yield lease.server

    @contextmanager
    def pinned(self) -> Iterator[Server]:
        """The first model's server, which makes room for no other within; asks for it where it is not loaded."""
        if self._ready and not self._draining and self.residents.state(self.first) != "resident":
            self.residents.load(self.first)
        with self.residents.hold(self.first, pin=True) if self._ready else nullcontext(self.server) as server:
            yield server

    def _check_waiting(self, name: str) -> None:
        """Refuse to wait for a model that failed just now, or where too many wait."""
        if self.residents.failed_lately(name):
            raise UnavailableError("the model could not be loaded") from self.residents.error(name)
        if self._waiting >= MOST_WAITING:
            raise QueueFullError(
                f"{self._waiting} requests wait for models to be loaded",
                expected=f"at most {MOST_WAITING}",
                retry_after_s=5.0,
                remedy="Try again later.",
            )

    async def _loaded(self, lease: Lease, timeout: float) -> None:
        self._waiting += 1
        try:
            await asyncio.wait_for(asyncio.wrap_future(lease.future), timeout)
        except TimeoutError as error:
            raise DeadlineError(f"the model was not loaded after {timeout:.1f} s") from error
        except UnavailableError:
            raise
        except FewstepError as error:
            raise UnavailableError("the model could not be loaded") from error
        finally:
            self._waiting -= 1

    def drain(self, timeout: float) -> bool:
        """Take no more requests and wait for those in progress."""
        self._draining = True
        self.residents.refuse()
        ending = time.monotonic() + timeout
        servers = self.residents.servers().values()
        for server in servers:
            server.drain(0.0)
        return all(s.drain(max(0.0, ending - time.monotonic())) for s in servers)

    def give_up(self) -> None:
        """Refuse what is not finished, with `UnavailableError`; nobody waits for what is being computed."""
        for server in self.residents.servers().values():
            server.give_up()

    def close(self) -> None:
        self.residents.close()


_STARTING = "the server is starting"
