"""Thousands of requests over HTTP with cancels, disconnects, bad inputs and overload: nothing leaks, nothing is wrong.

    python bench/soak.py [--requests 10000] [--no-attacks] [--json FILE]

`fewstep serve` runs the embedded student in a process of its own; ten times as many clients as it holds requests send
one after the other, while others attack it (attackers.py). Each image that comes back is compared with the one made
alone (50 dB). The server's memory, open files and threads are read as it goes, and its own figures at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import random
import re
import sys
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from fewstep.bench.attackers import Attackers, under_attack
from fewstep.bench.live import serving
from fewstep.bench.machine import describe
from fewstep.runtime import load
from PIL import Image

SLOTS, QUEUE = 8, 24
SERVER = ("--threads", "1", "--slots", str(SLOTS), "--queue", str(QUEUE), "--rows", "8", "--most-images", "4")
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

        async def client() -> None:  # with a connection of its own: a pool of hundreds costs more than the requests
            async with httpx.AsyncClient(base_url=self.url, timeout=120, verify=False, trust_env=False) as http:  # noqa: S501 the client of plain HTTP on loopback
                for number in numbers:
                    await self._one(http)
                    if number % max(1, count // 20) == 0:
                        sample(number)

        await asyncio.gather(*(client() for _ in range(clients)))

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


def resources(pid: int) -> dict[str, float]:
    """Resident memory in MB, open files and threads of a process (Linux)."""
    process = Path(f"/proc/{pid}")
    pages = int((process / "statm").read_text().split()[1])
    return {
        "memory_mb": round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1),
        "files": len(list((process / "fd").iterdir())),
        "threads": len(list((process / "task").iterdir())),
    }


def settled(url: str, pid: int) -> dict[str, float]:
    """`resources` once nothing is in progress and connections that clients left are closed, or after ten seconds."""
    while any(figures(url)[f"fewstep_{name}"] for name in ("outstanding", "slots_in_use")):
        time.sleep(0.02)
    latest = resources(pid)
    for _ in range(20):
        time.sleep(0.5)
        last, latest = latest, resources(pid)
        if (last["files"], last["threads"]) == (latest["files"], latest["threads"]):
            break
    return latest


def figures(url: str) -> dict[str, float]:
    """The server's metrics, by name with labels."""
    text = httpx.get(f"{url}/metrics").text
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[0] != "#"}


def summed(samples: dict[str, float], name: str, label: str, *, of: str = "") -> dict[str, int]:
    """The values of a metric, summed by one of its labels; `of` must be among the others."""
    sums: Counter[str] = Counter()
    for key, value in samples.items():
        if key.startswith(f"{name}{{") and of in key and (match := re.search(f'{label}="([^"]*)"', key)):
            sums[match[1]] += int(value)
    return dict(sorted(sums.items()))


def made_alone() -> dict[tuple[int, int], np.ndarray]:
    """What each kind of request gives, by kind and seed, as float64 [H, W, 3]."""
    from fewstep.export.embedded import embedded_bundle

    pipeline, expected = load(embedded_bundle("student")[0]), {}
    call = {"num_inference_steps": "steps", "guidance_scale": "guidance", "sampler": "sampler"}
    for kind, options in enumerate(KINDS):
        given = {call[name]: value for name, value in options.items()}
        for number in range(SEEDS):
            image = pipeline(f"a red circle {kind}", seed=number, **given).images[0]
            expected[kind, number] = image.astype(np.float64)
    return expected


def soak(*, requests: int, clients: int, seed: int = 0, attacks: bool = True) -> dict[str, Any]:
    """Run it, and say what was seen."""
    machine, expected = describe(1), made_alone()
    with serving(*SERVER) as (url, process):
        run, samples, began = Soak(url, expected, seed=seed), [], time.monotonic()

        def sample(number: int) -> None:
            at = round(time.monotonic() - began, 1)
            samples.append({"request": number, "seconds": at, **resources(process.pid)})

        attackers = Attackers(url, seed=seed)

        async def attacked(count: int, sample: Any) -> None:
            async with under_attack(attackers) if attacks else nullcontext():
                await run.run(count, clients, sample)

        asyncio.run(attacked(max(50, requests // 10), lambda number: None))  # what is paid once is paid here
        before, first, began = settled(url, process.pid), len(run.latencies), time.monotonic()
        asyncio.run(attacked(requests, sample))
        seconds = time.monotonic() - began
        after, samples = settled(url, process.pid), figures(url)
    accepted = np.array(run.latencies[first:]) * 1e3
    statuses = summed(samples, "fewstep_http_responses_total", "status", of='route="/v1/images/')
    if "500" in statuses:
        run.wrong.append(f"the server counts {statuses['500']} responses of 500")
    return {
        "what": (__doc__ or "").split("\n")[0],
        "machine": machine,
        "requests": sum(run.seen.values()),
        "clients": clients,
        "held_by_the_server": SLOTS + QUEUE,
        "seconds": round(seconds, 1),
        "seen": dict(sorted(run.seen.items())),
        "attacks": dict(sorted(attackers.seen.items())),
        "wrong": [*run.wrong, *attackers.wrong][:20],
        "worst_image_db": round(run.worst_db, 1) if np.isfinite(run.worst_db) else "identical",
        "accepted_latency_ms": {f"p{q}": round(float(np.percentile(accepted, q)), 1) for q in (50, 90, 99, 100)},
        "before": before,
        "after": after,
        "samples": samples,
        "server": {
            "responses": statuses,
            "outcomes": summed(samples, "fewstep_requests_total", "outcome"),
            "refusals": summed(samples, "fewstep_rejections_total", "reason"),
            "ticks": int(samples["fewstep_tick_rows_count"]),
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=10 * (SLOTS + QUEUE), help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-attacks", action="store_true", help="honest and careless clients alone")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = soak(requests=options.requests, clients=options.clients, seed=options.seed, attacks=not options.no_attacks)
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
