"""Running the application with uvicorn: SIGTERM drains, a second signal does not wait."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import socket
import threading
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from ...errors import ArgumentError
from .connections import BoundedConfig, ConnectionLimits, most_connections
from .service import Service

log = logging.getLogger("fewstep.serving.http")
CONNECTIONS = 1000
BACKLOG = 128
GRACE_S = 2
"""For answers to be written once everything is settled."""
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what is bound to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def allowed_hosts(host: str, *, guarded: bool) -> tuple[str, ...]:
    """The `Host` values to answer: its own names on loopback without a token or keys, any otherwise.

    `ArgumentError` for a service beyond loopback that asks for neither.
    """
    if guarded:
        return ()
    if not is_loopback(host):
        raise ArgumentError(
            f"{host} can be reached from other machines",
            expected="a token or keys",
            remedy="Set FEWSTEP_TOKEN, give --keys, or serve on 127.0.0.1.",
        )
    return (*LOOPBACK, host)


def listen(host: str, port: int) -> list[socket.socket]:
    """Sockets that listen on all addresses of a host, on a free port for port 0; `ArgumentError` if that cannot be."""
    sockets: list[socket.socket] = []
    try:
        for family, _, _, _, address in socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            at = (address[0], sockets[0].getsockname()[1] if sockets else port)
            # asyncio asks for TCP_NODELAY where a socket says that it is TCP's: without, an answer waits for an
            # acknowledgement of its headers, 40 ms
            sockets.append(socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP))
            _listen_on(sockets[-1], family, at)
    except OSError as error:
        for opened in sockets:
            opened.close()
        raise ArgumentError(
            f"nothing can listen on {host}, port {port} ({error.strerror})",
            expected="an address of this machine and a port that is free",
            remedy="Name others with --host and --port.",
        ) from error
    return sockets


def _shown(listening: socket.socket) -> str:
    """The host and port by which people of this machine reach a socket."""
    host, port = listening.getsockname()[:2]
    if host in ("0.0.0.0", "::"):  # noqa: S104 compared, not bound to
        host = "localhost"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _listen_on(opened: socket.socket, family: int, address: tuple[object, object]) -> None:
    if os.name == "posix":
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    opened.bind(address)
    opened.listen(BACKLOG)


def serve(
    app: Starlette,
    service: Service,
    listening: list[socket.socket],
    *,
    drain_s: float,
    limits: ConnectionLimits | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT; then refuse new work with 503, finish what was accepted, and return.

    What is not finished after `drain_s` is refused with 503 too, and the process ends within `GRACE_S` of that.
    """
    config = BoundedConfig(
        app,
        limits=limits or ConnectionLimits(most=most_connections(CONNECTIONS)),
        access_log=False,
        log_config=None,
        server_header=False,
        ws_max_size=4 * 1024 * 1024,
        ws_per_message_deflate=False,  # frames and pictures are compressed already
        h11_max_incomplete_event_size=64 * 1024,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=GRACE_S,
        backlog=BACKLOG,
    )
    _Draining(config, service, drain_s).run(sockets=listening)


class _Draining(uvicorn.Server):
    """A uvicorn server that goes on answering while the service drains, so that callers hear of it."""

    def __init__(self, config: uvicorn.Config, service: Service, drain_s: float) -> None:
        super().__init__(config)
        self._service, self._drain_s = service, drain_s
        self._drainer: threading.Thread | None = None
        self._announcer: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._announcer = asyncio.create_task(self._announce(sockets or []))

    async def _announce(self, sockets: list[socket.socket]) -> None:
        """Say that it is ready once it is, and where: a person can go there then."""
        await self._service.begun()
        if self._service.state == "ready" and sockets:
            address = f"http://{_shown(sockets[0])}"
            log.info("ready", extra={"fields": {"api": f"{address}/v1", "page": f"{address}/live"}})

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._announcer is not None:
            self._announcer.cancel()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._drainer is not None:
            super().handle_exit(sig, frame)
            return
        log.info("draining")
        self._drainer = threading.Thread(target=self._drain, name="fewstep-drain", daemon=True)
        self._drainer.start()

    def _drain(self) -> None:
        drained = self._service.drain(self._drain_s)
        log.info("drained" if drained else "not drained in time: what is left is given up")
        if not drained:
            self._service.give_up()
        self.should_exit = True
