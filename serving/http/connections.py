"""Connections under bounds: how many, how long a request may take to arrive, and how long an answer to be taken.

uvicorn has a timeout for the time between two requests alone. Here a connection whose request is not whole in time is
closed, as is one whose peer does not read, and a new connection beyond the most there may be takes the place of the one
that has waited longest without a whole request. So idle connections, however many, keep nobody out.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ...errors import ArgumentError

log = logging.getLogger("fewstep.serving.http")
KEPT_FREE = 64
"""Files that a process needs beside its connections: the model, sockets that listen, pipes, what libraries open."""
LOGGED_EVERY_S = 1.0


@dataclass(kw_only=True)
class ConnectionLimits:
    """most: connections at once. request_s: from a request's first byte (or a connection's making) to its last, and a
    second more for every `bytes_per_s` that came. answer_s: how long a peer may leave an answer unread.
    """

    most: int
    request_s: float = 10.0
    bytes_per_s: float = 64 * 1024
    answer_s: float = 20.0
    open: dict[BoundedProtocol, float] = field(default_factory=dict)
    closed: int = 0
    _logged_at: float = -LOGGED_EVERY_S

    def __post_init__(self) -> None:
        if self.most < 1 or min(self.request_s, self.bytes_per_s, self.answer_s) <= 0:
            raise ArgumentError(f"connection limits {self.most}, {self.request_s}, {self.answer_s}", expected="above 0")

    def admit(self, connection: BoundedProtocol) -> None:
        """Count a new connection; the one that waits longest without a whole request goes if there are too many."""
        if len(self.open) >= self.most:
            idle = next((c for c in self.open if not c.busy), connection)
            idle.give_up("there are more connections than are kept")
            self.open.pop(idle, None)
            if idle is connection:
                return
        self.open[connection] = time.monotonic()

    def note(self, why: str) -> None:
        """Count a connection that was closed, and say so once a second at most."""
        self.closed += 1
        now = time.monotonic()
        if now - self._logged_at >= LOGGED_EVERY_S:
            self._logged_at = now
            log.warning("a connection was closed: %s (%d so far)", why, self.closed)


class BoundedConfig(uvicorn.Config):
    """uvicorn's configuration with `limits` beside it, for the protocol that reads them."""

    def __init__(self, app: Any, *, limits: ConnectionLimits, **options: Any) -> None:
        super().__init__(app, http=BoundedProtocol, **options)
        self.limits = limits


class BoundedProtocol(H11Protocol):
    """uvicorn's protocol for HTTP/1.1 under `ConnectionLimits`."""

    def __init__(self, config: BoundedConfig, *arguments: Any, **options: Any) -> None:
        super().__init__(config, *arguments, **options)
        self._limits = config.limits
        self._began, self._received = 0.0, 0
        self._request_timer: asyncio.TimerHandle | None = None
        self._answer_timer: asyncio.TimerHandle | None = None

    @property
    def busy(self) -> bool:
        """Whether a request is whole and its answer is not."""
        return self.cycle is not None and not self.cycle.more_body and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_request()
        self._limits.admit(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._stop()
        super().connection_lost(error)

    def data_received(self, data: bytes) -> None:
        if self._request_timer is None and not self.busy:
            self._await_request()  # another request of a connection that was kept
        self._received += len(data)
        super().data_received(data)

    def handle_events(self) -> None:
        super().handle_events()
        if self.busy and self._request_timer is not None:
            self._request_timer.cancel()
            self._request_timer = None

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        self._stop()  # live connections are counted where they are served
        super().handle_websocket_upgrade(event)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            return
        self._limits.open.pop(self, None)  # the longest idle are the first to go
        self._limits.open[self] = time.monotonic()
        if self._request_timer is None and self.conn.trailing_data[0]:
            self._await_request()  # another request has begun

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._answer_timer is not None:
            self._answer_timer.cancel()
            self._answer_timer = None

    def shutdown(self) -> None:
        """End the connection: after its answer, but at once where a request is still to come whole."""
        if self.cycle is not None and self.cycle.more_body:
            self.transport.abort()
        else:
            super().shutdown()

    def give_up(self, why: str) -> None:
        """Close the connection now, whatever it was about."""
        if not self.transport.is_closing():
            self._limits.note(why)
            self.transport.abort()

    def _await_request(self) -> None:
        self._began, self._received = self.loop.time(), 0
        self._request_timer = self.loop.call_later(self._limits.request_s, self._look)

    def _look(self) -> None:
        """Close the connection unless what came earned its request more time."""
        due = self._began + self._limits.request_s + self._received / self._limits.bytes_per_s
        if self.loop.time() < due:
            self._request_timer = self.loop.call_at(due, self._look)
            return
        self._request_timer = None
        self.give_up("its request was not whole in time")

    def _await_reader(self) -> None:
        unread = self.transport.get_write_buffer_size()
        self._answer_timer = self.loop.call_later(self._limits.answer_s, self._look_at_reader, unread)

    def _look_at_reader(self, unread: int) -> None:
        """Close the connection unless its peer has read some of the `unread` bytes that there were."""
        if self.transport.get_write_buffer_size() < unread:
            self._await_reader()
        else:
            self.give_up("its peer does not read")

    def _stop(self) -> None:
        """No bounds from now on."""
        for timer in (self._request_timer, self._answer_timer):
            if timer is not None:
                timer.cancel()
        self._request_timer = self._answer_timer = None
        self._limits.open.pop(self, None)


def most_connections(wanted: int) -> int:
    """How many connections this process can keep: `wanted`, or what its limit of open files leaves."""
    try:
        import resource
    except ImportError:  # there is no such limit on Windows
        return wanted
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return wanted
    return max(8, min(wanted, files - KEPT_FREE))
