"""The server in a process: many requests at once, each as if it were alone; refusals, cancels, deadlines, failures."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace
from typing import Any

import fewstep
import numpy as np
import pytest
from fewstep.errors import (
    ArgumentError,
    CancelledError,
    DeadlineError,
    EngineFailedError,
    NonFiniteError,
    QueueFullError,
    UnavailableError,
)
from fewstep.runtime.device.pool import SlotPool
from fewstep.serving import Server

MIXED: list[dict[str, Any]] = [
    {"steps": 1},
    {"steps": 4},
    {"steps": 2, "sampler": "lcm", "schedule": None},
    {"steps": 9, "sampler": "dpmpp_2m", "schedule": "karras", "guidance": 3.0},
    {"steps": 6, "sampler": "euler_ancestral", "guidance": 1.5, "negative": "blue"},
    {"steps": 5, "sampler": "heun"},
    {"steps": 12, "sampler": "unipc"},
    {"steps": 4, "seed": [5, 6, 7]},
    {"steps": 7, "sampler": "lms"},
    {"steps": 3, "sampler": "dpmpp_2m_sde", "guidance": 2.0},
]


def submit_mixed(server: Server, times: int = 1) -> list[tuple[dict[str, Any], fewstep.Result]]:
    calls = [{"prompt": f"a red circle {i}", "seed": i, **kind} for i, kind in enumerate(MIXED * times)]
    tickets = [server.submit(**call) for call in calls]
    return [(call, ticket.result(60)) for call, ticket in zip(calls, tickets, strict=True)]


def test_every_image_made_under_load_is_the_one_made_alone(server: Server, student: fewstep.Pipeline, psnr) -> None:
    for call, result in submit_mixed(server):
        alone = student(**call)
        assert psnr(result.images, alone.images) >= 50.0, call
        assert result.seeds == alone.seeds
        assert result.parameters == alone.parameters
    assert server.stats().utilisation > 0.5


@pytest.mark.parametrize("row_threads", [1, 2])
def test_images_are_bit_identical_on_the_same_bucket(student: fewstep.Pipeline, row_threads: int) -> None:
    with Server(student, buckets=[4], row_threads=row_threads, most_slots=16, queue=100) as server:
        assert server.stats().buckets["64x64"].keys() == {4}
        together = submit_mixed(server)
        for call, result in together:
            alone = server.generate(**call)
            np.testing.assert_array_equal(alone.latents, result.latents, err_msg=str(call))
            np.testing.assert_array_equal(alone.images, result.images, err_msg=str(call))


@pytest.fixture
def spoiled(student: fewstep.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts that say so come out of preparation broken; everything else is real."""
    prepare = student.prepare

    def broken(request: Any) -> Any:
        prepared = prepare(request)
        (sampling, *_), prompt = prepared.samplings, request.prompts[0]
        hidden = sampling.conditioning.positive["encoder_hidden_states"].copy()
        if prompt.startswith("spoil the embedding"):
            hidden[3, 2] = np.nan
            hidden = hidden[:, :-1] if prompt.endswith("shape") else hidden
            arrays = {**sampling.conditioning.positive, "encoder_hidden_states": hidden}
            told = replace(sampling.conditioning, positive=arrays)
            return replace(prepared, samplings=(replace(sampling, conditioning=told),))
        if prompt == "spoil the noise":
            prepared.gaussians[0, 1] = np.inf
        if prompt == "spoil the guidance":
            return replace(prepared, samplings=(replace(sampling, guidance=float("nan")),))
        if prompt == "raise":
            raise RuntimeError("/a/path/that/must/not/be/told")
        return prepared

    monkeypatch.setattr(student, "prepare", broken)


@pytest.mark.usefixtures("spoiled")
def test_a_request_that_fails_fails_alone(server: Server, student: fewstep.Pipeline, psnr) -> None:
    kinds = {
        "spoil the embedding": (NonFiniteError, "encoder_hidden_states holds NaN"),
        "spoil the embedding's shape": (ArgumentError, "encoder_hidden_states has shape"),
        "spoil the noise": (NonFiniteError, "starting latent holds NaN"),
        "spoil the guidance": (NonFiniteError, "the latent holds NaN"),
        "raise": (fewstep.FewstepError, r"could not be prepared \(RuntimeError\)"),
    }
    good = [server.submit("a circle", seed=i, steps=3) for i in range(2)]
    bad = {prompt: server.submit(prompt, steps=3, guidance=2.0) for prompt in kinds}
    good += [server.submit("a circle", seed=i, steps=3) for i in range(2, 4)]
    for prompt, (kind, words) in kinds.items():
        with pytest.raises(kind, match=words) as caught:
            bad[prompt].result(60)
        assert "/a/path" not in str(caught.value)
    for seed, ticket in enumerate(good):
        assert psnr(ticket.result(60).images, student("a circle", seed=seed, steps=3).images) >= 50.0
    after = server.generate("a circle", seed=1, steps=3)
    assert psnr(after.images, student("a circle", seed=1, steps=3).images) >= 50.0, "slots are clean again"
    assert server.ready


def test_cancelled_and_late_requests_free_their_slots(server: Server) -> None:
    long = [server.submit("a ring", steps=120, seed=[1, 2, 3, 4]) for _ in range(3)]
    late = server.submit("a ring", steps=200, deadline_s=0.3)
    for step in long[0].steps():
        if step.index == 3:
            break
    assert all(ticket.cancel() for ticket in long)
    assert not long[0].cancel(), "it is settled"
    with pytest.raises(CancelledError):
        long[1].result(5)
    with pytest.raises(DeadlineError, match="was not finished after"):
        late.result(10)
    assert server.generate("a ring", seed=1).images.shape == (1, 64, 64, 3)
    deadline = time.monotonic() + 10
    while server.stats().slots_in_use and time.monotonic() < deadline:
        time.sleep(0.01)
    stats = server.stats()
    assert (stats.slots_in_use, stats.outstanding) == (0, 0)


def test_steps_and_previews(server: Server) -> None:
    ticket = server.submit("a ring", seed=3, steps=5, previews=True)
    steps = list(ticket.steps())
    assert [s.index for s in steps] == [0, 1, 2, 3, 4]
    assert np.abs(steps[-1].preview().astype(int) - ticket.result().images).mean() < 3
    with pytest.raises(ArgumentError, match="makes no previews"):
        next(iter(server.submit("a ring", steps=2).steps())).preview()


def test_asyncio(server: Server) -> None:
    async def work() -> None:
        results = await asyncio.gather(*(server.agenerate("a star", seed=i) for i in range(6)))
        assert [r.seeds for r in results] == [(i,) for i in range(6)]
        ticket = server.submit("a star", seed=0, steps=6, previews=True)
        seen = [step.index async for step in ticket.asteps()]
        assert seen == list(range(6))
        assert (await ticket).seeds == (0,)
        slow = server.submit("a star", steps=300)
        waiting = asyncio.ensure_future(_wait(slow))
        await asyncio.sleep(0.05)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        with pytest.raises(CancelledError):
            slow.result(5)
        failed = server.submit("a star", steps=300, deadline_s=0.05)
        with pytest.raises(DeadlineError):
            async for _ in failed.asteps():
                pass

    async def _wait(ticket: Any) -> Any:
        return await ticket

    asyncio.run(work())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": (32, 32)}, "size is 32x32; expected one of 64x64"),
        ({"seed": list(range(17))}, "17 images in one request; expected at most 16"),
        ({"steps": 0}, "steps is 0"),
        ({"deadline_s": 0}, "deadline_s is 0"),
        ({"deadline_s": float("nan")}, "deadline_s is nan"),
        ({"sampler": "nonsense"}, "unknown sampler"),
    ],
)
def test_what_is_wrong_is_said_at_once(server: Server, options: dict[str, Any], words: str) -> None:
    with pytest.raises(fewstep.FewstepError, match=words):
        server.submit("a ring", **options)


def test_a_full_queue_refuses_and_says_when_to_come_again(student: fewstep.Pipeline) -> None:
    with Server(student, most_slots=2, queue=3, most_rows=2) as server:
        accepted = [server.submit("a ring", steps=8, seed=i) for i in range(5)]
        with pytest.raises(QueueFullError, match="5 images are waiting") as caught:
            server.submit("a ring", steps=8)
        assert 0.0 < caught.value.retry_after_s < 60.0
        assert [ticket.result(60).seeds for ticket in accepted] == [(i,) for i in range(5)]
        assert server.stats().rejected == 1
    with Server(student, most_slots=2, most_work_s=0.05, most_rows=2) as server:
        first = server.submit("a ring", steps=100)
        with pytest.raises(QueueFullError, match="s of work are waiting"):
            server.submit("a ring")
        first.cancel()


def test_draining_finishes_what_was_accepted_and_closing_does_not(student: fewstep.Pipeline) -> None:
    server = Server(student, most_slots=4, most_rows=4)
    tickets = [server.submit("a ring", seed=i) for i in range(6)]
    assert server.drain(60)
    assert all(ticket.error is None for ticket in tickets)
    with pytest.raises(UnavailableError, match="draining"):
        server.submit("a ring")
    server.close()
    server = Server(student, most_slots=4, most_rows=4)
    long = server.submit("a ring", steps=300)
    assert not server.drain(0.05)
    threads = threading.active_count()
    server.close()
    with pytest.raises(UnavailableError, match="closed before"):
        long.result(5)
    assert threading.active_count() == threads - 4, "its threads have ended"
    with pytest.raises(UnavailableError, match="closed"):
        server.submit("a ring")


def test_slots_of_a_torch_device_are_served_alike(student: fewstep.Pipeline, psnr) -> None:
    """The GPU's slots on CPU tensors: the same requests give the images of the NumPy slots."""
    pipeline = fewstep.load(student.bundle, device="cpu:torch", mode="shared", threads=1)
    with Server(pipeline, most_slots=4, most_rows=4) as server:
        calls = [{"prompt": "a ring", "seed": i, **kind} for i, kind in enumerate(MIXED[:5])]
        for call, ticket in [(call, server.submit(**call)) for call in calls]:
            assert psnr(ticket.result(60).images, student(**call).images) >= 50.0, call


class Breaking:
    """A UNet's engine that can be made to raise or to hang inside an evaluation, as a lost device does."""

    def __init__(self, engine: Any) -> None:
        self._engine, self.broken, self.stuck = engine, False, threading.Event()
        self.stuck.set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def bind(self, dims: Any) -> Any:
        outer, binding = self, self._engine.bind(dims)

        class Bound:
            inputs, outputs = binding.inputs, binding.outputs

            def enqueue(self, stream: int | None = None) -> None:
                outer.stuck.wait()
                if outer.broken:
                    raise RuntimeError("CUDA error 700: an illegal memory access was encountered")
                binding.enqueue(stream)

        return Bound()


@pytest.fixture
def breaking(student: fewstep.Pipeline, monkeypatch: pytest.MonkeyPatch) -> Breaking:
    engine = Breaking(student.engines["unet"])
    monkeypatch.setitem(student.engines, "unet", engine)
    monkeypatch.setattr(student, "_pool", SlotPool(lambda *of: student.device.make_slots(engine, *of), keep=1))
    return engine


def test_an_engine_that_raises_ends_everything_and_the_server_says_so(
    student: fewstep.Pipeline, breaking: Breaking
) -> None:
    server = Server(student, most_slots=4, most_rows=4)
    assert server.ready
    tickets = [server.submit("a ring", steps=300, seed=i) for i in range(6)]
    next(iter(tickets[0].steps()))
    breaking.broken = True
    for ticket in tickets:
        with pytest.raises(EngineFailedError, match=r"evaluation failed \(RuntimeError\)"):
            ticket.result(10)
    assert (server.ready, server.state) == (False, "failed")
    with pytest.raises(EngineFailedError):
        server.submit("a ring")
    server.close()


def test_a_tick_that_hangs_takes_the_server_out_of_service(student: fewstep.Pipeline, breaking: Breaking) -> None:
    server = Server(student, most_slots=4, most_rows=4, hung_s=0.5)
    breaking.stuck.clear()
    ticket = server.submit("a ring")
    with pytest.raises(EngineFailedError, match="has been running for"):
        ticket.result(10)
    assert not server.ready
    breaking.stuck.set()
    server.close()
