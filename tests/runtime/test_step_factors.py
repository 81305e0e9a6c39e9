"""Factors by step of what a UNet is told: each device takes those of a slot's own position, recorded or not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from device_models import SDXL, SHAPE, Image, engine, program
from fewstep.engines import Engine
from fewstep.errors import ArgumentError
from fewstep.runtime.device.base import Sampling, Slots
from fewstep.runtime.device.cuda_graphs import GraphCache, TapeRecorder
from fewstep.runtime.device.numpy_slots import NumpySlots
from fewstep.runtime.device.torch_slots import TorchSlots

NAME = "timestep_cond"
FACTORS = {0: (1.0, 0.0, 0.5), 1: None, 2: (0.0, 2.0, 1.0, -1.0, 3.0), 3: (0.25, 0.0)}
"""By image: of one, none, one that needs longer tables, and one that comes when another has gone."""


@pytest.fixture(scope="module")
def model() -> Engine:
    return engine("unet", SDXL)


def image(i: int) -> Image:
    factors = FACTORS[i]
    return Image(program("euler", 3 if factors is None else len(factors)), i, 1.0 + i % 2, extra=True, number=1 + i)


def asked(i: int) -> tuple[Sampling, np.ndarray]:
    sampling, gaussian, _ = image(i).sampling()
    factors = FACTORS[i]
    if factors is not None:
        steps = {NAME: np.array(factors, np.float32)}
        sampling.conditioning = replace(sampling.conditioning, steps=steps)
    return sampling, gaussian


def alone(model: Engine, i: int) -> np.ndarray:
    """The latent of an image whose arrays are made anew before each evaluation, by hand."""
    slots, (sampling, gaussian, _) = NumpySlots(model, slots=1, shape=SHAPE), image(i).sampling()
    slots.admit(sampling, gaussian)
    plain = sampling.conditioning
    for step in range(sampling.program.evaluations):
        factor = np.float32((FACTORS[i] or [1.0] * 99)[step])
        rows = [None if a is None else {**a, NAME: a[NAME] * factor} for a in (plain.positive, plain.negative)]
        assert rows[0] is not None
        sampling.conditioning = replace(plain, positive=rows[0], negative=rows[1])
        slots.tick([0])
    out = np.empty(SHAPE, np.float32)
    slots.result(0, out)
    return out


@pytest.mark.parametrize("kind", ["numpy", "torch", "recorded"])
def test_slots_take_the_factors_of_their_own_positions(model: Engine, kind: str) -> None:
    """Two slots for four images: they join and leave at different positions; the tables are grown on the way."""
    cache = GraphCache(TapeRecorder()) if kind == "recorded" else None
    slots: Slots = NumpySlots(model, slots=2, shape=SHAPE)
    if kind != "numpy":
        slots = TorchSlots(model, slots=2, shape=SHAPE, device="cpu", graphs=cache, longest_program=3)
    waiting, active, made = list(FACTORS), {}, {}
    while waiting or active:
        while waiting and slots.free:
            index = waiting.pop(0)
            active[slots.admit(*asked(index))] = index
        slots.tick(list(active))
        for slot in [s for s in active if slots.sampling(s).done]:
            made[active[slot]] = np.empty(SHAPE, np.float32)
            slots.result(slot, made[active.pop(slot)])
            slots.release(slot)
    for i, latent in made.items():
        assert np.abs(latent - alone(model, i)).max() <= 1e-4 * np.abs(latent).max(), f"image {i}"
    if cache is not None:
        assert cache.replays > cache.captures
        assert cache.failures == 0


def test_factors_matter_and_are_checked(model: Engine) -> None:
    sampling, gaussian = asked(0)
    unstepped = replace(sampling, conditioning=replace(sampling.conditioning, steps={}))
    slots = NumpySlots(model, slots=2, shape=SHAPE)
    for each in (sampling, unstepped):
        slots.admit(each, gaussian)
    for _ in range(3):
        slots.tick([0, 1])
    assert np.abs(slots.latent(0) - slots.latent(1)).max() > 1e-2
    wrong = replace(sampling.conditioning, steps={"nothing": np.ones(3, np.float32)})
    with pytest.raises(ArgumentError, match="nothing"):
        NumpySlots(model, slots=1, shape=SHAPE).admit(replace(sampling, conditioning=wrong, position=0), gaussian)
