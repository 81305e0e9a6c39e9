"""What the doors add: HTTP and WebSocket beside the server's own time, on connections that are kept.

python bench/door.py [--repeat 200] [--output FILE]

`fewstep serve` runs the embedded student at 64x64 with one step, in a process of its own. Of each answer its own word
for how long the server took is subtracted, and for HTTP how long making the PNG took; what is left is the door's:
parsing, threads, sockets. The client is a bare socket for HTTP, and `websockets` for WebSocket, whose own time counts.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fewstep.bench.machine import describe
from fewstep.serving.live.protocol import FRAME, FRAME_HEADER, SUBPROTOCOL
from live import percentile, serving

BODY = {"prompt": "a red circle on a blue background", "num_inference_steps": 1, "guidance_scale": 0}
WARM_UP = 20


def summary(milliseconds: list[float]) -> dict[str, float]:
    return {f"p{p}_ms": round(percentile(milliseconds, p), 3) for p in (50, 90, 99)}


def http_door(address: str, repeat: int) -> dict[str, Any]:
    """Health, and pictures of one step, one after the other."""
    place = urlsplit(address)
    connection = socket.create_connection((place.hostname, place.port), timeout=60)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def asked(method: str, path: str, body: dict[str, Any] | None = None) -> tuple[float, bytes]:
        data = b"" if body is None else json.dumps(body).encode()
        fields = f"host: {place.netloc}\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
        message = f"{method} {path} HTTP/1.1\r\n{fields}\r\n\r\n".encode() + data
        began = time.perf_counter()
        connection.sendall(message)
        answer = answer_from(connection)
        return 1e3 * (time.perf_counter() - began), answer

    health, wall, own, encoding = [], [], [], []
    for i in range(WARM_UP + repeat):
        took, _ = asked("GET", "/health/live")
        whole, answer = asked("POST", "/v1/images/generations", {**BODY, "seed": i})
        if i >= WARM_UP:
            health.append(took)
            wall.append(whole)
            timings = json.loads(answer)["timings_ms"]
            own.append(timings["total"])
            encoding.append(timings["encode"])
    added = [w - o - e for w, o, e in zip(wall, own, encoding, strict=True)]
    return {
        "health": summary(health),
        "request": summary(wall),
        "server": summary(own),
        "png": summary(encoding),
        "added": summary(added),
    }


def answer_from(connection: socket.socket) -> bytes:
    """The body of an answer that says its length; ends the bench for any status but 200."""
    taken = b""
    while b"\r\n\r\n" not in taken:
        taken += connection.recv(1 << 16)
    head, _, body = taken.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200 "):
        sys.exit(head.decode(errors="replace"))
    length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
    while len(body) < length:
        body += connection.recv(1 << 16)
    return body


def live_door(address: str, repeat: int) -> dict[str, Any]:
    """Another seed, and the frame that shows it, one after the other."""
    from websockets.sync.client import connect
    from websockets.typing import Subprotocol

    wall, own = [], []
    url, protocols = f"ws{address.removeprefix('http')}/live/socket", [Subprotocol(SUBPROTOCOL)]
    with connect(url, subprotocols=protocols, max_size=1 << 24) as live:
        settings = {"prompt": BODY["prompt"], "steps": 1, "guidance": 0}
        live.send(json.dumps({"type": "set", "id": 1, "at": 0, "settings": settings}))
        for i in range(2, 2 + WARM_UP + repeat):
            began = time.perf_counter()
            live.send(json.dumps({"type": "set", "id": i, "at": 0, "settings": {"seed": i}}))
            latency_us = frame_of(live, i)
            if i >= 2 + WARM_UP:
                wall.append(1e3 * (time.perf_counter() - began))
                own.append(1e-3 * latency_us)
    added = [w - o for w, o in zip(wall, own, strict=True)]
    return {"frame": summary(wall), "server": summary(own), "added": summary(added)}


def frame_of(live: Any, wanted: int) -> int:
    """Acknowledge frames until one shows this input; the server's latency in microseconds."""
    while True:
        message = live.recv(timeout=30)
        if isinstance(message, str) or message[0] != FRAME:
            continue
        _, _, _, number, shown, latency_us, _ = FRAME_HEADER.unpack_from(message)
        live.send(json.dumps({"type": "ack", "frame": number}))
        if shown >= wanted:
            return int(latency_us)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=200)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    with serving("--threads", "1") as (address, _):
        figures = {"http": http_door(address, options.repeat), "websocket": live_door(address, options.repeat)}
    for door, found in figures.items():
        print(f"{door}: {json.dumps(found)}")
    if options.output:
        data = {"what": (__doc__ or "").split("\n")[0], "machine": describe(1), "repeat": options.repeat, **figures}
        options.output.write_text(json.dumps(data, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
