"""What surrounds every route: request ids, tokens, hosts and origins, one log line, and errors that tell no secrets."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import secrets
import time
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...errors import UnavailableError
from .errors import HttpError, respond
from .metrics import Metrics
from .settings import Settings

log = logging.getLogger("fewstep.serving.http")
OPEN = ("/health/live", "/health/ready", "/live")
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
CLIENT_GONE = 499


class Guard:
    """ASGI middleware for HTTP and WebSocket scopes.

    `scope["state"]["request_id"]` is the caller's `X-Request-Id` where that is well-formed, or a new one; responses
    repeat it. WebSocket handshakes get the host and origin checks; their routes check the token, which browsers
    cannot send as a header.
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
        await self._http(scope, receive, send, headers)

    async def _http(self, scope: Scope, receive: Receive, send: Send, headers: dict[str, str]) -> None:
        name, began, status = scope["state"]["request_id"], time.perf_counter(), 0

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", name.encode())]}
            await send(message)

        try:
            _check_framing(scope, headers)
            self._check_origin(headers)
            self._check_token(scope["path"], headers)
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
            route = _route(scope)
            self._metrics.responded(route, status)
            took_ms = round(1e3 * (time.perf_counter() - began), 2)
            log.info("request", extra={"fields": _line(scope, name, route, status, took_ms)})

    def _check_origin(self, headers: dict[str, str]) -> None:
        host = headers.get("host", "")
        if self._settings.hosts and _without_port(host) not in self._settings.hosts:
            raise HttpError(421, "unknown_host", "this host is not served here")
        origin = headers.get("origin")
        if origin is not None and _authority(origin) != host.lower():
            raise HttpError(403, "foreign_origin", "requests from other origins are refused")

    def _check_token(self, path: str, headers: dict[str, str]) -> None:
        if self._settings.token is None or path in OPEN:
            return
        kind, _, token = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(token.strip().encode(), self._settings.token.encode()):
            raise HttpError(401, "no_token", "a valid token is needed", headers={"www-authenticate": "Bearer"})


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


def _authority(origin: str) -> str | None:
    """The host and port of an origin, or `None` for what is none."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


def _without_port(host: str) -> str:
    return host.rpartition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0].lower()


def _route(scope: Scope) -> str:
    """The path of the route that answered, which no caller can choose."""
    return str(getattr(scope.get("route"), "path", None) or "other")


def _line(scope: Scope, name: str, route: str, status: int, took_ms: float) -> dict[str, Any]:
    return {"request_id": name, "method": scope["method"], "route": route, "status": status, "took_ms": took_ms}
