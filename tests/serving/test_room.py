"""Room for requests: shares, short requests beside greedy callers, and memory that follows admission."""

from __future__ import annotations

import asyncio
import io
import re
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import fewstep
import httpx
import pytest
from counts import count
from fewstep.errors import QueueFullError
from fewstep.serving import Server
from fewstep.serving.room import Held, Room, kept
from http_service import serve_process, wait_until
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

ROOM = Room(images=40, work_s=10.0)
FORM = {"prompt": "a", "size": "64x64"}


def test_one_caller_leaves_a_quarter_to_others() -> None:
    there: list[Held] = []
    for _ in range(15):
        assert not ROOM.admit(Held(images=2, work_s=0.1, owner="a"), there)
        there.append(Held(images=2, work_s=0.1, owner="a"))
    with pytest.raises(QueueFullError, match=r"30 images of this caller.*at most 30 of one caller"):
        ROOM.admit(Held(images=2, work_s=0.1, owner="a"), there)
    assert not ROOM.admit(Held(images=2, work_s=0.1, owner="b"), there)
    assert not ROOM.admit(Held(images=2, work_s=0.1), there), "nobody's in particular"
    with pytest.raises(QueueFullError, match="30 images are waiting"):
        ROOM.admit(Held(images=12, work_s=0.1, owner="b"), there)


def test_short_requests_have_places_of_their_own() -> None:
    there = [Held(images=8, work_s=2.0, owner="a")] * 5
    for asked in (Held(images=1, work_s=2.0), Held(images=1, work_s=0.51)):
        with pytest.raises(QueueFullError, match="40 images are waiting") as caught:
            ROOM.admit(asked, there)
        assert caught.value.retry_after_s > 0
    short = Held(images=1, work_s=0.1, owner="a")
    for _ in range(kept(40)):
        assert ROOM.admit(short, there)
        there.append(short)
    with pytest.raises(QueueFullError, match="45 images are waiting"):
        ROOM.admit(Held(images=1, work_s=0.1), there)


held = st.builds(
    Held, images=st.integers(1, 12), work_s=st.floats(0.0, 5.0), owner=st.sampled_from([None, "a", "b", "c"])
)


@given(st.lists(held, max_size=60), held, st.integers(1, 60), st.floats(0.1, 20.0))
def test_it_is_bounded_whatever_is_asked(asked: list[Held], last: Held, images: int, work_s: float) -> None:
    room, there = Room(images=images, work_s=work_s), list[Held]()
    for one in [*asked, last]:
        try:
            room.admit(one, there)
        except QueueFullError:
            assert there, "a server with nothing to do takes any"
            continue
        assert len(there) == 0 or sum(h.images for h in there) + one.images <= images + kept(images)
        there.append(one)


def test_a_short_request_finds_slots_beside_long_ones(student: fewstep.Pipeline) -> None:
    with Server(student, most_slots=8, queue=8, most_rows=8) as server:
        long = [server.submit("a ring", steps=100, seed=[i, i + 1, i + 2, i + 3]) for i in range(4)]
        wait_until(lambda: server.stats().slots_in_use == 8)
        for i in range(10):
            began = time.monotonic()
            server.submit("a ring", steps=1, seed=i, owner="x").result(60)
            assert not all(t.done for t in long) or time.monotonic() - began < 60
        assert not all(t.done for t in long), "it waited for nobody to end"
        for ticket in long:
            ticket.cancel()


def test_a_greedy_caller_starves_nobody() -> None:
    """Two dozen connections in a loop, and a client that asks for one image of one step now and then."""
    over = threading.Event()
    with serve_process("--slots", "8", "--queue", "16") as (url, _):
        greedy: list[int] = []

        def ask() -> None:
            body = {"prompt": "a red circle", "n": 8, "num_inference_steps": 100}
            with httpx.Client(timeout=120) as client, suppress(httpx.HTTPError):
                while not over.is_set():
                    greedy.append(client.post(f"{url}/v1/images/generations", json=body).status_code)

        threads = [threading.Thread(target=ask, daemon=True) for _ in range(12)]
        for thread in threads:
            thread.start()
        wait_until(lambda: 429 in greedy)
        honest, waits = [], list[float]()
        for _ in range(15):
            body, began = {"prompt": "a ring", "num_inference_steps": 1}, time.monotonic()
            honest.append(httpx.post(f"{url}/v1/images/generations", json=body, timeout=120).status_code)
            waits.append(time.monotonic() - began)
        over.set()
        print(f"one step beside 12 greedy connections: {sorted(waits)[7]:.2f} s, at worst {max(waits):.2f} s")
        assert honest.count(200) == len(honest), honest
        for thread in threads:
            thread.join(60)


def peak_bytes(process: int) -> int:
    """The most memory that a process has held so far."""
    status = Path(f"/proc/{process}/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system tells no process's memory")
def test_memory_follows_admission() -> None:
    """Large pictures in a few kilobytes, 150 or 500 at once: what is decoded together is bounded, not what comes."""
    tried, side = count(150, 500), count(2048, 4096)
    picture, pixels = png(side), side * side

    async def flood(url: str) -> list[int]:
        limits = httpx.Limits(max_connections=tried)
        async with httpx.AsyncClient(timeout=600, limits=limits) as client:

            async def one() -> int:
                form: dict[str, Any] = {"data": FORM, "files": {"image": ("x.png", picture)}}
                return (await client.post(f"{url}/v1/images/edits", **form)).status_code

            return list(await asyncio.gather(*(one() for _ in range(tried))))

    with serve_process() as (url, process):
        asyncio.run(flood_once(url, png(16)))  # the model's memory
        before = peak_bytes(process.pid)
        statuses = asyncio.run(flood(url))
        grown = peak_bytes(process.pid) - before
        assert process.stderr is not None
        printed = re.search(r"take ([0-9.]+) GiB at most", process.stderr.read())
    assert set(statuses) <= {200, 429}
    assert statuses.count(200) >= 32
    assert printed is not None
    bound, one = float(printed[1]) * 2**30, 18 * pixels
    print(
        f"{tried} edits of {len(picture) / 1024:.0f} KiB at once: {grown / 1e6:.0f} MB beside the model, "
        f"{bound / 1e6:.0f} MB is the bound that is printed, {one / 1e6:.0f} MB a picture that is decoded"
    )
    assert grown < bound
    bodies, allocator = 64 * 1024 * 1024, 64 * 1024 * 1024
    assert grown < 2 * one + bodies + allocator < tried * 3 * pixels


def png(side: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(out, "PNG")
    return out.getvalue()


async def flood_once(url: str, picture: bytes) -> None:
    async with httpx.AsyncClient(timeout=300) as client:
        answer = await client.post(f"{url}/v1/images/edits", data=FORM, files={"image": ("x.png", picture)})
        assert answer.status_code == 200
