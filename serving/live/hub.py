"""The live sessions of a server: how many there may be, and figures about them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from ...errors import FewstepError, UnavailableError
from ...runtime.request import check_integer
from ..server import Server
from .frames import Frame
from .session import LiveSession


class LiveObserver(Protocol):
    """Gets every frame's fate, from several threads. It must be quick and must not raise."""

    def frame(self, latency_ms: float) -> None: ...

    def lost(self, reason: str) -> None:
        """An input without a frame: `"unchanged"`, or the name of an error's type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HubStats:
    """sessions: open now; opened, refused: since the start. The others are sums over all sessions there were."""

    sessions: int
    opened: int
    refused: int
    frames: int
    unchanged: int
    failed: int
    fps: float


class LiveHub:
    """Opens sessions on a server, at most `most_sessions` at a time.

    server: the `Server`, or a function that gives it for a session's life and raises `UnavailableError` while there is
    none.
    """

    def __init__(
        self,
        server: Server | Callable[[], AbstractContextManager[Server]],
        *,
        most_sessions: int = 8,
        observer: LiveObserver | None = None,
    ) -> None:
        self._server: Callable[[], AbstractContextManager[Server]] = (
            (lambda: nullcontext(server)) if isinstance(server, Server) else server
        )
        self.most_sessions = check_integer("most_sessions", most_sessions, 0, 10_000)
        self._observer = observer
        self._sessions: dict[LiveSession, ExitStack] = {}
        self._lock = threading.Lock()
        self._opening = self._opened = self._refused = self._frames = self._unchanged = self._failed = 0

    def open(self, on_event: Callable[[Frame | FewstepError | int], object], **settings: Any) -> LiveSession:
        """A new session; `UnavailableError` when there are too many or the server is not ready."""
        with self._lock:
            full = len(self._sessions) + self._opening >= self.most_sessions
            self._refused += full
            self._opening += not full
        if full:
            raise UnavailableError(
                f"{self.most_sessions} live sessions are open", expected="fewer", remedy="Try again later."
            )

        def observed(event: Frame | FewstepError | int) -> None:
            self._observe(event)
            on_event(event)

        session, holding = None, ExitStack()
        try:
            server = holding.enter_context(self._server())
            if not server.ready:
                raise UnavailableError(f"the server is {server.state}")
            session = LiveSession(server, on_event=observed, **settings)
        finally:
            with self._lock:
                self._opening -= 1
                if session is not None:
                    self._sessions[session] = holding
                    self._opened += 1
            if session is None:
                holding.close()
        return session

    def release(self, session: LiveSession) -> None:
        """Close a session."""
        session.close()
        with self._lock:
            holding = self._sessions.pop(session, None)
        if holding is not None:
            holding.close()

    def close(self) -> None:
        """Close all sessions."""
        for session in list(self._sessions):
            self.release(session)

    def stats(self) -> HubStats:
        with self._lock:
            sessions = list(self._sessions)
        return HubStats(
            sessions=len(sessions),
            opened=self._opened,
            refused=self._refused,
            frames=self._frames,
            unchanged=self._unchanged,
            failed=self._failed,
            fps=sum(s.stats().fps for s in sessions),
        )

    def _observe(self, event: Frame | FewstepError | int) -> None:
        with self._lock:
            self._frames += isinstance(event, Frame)
            self._unchanged += isinstance(event, int)
            self._failed += isinstance(event, FewstepError)
        if self._observer is None:
            return
        if isinstance(event, Frame):
            self._observer.frame(event.latency_ms)
        else:
            self._observer.lost("unchanged" if isinstance(event, int) else type(event).__name__)
