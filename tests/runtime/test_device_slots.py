"""The device's slots on CPU tensors against the NumPy slots: every sampler, mixed batches, joining and leaving."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from device_models import SDXL, SHAPE, Image, engine, program, psnr, unet
from fewstep.engines import Engine
from fewstep.errors import NonFiniteError
from fewstep.runtime.device.numpy_slots import NumpySlots
from fewstep.runtime.device.torch_slots import TorchSlots
from fewstep.schedules.solvers.registry import SAMPLERS

NAMES = sorted(set(SAMPLERS) - {"edm_euler"})


@pytest.fixture(scope="module")
def model() -> Engine:
    return unet()


def on_device(model: Engine, count: int, **options: Any) -> TorchSlots:
    return TorchSlots(model, slots=count, shape=SHAPE, device="cpu", **options)


def run(slots: Any, images: list[Image]) -> list[np.ndarray]:
    """All images, each admitted as soon as a slot is free."""
    waiting, active, done = list(range(len(images))), {}, {}
    while waiting or active:
        while waiting and slots.free:
            index = waiting.pop(0)
            active[slots.admit(*images[index].sampling())] = index
        slots.tick(list(active))
        for slot in [s for s in active if slots.sampling(s).done]:
            done[active.pop(slot)] = out = np.empty(SHAPE, np.float32)
            slots.result(slot, out)
            slots.release(slot)
    return [done[i] for i in range(len(images))]


def assert_same(found: list[np.ndarray], expected: list[np.ndarray], names: list[str]) -> None:
    for name, one, other in zip(names, found, expected, strict=True):
        assert psnr(one, other) >= 60.0, f"{name}: {psnr(one, other):.1f} dB"


def test_every_sampler_in_one_mixed_batch(model: Engine) -> None:
    """Other samplers, step counts, starts and guidance share each evaluation, and slots are given on."""
    images = [
        Image(program(name, 4 + i % 5, start=i % 3), seed=i, guidance=(1.0, 7.5, 3.0)[i % 3])
        for i, name in enumerate(NAMES)
    ]
    expected = run(NumpySlots(model, slots=5, shape=SHAPE), images)
    assert_same(run(on_device(model, 5), images), expected, NAMES)


def test_noise_is_that_of_the_seed_whatever_draws_it(model: Engine) -> None:
    """Stochastic samplers take all of their noise when they are admitted, here more than there was room for."""
    images = [Image(program(name, 9), seed=3) for name in ("euler_ancestral", "lcm", "dpmpp_sde", "ddpm")]
    assert max(np.count_nonzero(i.program.draws) for i in images) > 4
    names = [i.program.sampler for i in images]
    assert_same(run(on_device(model, 1), images), run(NumpySlots(model, slots=1, shape=SHAPE), images), names)


def test_prompts_of_other_lengths_and_what_sdxl_is_told() -> None:
    model = engine("unet", SDXL, 4)
    images = [Image(program("euler", 3), i, (1.0, 4.0)[i % 2], (5, 10)[i // 2], extra=True) for i in range(4)]
    expected = run(NumpySlots(model, slots=4, shape=SHAPE), images)
    assert_same(run(on_device(model, 4), images), expected, ["a", "b", "c", "d"])
    swapped = [replace(i, number=7 - i.seed) for i in images]
    with pytest.raises(AssertionError):
        assert_same(run(on_device(model, 4), swapped), expected, ["a", "b", "c", "d"])


def test_padding_goes_to_a_scrap_slot(model: Engine) -> None:
    image = Image(program("dpmpp_2m", 5), 1, 2.0)
    plain, padded = on_device(model, 1), on_device(model, 1)
    results = []
    for slots, rows in ((plain, None), (padded, 4)):
        slot = slots.admit(*image.sampling())
        for _ in range(5):
            slots.tick([slot], rows=rows)
        out = np.empty(SHAPE, np.float32)
        slots.result(slot, out)
        results.append(out)
    assert psnr(results[1], results[0]) >= 100.0


def test_previews_are_those_of_the_numpy_slots(model: Engine) -> None:
    image, found = Image(program("dpmpp_2m", 4, prediction="v_prediction"), 2, 3.0), []
    for slots in (NumpySlots(model, slots=1, shape=SHAPE), on_device(model, 1)):
        slot = slots.admit(*image.sampling())
        x0 = np.empty((4, *SHAPE), np.float32)
        for i in range(4):
            slots.tick([slot], {slot: x0[i]})
        found.append(x0)
    assert psnr(found[1], found[0]) >= 60.0


def test_a_nan_stays_with_its_slot_and_goes_with_it(model: Engine) -> None:
    slots = on_device(model, 2)
    image = Image(program("dpmpp_3m", 4), 1, 3.0)
    (expected,) = run(NumpySlots(model, slots=1, shape=SHAPE), [image])
    sampling, gaussian, latent = Image(program("dpmpp_3m", 4), 8, 3.0).sampling()
    broken, good = slots.admit(sampling, np.full_like(gaussian, np.nan), latent), slots.admit(*image.sampling())
    for _ in range(4):
        slots.tick([broken, good])
    out = np.empty(SHAPE, np.float32)
    with pytest.raises(NonFiniteError, match="latent holds NaN"):
        slots.result(broken, out)
    slots.result(good, out)
    assert psnr(out, expected) >= 60.0
    slots.release(broken)
    slots.release(good)
    (again,) = run(slots, [image])
    assert psnr(again, expected) >= 60.0


def test_room_is_made_for_longer_programs_though_others_are_under_way(model: Engine) -> None:
    images = [Image(program("dpmpp_3m", 4), 0, 2.0), Image(program("euler_ancestral", 70), 1)]
    slots = on_device(model, 2, longest_program=4, draws=1)
    first = slots.admit(*images[0].sampling())
    slots.tick([first])
    before = slots.bytes
    second, found = slots.admit(*images[1].sampling()), [np.empty(SHAPE, np.float32) for _ in images]
    assert slots.bytes > before
    for i in range(70):
        slots.tick([first, second] if i < 3 else [second])
    for slot, out in zip((first, second), found, strict=True):
        slots.result(slot, out)
    assert_same(found, run(NumpySlots(model, slots=1, shape=SHAPE), images), ["short", "long"])


def test_stages_are_timed(model: Engine) -> None:
    slots = on_device(model, 1)
    run(slots, [Image(program("euler", 3), 1, 2.0)])
    times = slots.take_times()
    assert len(times.evaluations) == 3
    assert min(times.evaluations) > 0
    assert times.update > 0
    assert times.gather > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device: host syncs are not counted")
def test_a_tick_synchronises_with_the_host_never() -> None:
    """Torch's own debug mode makes any synchronisation an error; the first tick may allocate and choose kernels."""
    model = unet(torch_device="cuda")
    slots = TorchSlots(model, slots=2, shape=SHAPE, device="cuda")
    held = [slots.admit(*Image(program("dpmpp_2m", 6), i, 2.0).sampling()) for i in range(2)]
    slots.tick(held)
    slots.wait()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            slots.tick(held)
    finally:
        torch.cuda.set_sync_debug_mode("default")
