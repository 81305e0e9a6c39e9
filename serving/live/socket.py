"""`/live/socket`: a live session over a WebSocket, and `/live`: the page that speaks to it.

Nothing queues: inputs replace one another in the session, frames replace one another until the client has shown those
that are under way, and what else there is to say is bounded.
"""

from __future__ import annotations

import asyncio
import logging
import time
from base64 import urlsafe_b64decode
from collections import OrderedDict, deque
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from ...errors import EngineFailedError, FewstepError, UnavailableError
from ..http import Metrics, Service, Settings
from ..http.callers import Caller, Callers
from ..http.errors import HttpError
from ..http.pages import page_headers
from ..options import read_options
from ..tasks import end_tasks
from .frames import Frame
from .hub import LiveHub
from .metrics import LiveMetrics
from .noise import MODES
from .offers import commands, offers
from .page import live_page
from .pictures import MOST_BYTES, MOST_PIXELS
from .protocol import (
    OPTIONS,
    SUBPROTOCOL,
    Ack,
    Clear,
    Picture,
    ProtocolError,
    Set,
    read_binary,
    read_text,
    write_error,
    write_frame,
    write_hello,
    write_set,
    write_unchanged,
)
from .session import LiveSession

log = logging.getLogger("fewstep.serving")
TOKEN_PREFIX = "fewstep-token."  # noqa: S105 the prefix of a token, and none
GONE = (WebSocketDisconnect, RuntimeError, OSError)
"""What receiving and sending raise once the client is not there any more."""
INLINE_PIXELS = 128 * 128
KEPT_NUMBERS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class SocketLimits:
    """window: frames sent and not yet acknowledged. messages_per_s: from a client, over a second; twice that closes
    the socket. errors: messages in a row that could not be obeyed. idle_s: without any message."""

    window: int = 3
    messages_per_s: float = 500.0
    errors: int = 32
    idle_s: float = 600.0


def live_routes(hub: LiveHub, *, callers: Callers | None = None, limits: SocketLimits | None = None) -> list[BaseRoute]:
    """The page and the socket, for an application that checks host and origin (`make_app` does).

    callers: whose token or key clients of the socket must know, as the subprotocol `fewstep-token.<base64url of it>`;
    everybody by default. The page itself holds nothing that is worth one.
    """
    bounds = limits or SocketLimits()
    html = live_page()
    headers = page_headers(html)

    async def page(request: HttpRequest) -> HTMLResponse:
        return HTMLResponse(html, headers=headers)

    async def socket(websocket: WebSocket) -> None:
        await Connection(hub, websocket, callers=callers, limits=bounds).run()

    return [Route("/live", page, methods=["GET"]), WebSocketRoute("/live/socket", socket)]


def add_live(service: Service, settings: Settings, metrics: Metrics) -> list[BaseRoute]:
    """The routes of live sessions on a service's server, with their figures among the service's."""
    observer = LiveMetrics(metrics.registry)
    hub = LiveHub(service.pinned, observer=observer)
    observer.watch(hub)
    return live_routes(hub, callers=settings.callers)


def _gravity(error: Exception) -> int:
    """Which of the errors of one connection is told of: the least. That the client went is the least telling."""
    return 2 if isinstance(error, GONE) else 1 if isinstance(error, FewstepError) else 0


class Connection:
    """One client: what it says goes to its session, what the session makes goes to it."""

    def __init__(
        self, hub: LiveHub, socket: WebSocket, *, callers: Callers | None = None, limits: SocketLimits
    ) -> None:
        self._hub, self._socket, self._callers, self._limits = hub, socket, callers, limits
        self._caller: Caller | None = None
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._said: deque[FewstepError | int | str] = deque(maxlen=64)
        self._numbers: OrderedDict[int, tuple[int, float]] = OrderedDict()
        self._sent: deque[int] = deque()
        self._tokens, self._filled_at = limits.messages_per_s, time.monotonic()
        self._answer, self._answered = 0, True
        self._heard_at = time.monotonic()
        self._errors = 0

    async def run(self) -> None:
        """Serve the client until either side ends it; never raises."""
        try:
            if not await self._accept():
                return
            with nullcontext() if self._caller is None else self._caller.request():
                await self._run_session()
        except HttpError as error:
            await self._close(1013, FewstepError(error.message))
        except FewstepError as error:
            await self._close(1013, error)

    async def _run_session(self) -> None:
        session = await asyncio.to_thread(self._hub.open, self._heard)
        try:
            await self._serve(session)
        finally:
            await asyncio.to_thread(self._hub.release, session)

    async def _accept(self) -> bool:
        """The token, before anything else (host and origin are the application's guard's); a refusal is a 403."""
        offered = self._socket.scope.get("subprotocols", [])
        if not self._knows_token(offered):
            await self._socket.close(1008)
            return False
        await self._socket.accept(SUBPROTOCOL if SUBPROTOCOL in offered else None)
        return True

    def _knows_token(self, offered: list[str]) -> bool:
        if self._callers is None or self._callers.everybody:
            return True
        given = [p.removeprefix(TOKEN_PREFIX) for p in offered if p.startswith(TOKEN_PREFIX)]
        try:
            token = urlsafe_b64decode(given[0] + "=" * (-len(given[0]) % 4)).decode() if given else None
        except ValueError:
            return False
        self._caller = self._callers.find(token)
        return self._caller is not None

    async def _serve(self, session: LiveSession) -> None:
        await self._socket.send_text(self._hello(session))
        tasks = [asyncio.create_task(c) for c in (self._receive(session), self._send(session), self._watch())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            errors = await end_tasks(*tasks)
        error = min(errors, key=_gravity, default=None)
        if error is None or isinstance(error, WebSocketDisconnect):
            await self._close(1000, None)
        elif isinstance(error, ProtocolError):
            await self._close(error.code, error)
        elif isinstance(error, EngineFailedError):
            await self._close(1011, error)
        elif isinstance(error, UnavailableError):
            await self._close(1001, error)
        elif isinstance(error, GONE):
            log.debug("a live client went away (%s)", type(error).__name__)
        else:
            log.error("a live connection failed", exc_info=error)
            await self._close(1011, FewstepError("the connection failed"))

    def _hello(self, session: LiveSession) -> str:
        pipeline = session.server.pipeline
        defaults = pipeline.bundle.defaults
        return write_hello(
            session.settings,
            bundle=pipeline.bundle.name,
            size=list(pipeline.size),
            sizes=[list(s) for s in session.server.sizes],
            defaults={"steps": defaults.steps, "guidance": defaults.guidance, "sampler": defaults.sampler},
            noises=list(MODES),
            **offers(pipeline),
            limits={
                "picture_bytes": MOST_BYTES,
                "picture_pixels": MOST_PIXELS,
                "window": self._limits.window,
                "messages_per_s": self._limits.messages_per_s,
            },
        )

    # --- what the client says ---

    async def _receive(self, session: LiveSession) -> None:
        while True:
            event = await self._socket.receive()
            self._heard_at = time.monotonic()
            if event["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(event.get("code") or 1005)
            self._spend()
            text, data = event.get("text"), event.get("bytes")
            message = read_text(text) if text is not None else read_binary(data or b"")
            try:
                await self._obey(session, message)
            except FewstepError as error:
                self._errors += 1
                if self._errors > self._limits.errors:
                    raise ProtocolError("too many messages that cannot be obeyed", code=1008) from error
                self._say(write_error(error, number=getattr(message, "id", None)))
            else:
                self._errors = 0

    async def _watch(self) -> None:
        """End it when the client has said nothing for too long."""
        while (left_s := self._heard_at + self._limits.idle_s - time.monotonic()) > 0:
            await asyncio.sleep(left_s)
        raise ProtocolError(f"nothing was said for {self._limits.idle_s:g} s", code=4408)

    async def _obey(self, session: LiveSession, message: Set | Ack | Clear | Picture) -> None:
        match message:
            case Ack():
                if message.frame in self._sent:
                    while self._sent.popleft() != message.frame:
                        pass
                self._wake.set()
            case Picture():
                self._remember(session.push(message.data), message)
            case Clear():
                self._remember(session.push(None), message)
            case Set():
                changes: dict[str, Any] = dict(message.settings)
                if isinstance(changes.get("size"), list):
                    changes["size"] = tuple(changes["size"])
                if OPTIONS in changes:
                    changes[OPTIONS] = read_options(changes[OPTIONS])
                self._remember(session.update(**changes), message)
                self._answer, self._answered = message.id, False
                self._wake.set()

    def _remember(self, number: int, message: Set | Clear | Picture) -> None:
        self._numbers[number] = (message.id, message.at)
        while len(self._numbers) > KEPT_NUMBERS:
            self._numbers.popitem(last=False)

    def _spend(self) -> None:
        """A token bucket a second deep."""
        now = time.monotonic()
        rate = self._limits.messages_per_s
        self._tokens = min(rate, self._tokens + (now - self._filled_at) * rate) - 1.0
        self._filled_at = now
        if self._tokens < 0:
            raise ProtocolError("too many messages", code=1008, expected=f"at most {rate:g} a second")

    # --- what the session makes ---

    def _heard(self, event: Frame | FewstepError | int) -> None:
        """On a thread of the server: remember what there is to say, wake the sender."""
        if not isinstance(event, Frame):
            self._said.append(event)
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake.set)

    def _say(self, text: str) -> None:
        self._said.append(text)
        self._wake.set()

    async def _send(self, session: LiveSession) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            if not self._answered:
                self._answered = True
                await self._socket.send_text(self._answer_to_set(session))
            while self._said:
                await self._send_event(self._said.popleft())
            if len(self._sent) < self._limits.window and (frame := session.take()) is not None:
                await self._send_frame(frame)
                self._wake.set()

    def _answer_to_set(self, session: LiveSession) -> str:
        requests = session.requests
        again = commands(session.server.pipeline, requests)
        warnings = list(dict.fromkeys(w for r in requests.values() for w in r.warnings))
        return write_set(session.settings, number=self._answer, commands=again, warnings=warnings)

    async def _send_event(self, event: FewstepError | int | str) -> None:
        if isinstance(event, str):
            await self._socket.send_text(event)
        elif isinstance(event, int):
            number, at = self._numbers.pop(event, (0, 0.0))
            await self._socket.send_bytes(write_unchanged(number=number, at=at))
        elif isinstance(event, UnavailableError):
            raise event
        else:
            await self._socket.send_text(write_error(event))

    async def _send_frame(self, frame: Frame) -> None:
        small = frame.image.shape[0] * frame.image.shape[1] <= INLINE_PIXELS
        jpeg = frame.jpeg() if small else await asyncio.to_thread(frame.jpeg)
        number, at = self._newest(frame.input)
        self._sent.append(frame.index % 2**32)
        await self._socket.send_bytes(write_frame(frame, jpeg, number=number, at=at))

    def _newest(self, shown: int) -> tuple[int, float]:
        """What the client called the newest input that a frame shows; inputs before it will not be asked for again."""
        while self._numbers and next(iter(self._numbers)) < shown:
            self._numbers.popitem(last=False)
        return self._numbers.get(shown, (0, 0.0))

    async def _close(self, code: int, error: FewstepError | None) -> None:
        """Say why, then close; the client may be gone already."""
        try:
            if self._socket.application_state is WebSocketState.CONNECTED:
                if error is not None:
                    await self._socket.send_text(write_error(error))
                await self._socket.close(code, (str(error.found) if error else "")[:100])
        except GONE:
            log.debug("a live client went away before it was told why")
