"""Captured work on CPU tensors: one recording serves other seeds, prompts, samplers and schedules of its length."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from device_models import SHAPE, Image, decoder, program, psnr, unet
from fewstep.engines import Engine
from fewstep.errors import ArgumentError
from fewstep.runtime.device.base import Slots
from fewstep.runtime.device.cuda_graphs import CaptureError, GraphCache, GraphKey, TapeRecorder
from fewstep.runtime.device.numpy_slots import NumpySlots
from fewstep.runtime.device.torch_slots import TorchSlots

KEY = GraphKey(kind="tick", shape=(2,), slots=1, rows=1, tokens=1, evaluations=1, engines=())


@pytest.fixture(scope="module")
def model() -> Engine:
    return unet()


@pytest.fixture(scope="module")
def vae() -> Engine:
    return decoder()


def captured(model: Engine, count: int, **options: Any) -> TorchSlots:
    cache = GraphCache(TapeRecorder(), **options)
    return TorchSlots(model, slots=count, shape=SHAPE, device="cpu", graphs=cache)


def by_numpy(model: Engine, vae: Engine, images: list[Image]) -> np.ndarray:
    """The pictures of a request by the NumPy slots and the decoder alone."""
    slots = NumpySlots(model, slots=len(images), shape=SHAPE)
    held = [slots.admit(*image.sampling()) for image in images]
    for _ in range(images[0].program.evaluations):
        slots.tick(held)
    binding = vae.bind({"batch": len(images), "height": 8, "width": 8})
    for slot, into in zip(held, binding.inputs["latent"], strict=True):
        slots.result(slot, into)
    binding.enqueue()
    return np.array(binding.outputs["image"])


def whole(slots: Slots, vae: Engine, images: list[Image]) -> np.ndarray:
    held = [slots.admit(*image.sampling()) for image in images]
    decoded = slots.run(held, vae)
    assert decoded.finite.all()
    for slot in held:
        slots.release(slot)
    return decoded.images


def test_a_whole_request_is_one_recording_for_all_of_its_length(model: Engine, vae: Engine) -> None:
    """Another seed, prompt, guidance scale, sampler, schedule and prediction: replayed, nothing recorded anew."""
    requests = [
        [Image(program("euler", 4), seed, 3.0) for seed in (1, 2)],
        [Image(program("euler", 4), seed, 7.5) for seed in (3, 4)],
        [Image(program("dpmpp_3m_sde", 4, schedule="karras"), seed, 2.0) for seed in (5, 6)],
        [Image(program("unipc_2", 4, schedule="trailing", prediction="v_prediction"), seed, 4.0) for seed in (7, 8)],
        [Image(program("heun", 2, schedule="ays"), 9, 1.5), Image(program("lcm", 4), 10, 5.0)],
    ]
    requests[-1][0] = Image(program("lms", 4), 9, 1.5)
    slots = captured(model, 2)
    for i, images in enumerate(requests):
        found, expected = whole(slots, vae, images), by_numpy(model, vae, images)
        assert psnr(found, expected) >= 60.0, images[0].program.sampler
        assert np.abs(found.astype(int) - expected).max() <= 1
        assert slots.graphs is not None
        assert (slots.graphs.captures, slots.graphs.replays, slots.graphs.failures) == (1, i + 1, 0)
    assert slots.graphs.bytes > 0


def test_another_length_or_number_of_rows_is_another_recording(model: Engine, vae: Engine) -> None:
    slots = captured(model, 1, most=2)
    graphs = slots.graphs
    assert graphs is not None
    for steps, guidance, captures in ((2, 1.0, 1), (3, 1.0, 2), (2, 1.0, 2), (3, 2.0, 3), (2, 1.0, 3), (3, 1.0, 4)):
        whole(slots, vae, [Image(program("euler", steps), 1, guidance)])
        assert graphs.captures == captures
        assert len(graphs) <= 2
    assert graphs.evictions == 2


def test_shared_ticks_replay_for_whoever_is_in(model: Engine) -> None:
    """A recording a bucket: slots that join and leave, at different rows of different programs."""
    images = [Image(program(n, 3 + i), i, 2.0) for i, n in enumerate(("euler", "dpmpp_2m", "ddpm", "lms", "unipc_2"))]
    slots, expected = captured(model, 2), []
    for image in images:
        alone = NumpySlots(model, slots=1, shape=SHAPE)
        alone.admit(*image.sampling())
        for _ in range(image.program.evaluations):
            alone.tick([0])
        out = np.empty(SHAPE, np.float32)
        alone.result(0, out)
        expected.append(out)
    waiting, active = list(range(len(images))), {}
    while waiting or active:
        while waiting and slots.free:
            index = waiting.pop(0)
            active[slots.admit(*images[index].sampling())] = index
        slots.tick(list(active))
        for slot in [s for s in active if slots.sampling(s).done]:
            out, index = np.empty(SHAPE, np.float32), active.pop(slot)
            slots.result(slot, out)
            slots.release(slot)
            assert psnr(out, expected[index]) >= 60.0
    assert slots.graphs is not None
    assert slots.graphs.captures == 2  # of two slots, and of the one that is left in the end
    assert slots.graphs.replays > 6


def test_previews_are_recorded_too(model: Engine) -> None:
    slots, plain = captured(model, 1), NumpySlots(model, slots=1, shape=SHAPE)
    image = Image(program("dpmpp_2m", 4), 2, 3.0)
    slots.admit(*image.sampling())
    plain.admit(*image.sampling())
    for _ in range(4):
        found, expected = np.empty(SHAPE, np.float32), np.empty(SHAPE, np.float32)
        slots.tick([0], {0: found})
        plain.tick([0], {0: expected})
        assert psnr(found, expected) >= 60.0


def test_a_moved_buffer_or_a_reloaded_engine_drops_the_recording(model: Engine, vae: Engine) -> None:
    slots = captured(model, 1)
    image = Image(program("euler", 2), 1, 2.0)
    first = whole(slots, vae, [image])
    graphs = slots.graphs
    assert graphs is not None
    slots._values = slots._values.grown(128, 8)
    np.testing.assert_array_equal(whole(slots, vae, [image]), first)
    assert (graphs.captures, graphs.invalidations) == (2, 1)
    assert graphs.invalidate(model) == 1
    assert graphs.invalidate(model) == 0
    np.testing.assert_array_equal(whole(slots, vae, [image]), first)
    assert graphs.captures == 3
    whole(slots, vae, [Image(program("euler_ancestral", 40), 1, 2.0)])  # its noise needs more room
    assert len(graphs) == 1


def test_what_reads_on_the_host_is_not_captured_but_done_and_said(
    model: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    state, done = torch.ones(3), []

    def body() -> None:
        state.add_(1.0)
        if float(state.sum()) > 0:  # a value decides what runs: no recording can hold that
            done.append(1)

    cache = GraphCache(TapeRecorder())
    with caplog.at_level(logging.WARNING):
        cache.run(KEY, body, restore=[state])
        cache.run(KEY, body, restore=[state])
    assert (len(done), state[0].item()) == (2, 3.0)
    assert (cache.failures, cache.captures, cache.replays) == (1, 0, 0)
    assert [r.message for r in caplog.records if "could not be captured" in r.message] != []
    assert len(caplog.records) == 1
    for wrong in (lambda: torch.tensor([1.0, 2.0]), lambda: state[state > 0], lambda: state.sum().item()):
        with pytest.raises(CaptureError, match="captured"):
            TapeRecorder().capture(wrong)  # type: ignore[arg-type]


def test_the_tape_sees_only_tensors() -> None:
    """What Python computes between operations is frozen into the recording; what tensors hold is not."""
    source, target, factor = torch.ones(2), torch.zeros(2), [2.0]
    graph = TapeRecorder().capture(lambda: target.copy_((source * factor[0])[None].squeeze(0).contiguous() + source))  # type: ignore[arg-type, return-value]
    assert target.tolist() == [3.0, 3.0]
    source.fill_(5.0)
    factor[0] = 100.0
    graph.replay()
    assert target.tolist() == [15.0, 15.0]


def test_a_whole_request_needs_slots_at_their_beginning(model: Engine, vae: Engine) -> None:
    slots = captured(model, 2)
    held = [slots.admit(*Image(program("euler", n), n).sampling()) for n in (2, 3)]
    with pytest.raises(ArgumentError, match="slots of one request at its beginning"):
        slots.run(held, vae)
    with pytest.raises(ArgumentError, match="at least 1 graph"):
        GraphCache(TapeRecorder(), most=0)


def test_a_latent_that_is_not_finite_is_flagged(model: Engine, vae: Engine) -> None:
    slots = captured(model, 2)
    sampling, gaussian, latent = Image(program("euler", 2), 1).sampling()
    held = [slots.admit(*Image(program("euler", 2), 2).sampling()), slots.admit(sampling, gaussian * np.nan, latent)]
    assert slots.run(held, vae).finite.tolist() == [True, False]
