"""What surrounds every route: request ids, tokens, hosts and origins, one log line, and errors that tell no secrets."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from contextlib import AbstractContextManager, nullcontext

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...errors import UnavailableError
from .callers import bearer
from .errors import HttpError, respond
from .metrics import Metrics
from .origins import allowing, is_allowed, is_own
from .settings import Settings
from .tracing import traced

log = logging.getLogger("fewstep.serving.http")
OPEN = ("/health/live", "/health/ready", "/live", "/", "/docs")
COUNTED = ("/v1/images/generations", "/v1/images/edits")
"""What bounds of a key are about."""
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
CLIENT_GONE = 499


class Guard:
    """ASGI middleware for HTTP and WebSocket scopes.

    `scope["state"]["request_id"]` is the caller's `X-Request-Id` where that is well-formed, or a new one; responses
    repeat it. `scope["state"]["caller"]` is whose key or token it came with, `["trace"]` its place in a trace.
    WebSocket handshakes get the host and origin checks; their routes check the token, which browsers cannot send as a
    header.
    """

    def __init__(self, app: ASGIApp, *, settings: Settings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        given = headers.get("x-request-id", "")
        name = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = name
        if scope["type"] == "websocket":
            try:
                self._check_origin(headers)
            except HttpError:
                await send({"type": "websocket.close", "code": 1008})
                return
            await self._app(scope, receive, send)
            return
        with traced(scope["method"], headers) as trace:
            scope["state"]["trace"] = trace
            await self._http(scope, receive, send, headers)

    async def _http(self, scope: Scope, receive: Receive, send: Send, headers: dict[str, str]) -> None:
        name, began, status = scope["state"]["request_id"], time.perf_counter(), 0
        added = [(b"x-request-id", name.encode())]

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        try:
            _check_framing(scope, headers)
            foreign = self._check_origin(headers)
            preflight = _is_preflight(scope, headers)
            if foreign is not None:
                added += allowing(foreign, self._settings.origins, preflight=preflight)
            if foreign is not None and preflight:
                await Response(status_code=204)(scope, receive, named)
                return
            with self._admitted(scope, headers, foreign):
                await self._app(scope, receive, named)
        except ClientDisconnect:
            status = status or CLIENT_GONE
        except asyncio.CancelledError:  # the process ends before the answer is there
            if status == 0:
                await respond(UnavailableError("the server was closed before the request was finished"))(
                    scope, receive, named
                )
        except Exception as error:
            response = respond(error)
            if response.status_code == 500:
                log.exception("request %s failed", name)
            if status == 0:
                await response(scope, receive, named)
        finally:
            self._note(scope, status, round(1e3 * (time.perf_counter() - began), 2))

    def _note(self, scope: Scope, status: int, took_ms: float) -> None:
        """Count the answer, log it, and say of the span what there is to say."""
        route, state = _route(scope), scope["state"]
        self._metrics.responded(route, status)
        fields = {"request_id": state["request_id"], "method": scope["method"], "route": route, "status": status}
        fields["took_ms"] = took_ms
        if (caller := state.get("caller")) is not None:
            fields["caller"] = caller.name
        if (trace := state.get("trace")) is not None:
            fields |= {"trace_id": trace.trace_id, "span_id": trace.span_id}
            fields |= {"parent_id": trace.parent_id} if trace.parent_id else {}
            trace.attributes |= {
                "http.request.method": scope["method"],
                "http.route": route,
                "http.response.status_code": status,
                "fewstep.request_id": state["request_id"],
            }
        log.info("request", extra={"fields": fields})

    def _check_origin(self, headers: dict[str, str]) -> str | None:
        """The origin of a page of another one that may call, `None` for what no such page sends."""
        host = headers.get("host", "")
        if self._settings.hosts and _without_port(host) not in self._settings.hosts:
            raise HttpError(421, "unknown_host", "this host is not served here")
        origin = headers.get("origin")
        if origin is None or is_own(origin, host):
            return None
        if not is_allowed(origin, self._settings.origins):
            message = (
                "requests from pages of other origins are refused; allow one with: fewstep serve BUNDLE --cors ORIGIN"
            )
            raise HttpError(403, "foreign_origin", message)
        return origin

    def _admitted(self, scope: Scope, headers: dict[str, str], foreign: str | None) -> AbstractContextManager[None]:
        """Whose request it is, within that caller's bounds; `HttpError` 401, 403 or 429."""
        path, callers = scope["path"], self._settings.callers
        if path in OPEN:
            return nullcontext()
        administers = scope["method"] == "POST" and path.startswith("/v1/models/")
        if callers.everybody:
            if administers and foreign is not None:
                raise HttpError(403, "not_admin", "models are loaded and unloaded by pages only with a token")
            return nullcontext()
        caller = callers.find(bearer(headers.get("authorization", "")))
        if caller is None:
            raise HttpError(401, "no_token", "a valid token is needed", headers={"www-authenticate": "Bearer"})
        scope["state"]["caller"] = caller
        if administers and not caller.admin:
            raise HttpError(403, "not_admin", "this key may not load and unload models")
        return caller.request() if path in COUNTED else nullcontext()


def _is_preflight(scope: Scope, headers: dict[str, str]) -> bool:
    return scope["method"] == "OPTIONS" and "access-control-request-method" in headers


def _check_framing(scope: Scope, headers: dict[str, str]) -> None:
    """Refuse a body whose end two readers may see in two places (RFC 9112, 6.1), and end the connection with it.

    A proxy in front that goes by the length would take for another client's request what comes after the chunks.
    """
    if "transfer-encoding" in headers and ("content-length" in headers or scope["http_version"] != "1.1"):
        raise HttpError(
            400,
            "ambiguous_length",
            "transfer-encoding beside content-length, or in HTTP/1.0",
            headers={"connection": "close"},
        )


def _without_port(host: str) -> str:
    return host.rpartition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0].lower()


def _route(scope: Scope) -> str:
    """The path of the route that answered, which no caller can choose."""
    return str(getattr(scope.get("route"), "path", None) or "other")
