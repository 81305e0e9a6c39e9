"""A running service with live sessions, and a client of its socket, for tests and benchmarks."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import uvicorn
from fewstep.serving import Server
from fewstep.serving.http import Metrics, Service, Settings, make_app
from fewstep.serving.live.protocol import FRAME, SUBPROTOCOL, UNCHANGED, read_frame, write_picture
from fewstep.serving.live.socket import add_live
from websockets.sync.client import ClientConnection, connect


@contextmanager
def running(
    server: Server, *, metrics: Metrics | None = None, token: str | None = None, **options: Any
) -> Iterator[int]:
    """The application on a free port of loopback, in this process. options: of its `Settings`."""
    metrics = metrics or Metrics()
    service = Service(lambda: server)
    hosts = () if token else ("127.0.0.1",)
    settings = Settings(model="student", token=token, hosts=hosts, **options)
    app = make_app(service, settings, metrics=metrics, routes=add_live(service, settings, metrics))
    listener = socket.create_server(("127.0.0.1", 0))
    runner = uvicorn.Server(uvicorn.Config(app, log_config=None, ws_max_size=4 * 1024 * 1024))
    thread = threading.Thread(target=runner.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not runner.started:
        time.sleep(0.01)
    service.wait(60)
    try:
        yield listener.getsockname()[1]
    finally:
        runner.should_exit = True
        thread.join(30)
        listener.close()


def url(port: int) -> str:
    return f"ws://127.0.0.1:{port}/live/socket"


class Client:
    """Speaks the protocol: `hello` on entering, then `set`, `picture`, and `next`, which acknowledges frames."""

    def __init__(self, port: int, *, offered: Sequence[str] = (), **options: Any) -> None:
        protocols: Any = [SUBPROTOCOL, *offered]
        self.socket: ClientConnection = connect(url(port), subprotocols=protocols, compression=None, **options)
        self.hello = json.loads(self.socket.recv(10))
        assert self.hello["type"] == "hello", self.hello
        self._number = 0

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def set(self, **settings: Any) -> int:
        self._number += 1
        self.say({"type": "set", "id": self._number, "at": time.perf_counter(), "settings": settings})
        return self._number

    def picture(self, data: bytes) -> int:
        self._number += 1
        self.socket.send(write_picture(data, number=self._number, at=1.5))
        return self._number

    def say(self, message: Any) -> None:
        self.socket.send(json.dumps(message))

    def next(self, *, ack: bool = True, timeout: float = 30) -> dict[str, Any]:
        """The next message as a dictionary; frames are acknowledged."""
        got = self.socket.recv(timeout)
        if isinstance(got, str):
            return dict(json.loads(got))
        kind, index, number, latency_ms, at, jpeg = read_frame(got)
        if kind == FRAME and ack:
            self.say({"type": "ack", "frame": index})
        name = {FRAME: "frame", UNCHANGED: "unchanged"}[kind]
        return {"type": name, "frame": index, "id": number, "latency_ms": latency_ms, "at": at, "jpeg": jpeg}

    def until(self, kind: str, number: int = 0) -> dict[str, Any]:
        """The first message of a type, for this input or a later one."""
        while True:
            message = self.next()
            if message["type"] == kind and (message["id"] or 0) >= number:
                return message
