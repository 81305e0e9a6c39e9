"""Hostile clients beside honest ones: connections that idle, stop half-way, drip, do not read; large pictures; garbage.

Each attack goes on in a loop until it is ended. What the server answers does not matter here but for a status of 500.
"""

from __future__ import annotations

import asyncio
import io
import os
import random
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

IDLE, HALF, DRIPPING, DEAF = 60, 20, 5, 5
"""Connections that are kept busy so, each anew when it is closed."""
UNFINISHED = (
    b"GET /health/li",
    b"GET /health/live HTTP/1.1\r\nHost: 127.0.0.1\r\nX-",
    b"POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 900\r\n\r\n{",
    b"POST /v1/images/edits HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
)
ORIGINS = ("http://[", "http://evil.example", "null", "//", "http://127.0.0.1:1")
UPGRADE = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n" + (
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: fewstep-live-1\r\n\r\n"
)
PAUSE_S = 0.02


class Attackers:
    """The hostile clients of a service; `seen` counts what came of them by kind."""

    def __init__(self, url: str, *, seed: int = 0) -> None:
        parts = urlsplit(url)
        self._host, self._port = str(parts.hostname), int(parts.port or 80)
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._rng = random.Random(seed)
        out = io.BytesIO()
        Image.new("RGB", (4096, 4096), (20, 90, 160)).save(out, "PNG")
        self._picture = out.getvalue()

    def attacks(self) -> list[Coroutine[Any, Any, None]]:
        single = (self._pictures, self._origins, self._sockets, self._garbage)
        many = ((self._idle, IDLE), (self._half, HALF), (self._drip, DRIPPING), (self._deaf, DEAF))
        return [self._again(a) for a in single] + [self._again(a) for a, count in many for _ in range(count)]

    async def _again(self, attack: Callable[[], Coroutine[Any, Any, None]]) -> None:
        while True:
            with suppress(OSError, asyncio.IncompleteReadError):
                await attack()
            await asyncio.sleep(PAUSE_S)

    @asynccontextmanager
    async def _connected(self, **options: Any) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection(self._host, self._port, **options)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    async def _until_closed(self, kind: str, reader: asyncio.StreamReader) -> None:
        with suppress(ConnectionResetError):  # a way to close, too
            while await reader.read(1 << 16):
                pass
        self.seen[kind] += 1

    async def _idle(self) -> None:
        async with self._connected() as (reader, _):
            await self._until_closed("idle", reader)

    async def _half(self) -> None:
        async with self._connected() as (reader, writer):
            writer.write(self._rng.choice(UNFINISHED))
            await self._until_closed("half", reader)

    async def _drip(self) -> None:
        async with self._connected() as (reader, writer):
            writer.write(UNFINISHED[1])
            closed = asyncio.ensure_future(self._until_closed("dripping", reader))
            while not closed.done():
                writer.write(b"a")
                await asyncio.sleep(0.2)

    async def _deaf(self) -> None:
        """Asks for more than buffers hold, and reads nothing."""
        asked = b"GET /openapi.json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(deaf, (self._host, self._port))
            with suppress(TimeoutError):
                for _ in range(200):
                    async with asyncio.timeout(5.0):
                        await loop.sock_sendall(deaf, asked)
            await asyncio.sleep(5.0)
        self.seen["deaf"] += 1

    async def _pictures(self) -> None:
        """Pictures that are large once they are decoded."""
        boundary = "b" + os.urandom(8).hex()
        part = f'--{boundary}\r\nContent-Disposition: form-data; name="{{}}"{{}}\r\n\r\n'
        head = part.format("prompt", "") + "a ring\r\n" + part.format("size", "") + "64x64\r\n"
        body = (head + part.format("image", '; filename="x.png"')).encode() + self._picture
        body += f"\r\n--{boundary}--\r\n".encode()
        header = f"POST /v1/images/edits HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
        header += f"Content-Type: multipart/form-data; boundary={boundary}\r\n\r\n"
        await self._answered("large picture", header.encode() + body)

    async def _origins(self) -> None:
        for origin in ORIGINS:
            head = f"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: {origin}\r\n"
            await self._answered("origin", (head + self._rng.choice(["\r\n", UPGRADE])).encode())

    async def _sockets(self) -> None:
        """A live connection that says nothing of the protocol."""
        async with self._connected() as (reader, writer):
            writer.write(b"GET /live/socket HTTP/1.1\r\nHost: 127.0.0.1\r\n" + UPGRADE.encode())
            await reader.readuntil(b"\r\n\r\n")
            with suppress(ConnectionError):
                for _ in range(20):
                    writer.write(os.urandom(self._rng.randrange(1, 200)))
                    await writer.drain()
            with suppress(TimeoutError):
                async with asyncio.timeout(5.0):
                    await self._until_closed("socket", reader)

    async def _garbage(self) -> None:
        await self._answered("garbage", os.urandom(self._rng.randrange(1, 4000)) + b"\r\n\r\n")

    async def _answered(self, kind: str, asked: bytes) -> None:
        async with self._connected() as (reader, writer):
            writer.write(asked)
            with suppress(TimeoutError):
                async with asyncio.timeout(60.0):  # `wait_for` of Python 3.11 may swallow the cancelling of this task
                    line = await reader.readline()
                status = line.split(b" ")[1:2]
                self.seen[f"{kind} {status[0].decode('latin-1') if status else 'closed'}"] += 1
                if status == [b"500"]:
                    self.wrong.append(f"{kind}: a status of 500")


@asynccontextmanager
async def under_attack(attackers: Attackers) -> AsyncIterator[None]:
    """All attacks at once for as long as the block lasts."""
    tasks = [asyncio.ensure_future(a) for a in attackers.attacks()]
    try:
        yield
    finally:
        pending = set(tasks)
        while pending:  # a library within may swallow one cancelling
            for task in pending:
                task.cancel()
            _, pending = await asyncio.wait(pending, timeout=5.0)
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                attackers.wrong.append(f"an attack ended by itself: {outcome!r}")
