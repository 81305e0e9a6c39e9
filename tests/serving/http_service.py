"""A service over HTTP on a free port, as clients meet it: a real uvicorn on a thread, or a process of its own."""

from __future__ import annotations

import base64
import io
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn
from fewstep.serving import Server
from fewstep.serving.http import Metrics, Service, Settings, make_app
from fewstep.serving.http.connections import BoundedConfig, ConnectionLimits
from fewstep.serving.http.run import listen
from PIL import Image


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def serving(load: Any, settings: Settings, *, ready: bool = True) -> Iterator[tuple[str, Service]]:
    """The base URL of a service and the service; `load(observer)` makes its server."""
    metrics = Metrics()
    service = Service(lambda: load(metrics))
    with listening(make_app(service, settings, metrics=metrics), ConnectionLimits(most=100)) as (url, _):
        if ready:
            service.wait(60)
        yield url, service


@contextmanager
def listening(app: Any, limits: ConnectionLimits) -> Iterator[tuple[str, uvicorn.Server]]:
    """The base URL of an application behind the protocol and the sockets of `fewstep serve`, and uvicorn's server."""
    sockets = listen("127.0.0.1", 0)
    server = uvicorn.Server(BoundedConfig(app, limits=limits, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, args=(sockets,), daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{sockets[0].getsockname()[1]}", server
    finally:
        server.should_exit = True
        thread.join(20)


def wait_until(condition: Any, timeout: float = 60.0) -> None:
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("it did not come true")
        time.sleep(0.01)


@contextmanager
def serve_process(*arguments: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`fewstep serve student` as a process, once it is ready. Its log is `process.stderr`, read or not."""
    port = free_port()
    command = [sys.executable, "-m", "fewstep", "serve", "student", "--port", str(port), "--threads", "1"]
    # a pipe that nobody reads would fill, and stop it
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log, Path(log.name).open() as read:
        process = subprocess.Popen([*command, "--rows", "4", *arguments], stderr=log, text=True, env={**os.environ})
        process.stderr = read
        url = f"http://127.0.0.1:{port}"
        try:
            wait_until(lambda: process.poll() is not None or is_ready(url), 120)
            yield url, process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait(20)


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/ready").status_code == 200
    except httpx.HTTPError:
        return False


def load_student(student: Any, **options: Any) -> Any:
    return lambda observer: Server(student, observer=observer, **options)


def pixels(b64: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))).convert("RGB"))


def generate(url: str, **fields: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/images/generations", json={"prompt": "a red circle", **fields}, timeout=60)


def png(width: int = 64, height: int = 64) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 30)).save(out, "PNG")
    return out.getvalue()
