"""The service behind the application: a server that is being loaded, is there, or has failed to load."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from ...errors import FewstepError, UnavailableError
from ..server import Server

log = logging.getLogger("fewstep.serving")


class Service:
    """Loads a server on a thread of its own, so that health can be asked for meanwhile.

    `load` makes the server and is called once, by `start`.
    """

    def __init__(self, load: Callable[[], Server]) -> None:
        self._load = load
        self._server: Server | None = None
        self._error: FewstepError | None = None
        self._draining = False
        self._loaded = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fewstep-load", daemon=True)

    def start(self) -> None:
        if not self._thread.is_alive() and not self._loaded.is_set():
            self._thread.start()

    def wait(self, timeout: float | None = None) -> Server:
        """The server, once it is loaded; raises what went wrong with that."""
        if not self._loaded.wait(timeout):
            raise UnavailableError("the server is starting")
        return self.server

    @property
    def server(self) -> Server:
        """The server; `UnavailableError` while it is starting, and what went wrong if it could not be loaded."""
        if self._error is not None:
            raise UnavailableError("the model could not be loaded") from self._error
        if self._server is None:
            raise UnavailableError("the server is starting")
        return self._server

    @property
    def error(self) -> FewstepError | None:
        return self._error

    @property
    def state(self) -> str:
        """`"starting"`, `"ready"`, `"draining"`, `"failed"` or `"closed"`."""
        if self._error is not None:
            return "failed"
        if self._draining and (self._server is None or self._server.state == "ready"):
            return "draining"
        return "starting" if self._server is None else self._server.state

    def drain(self, timeout: float) -> bool:
        """Take no more requests and wait for those in progress."""
        self._draining = True
        return self._server is None or self._server.drain(timeout)

    def give_up(self) -> None:
        """Refuse what is not finished, with `UnavailableError`; nobody waits for what is being computed."""
        if self._server is not None:
            self._server.give_up()

    def close(self) -> None:
        if self._server is not None:
            self._server.close()

    def _run(self) -> None:
        try:
            self._server = self._load()
        except FewstepError as error:
            self._error = error
        except Exception as error:
            log.exception("the model could not be loaded")
            self._error = FewstepError(f"the model could not be loaded ({type(error).__name__})")
        finally:
            self._loaded.set()
