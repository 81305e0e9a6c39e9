"""Live sessions: every frame is the picture of its settings, the latest input wins, nothing piles up."""

from __future__ import annotations

import io
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import fewstep
import numpy as np
import pytest
from fewstep.errors import ArgumentError, CorruptError, FewstepError, UnavailableError, UnknownNameError
from fewstep.runtime.device.numpy_slots import NumpySlots
from fewstep.serving import Observer, Server
from fewstep.serving.live import Frame, LiveSession, LiveSettings, UnchangedFilter
from fewstep.serving.live.frames import Meter, Outbox
from fewstep.serving.live.hub import LiveHub
from fewstep.serving.live.noise import NoisePath
from fewstep.serving.live.pictures import MOST_BYTES, read_picture
from PIL import Image

PROMPT = "a red circle on a blue background"
OTHER = "a green square on a yellow background"


@pytest.fixture(scope="module")
def server(student: fewstep.Pipeline) -> Iterator[Server]:
    with Server(student, most_slots=8, most_rows=4, image=True) as made:
        yield made


def picture(level: int, mark: int = 0) -> np.ndarray:
    made = np.full((64, 64, 3), level, np.uint8)
    made[20:40, mark : mark + 12] = (250, 20, 20)
    return made


def wait_for(reached: Callable[[], bool], seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.002)


def frame_of(session: LiveSession, number: int) -> Frame:
    """The first frame that shows this input or a later one."""
    for frame in session.frames(timeout=30):
        if frame.input >= number:
            return frame
    raise AssertionError("no frame came")


def test_every_frame_is_the_picture_of_its_settings(server: Server, student: fewstep.Pipeline, psnr) -> None:
    """Prompt, seed, steps, sampler and guidance change between frames; a negative prompt stays when others change."""
    call: dict[str, Any] = {"prompt": PROMPT, "seed": 3, "steps": 2}
    seen: list[np.ndarray] = []
    changes: list[dict[str, Any]] = [
        {},
        {"seed": 4},
        {"negative": "blue", "guidance": 2.5},
        {"prompt": OTHER},
        {"steps": 4, "sampler": "dpmpp_2m", "schedule": "karras"},
        {"sampler": "euler_ancestral"},
        {"sampler": "lms", "schedule": "karras", "sampler_options": {"order": 2, "rho": 3}},
        {"sampler_options": {"order": 1}},
        {"steps": 1, "guidance": 0.0, "sampler": None, "schedule": None, "sampler_options": None},
    ]
    with LiveSession(server, **call) as session:
        for change in changes:
            call |= change
            frame = frame_of(session, session.update(**change))
            asked = {**call, "options": call.get("sampler_options") or {}}
            asked.pop("sampler_options", None)
            alone = student(**asked).images[0]
            assert psnr(frame.image, alone) >= 50, change
            seen.append(alone)
        assert psnr(*seen[-3:-1]) < 50, "the options change the picture"
        assert session.settings.negative == "blue"
        assert session.stats().inputs == len(changes)


@pytest.mark.parametrize(("steps", "strength", "scheduled"), [(1, 0.5, 2), (2, 0.6, 4), (3, 1.0, 3), (1, 0.02, 50)])
def test_frames_from_pictures_take_the_steps_asked_for(
    server: Server, student: fewstep.Pipeline, psnr, steps: int, strength: float, scheduled: int
) -> None:
    with LiveSession(server, prompt=PROMPT, seed=5, steps=steps, strength=strength) as session:
        frame = frame_of(session, session.push(picture(40, 16)))
        kept = min(1.0, (steps + 0.5) / scheduled)
        alone = student(PROMPT, seed=5, steps=scheduled, image=picture(40, 16), strength=kept)
        assert len(alone.timings["evaluations"]) == steps
        assert psnr(frame.image, alone.images[0]) >= 50
        back = frame_of(session, session.push(None))
        assert psnr(back.image, student(PROMPT, seed=5, steps=steps).images[0]) >= 50


def test_steps_of_successive_frames_share_evaluations(student: fewstep.Pipeline) -> None:
    """Stream batching: four-step frames, one bucket of four rows, no more evaluations than frames (and the ends)."""
    ticks: list[int] = []

    class Ticks(Observer):
        def observe(self, stage: str, took_ms: float) -> None: ...
        def tick(self, took_ms: float, *, rows: int, bucket: int, slots: int) -> None:
            ticks.append(slots)

        def ended(self, outcome: str, took_ms: float) -> None: ...
        def rejected(self, reason: str) -> None: ...

    with Server(student, buckets=[4], most_slots=8, observer=Ticks()) as server:
        with LiveSession(server, prompt=PROMPT, steps=4, noise="fresh") as session:
            batched = [f.index for f in session.frames(count=24, timeout=30)]
        wait_for(lambda: server.stats().slots_in_use == 0)
        shared = sum(n > 1 for n in ticks) / len(ticks)
        ticks.clear()
        with LiveSession(server, prompt=PROMPT, steps=4, noise="fresh", stream_batch=False) as session:
            assert len(list(session.frames(count=6, timeout=30))) == 6
        assert shared > 0.7
        assert set(ticks) == {1}
        assert batched == sorted(batched)


def test_a_picture_is_encoded_while_the_one_before_is_evaluated(
    server: Server, student: fewstep.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is, a further one is not; and a frame from noise waits for the evaluation of the one before."""
    prepared: list[bool] = []
    prepare, tick, go = student.prepare, NumpySlots.tick, threading.Event()

    def counted(request: Any, **options: Any) -> Any:
        made = prepare(request, **options)
        prepared.append(request.has_image)
        return made

    def held(*arguments: Any, **options: Any) -> None:
        assert go.wait(30)
        tick(*arguments, **options)

    with LiveSession(server, prompt=PROMPT, steps=1, strength=1.0, unchanged=UnchangedFilter(threshold=0)) as session:
        frame_of(session, session.push(picture(10)))
        wait_for(lambda: not session._flying)
        monkeypatch.setattr(student, "prepare", counted)
        monkeypatch.setattr(NumpySlots, "tick", held)
        for count, level in ((1, 60), (2, 110)):
            session.push(picture(level))
            wait_for(lambda n=count: len(prepared) == n)
        last = session.push(picture(160))
        assert not session._may_begin()
        go.set()
        assert frame_of(session, last).input == last
        assert prepared == [True] * 3
        frame_of(session, session.push(None))
        wait_for(lambda: not session._flying)
        prepared.clear()
        go.clear()
        session.update(seed=1)
        wait_for(lambda: prepared == [False])
        last = session.update(seed=2)
        assert not session._may_begin()
        go.set()
        assert frame_of(session, last).seed == 2


def test_stream_batching_changes_no_frame(server: Server, student: fewstep.Pipeline, psnr) -> None:
    with LiveSession(server, prompt=PROMPT, steps=3, seed=50, noise="fresh") as session:
        frames = list(session.frames(count=8, timeout=30))
    for frame in frames:
        assert frame.seed == 50 + frame.index
        assert psnr(frame.image, student(PROMPT, steps=3, seed=frame.seed).images[0]) >= 50


def test_a_picture_follows_the_size(student: fewstep.Pipeline) -> None:
    with (
        Server(student, sizes=[(64, 64), (96, 64)], most_slots=4, most_rows=2) as server,
        LiveSession(server, prompt=PROMPT, steps=1, strength=1.0) as session,
    ):
        frame_of(session, session.push(picture(40)))
        frame = frame_of(session, session.update(size=(96, 64)))
        assert frame.image.shape == (64, 96, 3)


def test_the_latest_input_wins(server: Server) -> None:
    with LiveSession(server, prompt=PROMPT, steps=4) as session:
        last = 0
        for i in range(40):
            last = session.push(picture(40, i))
        frame = frame_of(session, last)
        stats = session.stats()
        assert frame.input == last
        assert stats.superseded > 20
        assert stats.frames < 20
        assert session.stats().inputs == 40


def test_a_slow_reader_gets_the_newest_frame_and_stops_the_noise(server: Server) -> None:
    with LiveSession(server, prompt=PROMPT, steps=1, noise="walk") as session:
        wait_for(lambda: session.stats().frames >= 2)
        time.sleep(0.3)
        made = session.stats().frames
        time.sleep(0.3)
        assert session.stats().frames == made, "nobody looks: no frame is made"
        frame = session.take()
        assert frame is not None
        assert frame.index == made - 1
        assert session.take(30) is not None


def test_unchanged_pictures_are_skipped_and_reported(server: Server) -> None:
    events: list[Any] = []
    never = UnchangedFilter(threshold=2.0, refresh_s=1e9)
    with LiveSession(server, prompt=PROMPT, steps=1, unchanged=never, on_event=events.append) as session:
        frame_of(session, session.push(picture(40)))
        grain = np.random.default_rng(0).integers(-3, 4, (64, 64, 3))
        number = session.push((picture(40).astype(int) + grain).clip(0, 255).astype(np.uint8))
        wait_for(lambda: number in events)
        assert session.stats().unchanged == 1
        assert frame_of(session, session.push(picture(40, 30))).input == number + 1


def test_the_filter_hears_strokes_and_slow_changes_and_refreshes() -> None:
    now = [0.0]
    unchanged = UnchangedFilter(threshold=2.0, refresh_s=1.0, clock=lambda: now[0])
    base = np.full((256, 256, 3), 100, np.uint8)
    stroke = base.copy()
    stroke[3:9, 3:9] = 255
    assert unchanged.passes(base)
    assert not unchanged.passes(base)
    assert unchanged.passes(stroke), "36 of 65,536 pixels"
    assert unchanged.passes(base)
    passed = [unchanged.passes(np.full((256, 256, 3), 100 + i, np.uint8)) for i in range(1, 7)]
    assert passed == [False, True, False, True, False, True], "a drift adds up"
    assert not unchanged.passes(np.full((256, 256, 3), 106, np.uint8))
    now[0] = 1.0
    assert unchanged.passes(np.full((256, 256, 3), 106, np.uint8)), "a refresh"
    assert unchanged.passes(np.full((64, 40, 3), 106, np.uint8)) is False, "the same cells at another size"
    assert unchanged.passes(np.full((3, 5, 3), 106, np.uint8)), "too small for the grid"
    always = UnchangedFilter(threshold=0.0)
    assert always.passes(base)
    assert always.passes(base)


def test_walking_noise_is_unit_noise_all_the_way() -> None:
    path = NoisePath((4, 32, 32))
    ends = path.at(7, 0.0), path.at(7, 1.0)
    np.testing.assert_array_equal(ends[0], path.at(7, 0))
    np.testing.assert_array_equal(ends[1], path.at(8, 0))
    for position in (0.1, 0.5, 0.9, 3.5):
        assert abs(float(path.at(7, position).std()) - 1.0) < 0.05
    near = np.corrcoef(ends[0].ravel(), path.at(7, 0.05).ravel())[0, 1]
    assert math.isclose(near, math.cos(0.05 * math.pi / 2), abs_tol=0.03)
    with pytest.raises(ArgumentError, match="position"):
        path.at(0, float("nan"))


def test_walking_frames_begin_at_the_seed_and_hang_together(server: Server, student: fewstep.Pipeline, psnr) -> None:
    with LiveSession(server, prompt=PROMPT, steps=2, seed=9, noise="walk", walk=0.02) as session:
        frames = list(session.frames(count=6, timeout=30))
    assert frames[0].index == 0
    assert psnr(frames[0].image, student(PROMPT, steps=2, seed=9).images[0]) >= 50
    steps = [psnr(a.image, b.image) for a, b in pairwise(frames)]
    far = psnr(student(PROMPT, steps=2, seed=9).images[0], student(PROMPT, steps=2, seed=10).images[0])
    assert min(steps) > far
    assert max(steps) < float("inf"), "the noise moves"


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"colour": 1}, UnknownNameError, "setting 'colour'"),
        ({"steps": 0}, ArgumentError, "steps is 0"),
        ({"steps": True}, ArgumentError, "steps is True"),
        ({"steps": 2.0}, ArgumentError, "steps is 2.0"),
        ({"steps": 51}, ArgumentError, "from 1 to 50"),
        ({"strength": 0.0}, ArgumentError, "strength is 0.0"),
        ({"strength": float("nan")}, ArgumentError, "strength is nan"),
        ({"guidance": float("inf")}, ArgumentError, "guidance is inf"),
        ({"noise": "white"}, UnknownNameError, "noise 'white'"),
        ({"sampler": "euller"}, UnknownNameError, "euler"),
        ({"sampler": 3}, ArgumentError, "sampler is 3"),
        ({"prompt": 3}, ArgumentError, "prompt"),
        ({"seed": -1}, ArgumentError, "seed is -1"),
        ({"size": (128, 128)}, ArgumentError, "128x128"),
        ({"size": (7, 64)}, ArgumentError, "multiple"),
    ],
)
def test_what_cannot_be_set_changes_nothing(server: Server, change: dict[str, Any], error: Any, words: str) -> None:
    with LiveSession(server) as session:
        before = session.settings
        with pytest.raises(error, match=words):
            session.update(**change)
        assert session.settings is before
        assert session.stats().inputs == 0
        with pytest.raises(error, match=words):
            LiveSession(server, **change)


def test_a_picture_that_cannot_be_read_costs_an_error_and_no_more(server: Server) -> None:
    events: list[Any] = []
    with LiveSession(server, prompt=PROMPT, steps=1, on_event=events.append) as session:
        session.push(b"\xff\xd8 not a JPEG")
        wait_for(lambda: any(isinstance(e, CorruptError) for e in events))
        assert frame_of(session, session.update(seed=1)).image.shape == (64, 64, 3)
        assert session.stats().failed == 1


def test_pictures_are_capped_before_they_are_decoded() -> None:
    def packed(image: Image.Image, kind: str) -> bytes:
        out = io.BytesIO()
        image.save(out, kind)
        return out.getvalue()

    assert read_picture(packed(Image.new("L", (20, 30), 77), "PNG"), (8, 4)).shape == (4, 8, 3)
    with pytest.raises(ArgumentError, match="4096x2048"):
        read_picture(packed(Image.new("1", (4096, 2048)), "PNG"), (8, 8))
    with pytest.raises(ArgumentError, match="bytes"):
        read_picture(b"\0" * (MOST_BYTES + 1), (8, 8))
    small = Image.new("RGB", (8, 8))
    for data in (b"", b"GIF89a", packed(small, "BMP"), packed(small, "PNG")[:40], packed(small, "JPEG")[:200]):
        with pytest.raises(CorruptError):
            read_picture(data, (8, 8))


def test_a_session_ends_with_its_server(student: fewstep.Pipeline) -> None:
    events: list[Any] = []
    server = Server(student, most_slots=4, most_rows=2)
    session = LiveSession(server, prompt=PROMPT, steps=2, noise="fresh", on_event=events.append)
    assert session.take(30) is not None
    server.close()
    with pytest.raises(UnavailableError):
        for _ in session.frames(timeout=30):
            pass
    wait_for(lambda: session.closed)
    assert any(isinstance(e, UnavailableError) for e in events)


def test_closing_ends_the_frames_and_leaves_nothing_behind(server: Server) -> None:
    session = LiveSession(server, prompt=PROMPT, steps=4, noise="fresh")
    assert session.take(30) is not None
    session.close()
    assert list(session.frames(timeout=30)) == []
    session.close()
    wait_for(lambda: server.stats().outstanding == 0 and server.stats().slots_in_use == 0)


def test_several_sessions_and_requests_share_the_server(server: Server, student: fewstep.Pipeline, psnr) -> None:
    hub = LiveHub(server, most_sessions=2)
    one = hub.open(lambda _: None, prompt=PROMPT, steps=2, seed=1)
    two = hub.open(lambda _: None, prompt=OTHER, steps=3, seed=2)
    with pytest.raises(UnavailableError, match="2 live sessions"):
        hub.open(lambda _: None)
    ticket = server.submit(PROMPT, steps=8, seed=3)
    assert psnr(frame_of(one, 0).image, student(PROMPT, steps=2, seed=1).images[0]) >= 50
    assert psnr(frame_of(two, 0).image, student(OTHER, steps=3, seed=2).images[0]) >= 50
    assert psnr(ticket.result(30).images, student(PROMPT, steps=8, seed=3).images) >= 50
    stats = hub.stats()
    assert (stats.sessions, stats.opened, stats.refused, stats.frames) == (2, 2, 1, 2)
    hub.close()
    assert hub.stats().sessions == 0
    with pytest.raises(FewstepError):
        hub.open(lambda _: None, steps=0)
    hub.release(hub.open(lambda _: None))


def test_the_outbox_keeps_order_and_counts_what_it_drops() -> None:
    def frame(index: int) -> Frame:
        return Frame(image=np.zeros((1, 1, 3), np.uint8), index=index, input=0, seed=0, latency_ms=0.0)

    outbox = Outbox()
    assert outbox.take() is None
    assert [outbox.put(frame(i)) for i in (0, 2, 1)] == [True, True, False]
    assert outbox.dropped == 2
    taken = outbox.take()
    assert taken is not None
    assert taken.index == 2
    assert not outbox.put(frame(1)), "older than what was taken"
    outbox.put(frame(3))
    outbox.end()
    assert outbox.take() is not None
    assert outbox.take(30) is None


def test_the_meter_counts_over_a_window() -> None:
    now = [0.0]
    meter = Meter(clock=lambda: now[0])
    assert (meter.fps, meter.percentile_ms(99)) == (0.0, 0.0)
    for i in range(101):
        now[0] = i / 50
        meter.add(float(i))
    assert meter.fps == pytest.approx(50)
    assert meter.percentile_ms(50) == pytest.approx(50)
    assert meter.percentile_ms(99) == pytest.approx(99)
    now[0] = 100.0
    assert meter.fps == 0.0


def test_sessions_need_no_http() -> None:
    code = "import sys, fewstep.serving.live as live; live.LiveSession; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"starlette", "uvicorn", "msgspec", "prometheus_client", "websockets", "torch"} & set(loaded)


def test_settings_are_data() -> None:
    settings = LiveSettings(prompt="a").changed({"seed": 3, "noise": "walk"})
    assert settings.moves
    assert not LiveSettings(noise="walk", walk=0.0).moves
    assert settings.changed({}) == settings
