"""Thousands of requests over HTTP with cancels, disconnects, bad inputs and overload: nothing leaks, nothing is wrong.

    python bench/soak.py [--requests 10000] [--json FILE]

A server of the embedded student on a real socket; clients keep ten times as many requests coming as it can make. Each
image that comes back is compared with the one made alone (50 dB). Memory, open files and threads are read as it goes.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import random
import socket
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import fewstep
import httpx
import numpy as np
import uvicorn
from fewstep.runtime.serving import Server
from fewstep.runtime.serving.http import Metrics, Service, Settings, make_app
from PIL import Image

SEEDS = 6
KINDS = (
    {"num_inference_steps": 1},
    {"num_inference_steps": 2, "sampler": "lcm"},
    {"num_inference_steps": 4, "sampler": "dpmpp_2m", "guidance_scale": 2.0},
    {"num_inference_steps": 4, "sampler": "euler_ancestral"},
)
BAD: tuple[bytes, ...] = (
    b"",
    b"{",
    b"[" * 5000,
    b'{"prompt":1}',
    b'{"prompt":"a","n":-1}',
    b'{"prompt":"a","sampler":"x"}',
    b'{"prompt":"a","guidance_scale":1e999}',
    b'{"prompt":"\xff"}',
    b'{"prompt":"a","nonsense":{}}',
)
PATH = "/v1/images/generations"


class Soak:
    """The clients of one run, and what they saw."""

    def __init__(self, url: str, expected: dict[tuple[int, int], np.ndarray], *, seed: int) -> None:
        self.url, self.expected = url, expected
        self.seen: Counter[str] = Counter()
        self.latencies: list[float] = []
        self.wrong: list[str] = []
        self.worst_db = float("inf")
        self._rng = random.Random(seed)

    async def run(self, count: int, clients: int, sample: Any) -> None:
        """`count` requests from `clients` that each send the next one when the last is over."""
        numbers = iter(range(count))

        async def client(http: httpx.AsyncClient) -> None:
            for number in numbers:
                await self._one(http)
                if number % max(1, count // 20) == 0:
                    sample(number)

        limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
        async with httpx.AsyncClient(base_url=self.url, timeout=120, limits=limits) as http:
            await asyncio.gather(*(client(http) for _ in range(clients)))

    async def _one(self, http: httpx.AsyncClient) -> None:
        what = self._rng.choices(("image", "stream", "leave", "bad", "upload"), (60, 8, 12, 15, 5))[0]
        try:
            await getattr(self, f"_{what}")(http)
        except httpx.TimeoutException:
            self.seen["left"] += 1
        except httpx.HTTPError as error:
            self.seen[f"connection: {type(error).__name__}"] += 1

    def _ask(self) -> tuple[tuple[int, int], dict[str, Any]]:
        kind, seed = self._rng.randrange(len(KINDS)), self._rng.randrange(SEEDS)
        return (kind, seed), {"prompt": f"a red circle {kind}", "seed": seed, **KINDS[kind]}

    async def _image(self, http: httpx.AsyncClient) -> None:
        key, body = self._ask()
        began = time.perf_counter()
        answer = await http.post(PATH, json=body)
        self._count("image", answer)
        if answer.status_code == 200:
            self.latencies.append(time.perf_counter() - began)
            self._check(key, answer.json()["data"][0]["b64_json"])

    async def _stream(self, http: httpx.AsyncClient) -> None:
        key, body = self._ask()
        async with http.stream("POST", PATH, json={**body, "stream": True, "partial_images": 2}) as answer:
            text = (await answer.aread()).decode()
        self._count("stream", answer)
        if answer.status_code == 200:
            last = json.loads(text.strip().rpartition("data: ")[2])
            if "error" in last:
                self.seen[f"stream ended: {last['error']['code']}"] += 1
            else:
                self._check(key, last["b64_json"])

    async def _leave(self, http: httpx.AsyncClient) -> None:
        body = {"prompt": "a ring", "num_inference_steps": 30, "n": 2, "stream": self._rng.random() < 0.5}
        answer = await http.post(PATH, json=body, timeout=httpx.Timeout(60, read=self._rng.uniform(0.005, 0.2)))
        self._count("leave", answer)

    async def _bad(self, http: httpx.AsyncClient) -> None:
        body = self._rng.choice(BAD)
        answer = await http.post(PATH, content=body, headers={"content-type": "application/json"})
        self._count("bad", answer)
        if answer.status_code < 400:
            self.wrong.append(f"{body[:40]!r} was taken")

    async def _upload(self, http: httpx.AsyncClient) -> None:
        data = os.urandom(200) if self._rng.random() < 0.5 else _png()
        fields = {"prompt": "a ring", "strength": "0.5", "num_inference_steps": "4"}
        answer = await http.post("/v1/images/edits", data=fields, files={"image": ("a.png", data)})
        self._count("upload", answer)

    def _count(self, what: str, answer: httpx.Response) -> None:
        self.seen[f"{what} {answer.status_code}"] += 1
        if answer.status_code == 500:
            self.wrong.append(answer.text[:200])
        if answer.status_code == 429 and "retry-after" not in answer.headers:
            self.wrong.append("429 without Retry-After")

    def _check(self, key: tuple[int, int], picture: str) -> None:
        got = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))), np.float64)
        error = float(np.mean((got - self.expected[key]) ** 2))
        decibels = float("inf") if error == 0 else 10 * np.log10(255.0**2 / error)
        self.worst_db = min(self.worst_db, decibels)
        if decibels < 50.0:
            self.wrong.append(f"image {key} is at {decibels:.1f} dB")


def _png() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 30, 30)).save(out, "PNG")
    return out.getvalue()


def resources() -> dict[str, float]:
    """Resident memory in MB, open files and threads of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "memory_mb": round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1),
        "files": len(list(Path("/proc/self/fd").iterdir())),
        "threads": threading.active_count(),
    }


def settled() -> dict[str, float]:
    """`resources` once the server has closed the connections that its clients left, or after ten seconds."""
    found = resources()
    for _ in range(20):
        time.sleep(0.5)
        last, found = found, resources()
        if (last["files"], last["threads"]) == (found["files"], found["threads"]):
            break
    return found


def soak(pipeline: fewstep.Pipeline, *, requests: int, clients: int, seed: int = 0) -> dict[str, Any]:
    """Run it; the server and its clients share this process, so that one look at its resources sees both."""
    expected = {}
    for kind, options in enumerate(KINDS):
        call = {"num_inference_steps": "steps", "guidance_scale": "guidance", "sampler": "sampler"}
        given = {call[name]: value for name, value in options.items()}
        for number in range(SEEDS):
            image = pipeline(f"a red circle {kind}", seed=number, **given).images[0]
            expected[kind, number] = image.astype(np.float64)
    metrics = Metrics()
    service = Service(lambda: Server(pipeline, most_slots=8, most_rows=8, queue=24, image=True, observer=metrics))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    app = make_app(service, Settings(model="student", images=4), metrics=metrics)
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    service.wait(120)
    while not server.started:
        time.sleep(0.01)
    run, samples, began = Soak(f"http://127.0.0.1:{port}", expected, seed=seed), [], time.monotonic()

    def sample(number: int) -> None:
        samples.append({"request": number, "seconds": round(time.monotonic() - began, 1), **resources()})

    asyncio.run(run.run(max(50, requests // 10), clients, lambda number: None))  # what is paid once is paid here
    before = settled()
    asyncio.run(run.run(requests, clients, sample))
    while service.server.stats().outstanding or service.server.stats().slots_in_use:
        time.sleep(0.01)
    after, stats = settled(), service.server.stats()
    server.should_exit = True
    thread.join()
    accepted = np.array(run.latencies) * 1e3
    return {
        "requests": sum(run.seen.values()),
        "clients": clients,
        "seen": dict(sorted(run.seen.items())),
        "wrong": run.wrong[:20],
        "worst_image_db": round(run.worst_db, 1) if np.isfinite(run.worst_db) else "identical",
        "accepted_latency_ms": {f"p{q}": round(float(np.percentile(accepted, q)), 1) for q in (50, 90, 99, 100)},
        "before": before,
        "after": after,
        "samples": samples,
        "server": {
            "accepted": stats.accepted,
            "cancelled": stats.cancelled,
            "ticks": stats.ticks,
            "failed": stats.failed,
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=320, help="ten times what the server holds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from fewstep.export.embedded import embedded_bundle

    pipeline = fewstep.load(embedded_bundle("student")[0])
    result = soak(pipeline, requests=options.requests, clients=options.clients, seed=options.seed)
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
