"""Slots walking different programs in one batch: each must come out as its program alone does."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from fewstep.errors import ArgumentError
from fewstep.runtime.device.base import MOST_HISTORY
from fewstep.runtime.device.numpy_update import SlotState
from fewstep.schedules import NoiseSchedule, Program, compile_program, program_from_diffusers
from fewstep.schedules.solvers.registry import SAMPLERS

SHAPE = (3, 5, 4)
NOISE = NoiseSchedule.scaled_linear()
NAMES = sorted(set(SAMPLERS) - {"edm_euler"})


def network(x: np.ndarray, t: float) -> np.ndarray:
    return np.asarray(np.tanh(x * np.float32(0.8) + np.float32(t / 2000)))


def programs() -> list[Program]:
    """One program a sampler, of different lengths, schedules, predictions and starts, and PNDM's Runge-Kutta form."""
    schedules, predictions = ("trailing", "karras", "ays"), ("epsilon", "v_prediction", "sample")
    return [
        compile_program(
            name,
            schedule=schedules[i % 3],
            steps=4 + i % 7,
            start=i % 3,
            noise=NOISE,
            prediction=predictions[i % 2],
        )
        for i, name in enumerate(NAMES)
    ] + [program_from_diffusers({**NOISE.config, "_class_name": "PNDMScheduler"}, steps=7, start=s) for s in (0, 2)]


def material(count: int, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    shape = (count, *SHAPE)
    start, latent = rng.standard_normal(shape), rng.standard_normal(shape)
    return start.astype(np.float32), latent.astype(np.float32), rng.standard_normal((rows, *shape)).astype(np.float32)


def alone(program: Program, start: np.ndarray, latent: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """The reference loop's state at the end (not in diffusers' coordinates)."""
    source = iter(draws)
    result = program.run(network, start, lambda: next(source), latent)
    return np.asarray(result / program.state_scale[-1], np.float32)


def test_every_sampler_in_one_batch_is_as_it_is_alone() -> None:
    chosen = programs()
    start, latent, draws = material(len(chosen), 40)
    state = SlotState(len(chosen) + 1, SHAPE, MOST_HISTORY)
    # Every slot has had an image whose network overflowed.
    for array in (state.latent, state.history, state.noise, state._held):
        array.fill(np.nan)
    for slot, program in enumerate(chosen):
        state.wipe(slot)
        state.latent[slot] = program.init_noise * start[slot] + program.init_latent * latent[slot]
    drawn = [0] * len(chosen)
    inputs = np.empty((len(chosen), *SHAPE), np.float32)
    for tick in range(max(program.evaluations for program in chosen)):
        active = [slot for slot, program in enumerate(chosen) if tick < program.evaluations]
        active = active[::-1] if tick % 2 else active
        for j, slot in enumerate(active):
            if chosen[slot].draws[tick]:
                state.noise[slot] = draws[drawn[slot], slot]
                drawn[slot] += 1
            state.model_input(slot, chosen[slot], tick, inputs[j])
        outputs = np.stack([network(inputs[j], chosen[slot].timesteps[tick]) for j, slot in enumerate(active)])
        state.advance(active, [chosen[slot] for slot in active], [tick] * len(active), outputs)
    for slot, program in enumerate(chosen):
        expected = alone(program, start[slot], latent[slot], draws[:, slot])
        assert np.abs(state.latent[slot] - expected).max() < 2e-5 * np.abs(expected).max(), program.sampler
        assert np.isfinite(state.latent[slot]).all()
    assert np.isnan(state.latent[-1]).all()


CLIPPED = [
    ("DDIMScheduler", {"eta": 0.4}),
    ("DDPMScheduler", {}),
    ("HeunDiscreteScheduler", {}),
    ("LCMScheduler", {}),
]


@pytest.mark.parametrize(("name", "step"), CLIPPED)
def test_clipping_is_the_reference_loops(name: str, step: dict[str, Any]) -> None:
    config = {**NOISE.config, "_class_name": name, "clip_sample": True, "clip_sample_range": 0.7}
    program = program_from_diffusers(config, steps=6, **step)
    plain = program_from_diffusers({**config, "clip_sample": False}, steps=6, **step)
    start, latent, draws = material(1, 20)
    state, drawn, preview = SlotState(1, SHAPE, 4), iter(draws[:, 0]), np.empty(SHAPE, np.float32)
    state.latent[:] = program.init_noise * start
    for i in range(program.evaluations):
        if program.draws[i]:
            state.noise[0] = next(drawn)
        output = network(program.input_scale[i] * state.latent, program.timesteps[i])
        state.preview(0, program, i, output[0], preview)
        assert np.abs(preview).max() <= np.float32(0.7)
        state.advance([0], [program], [i], output)
    expected = alone(program, start[0], latent[0], draws[:, 0])
    assert np.abs(state.latent[0] - expected).max() < 2e-5 * np.abs(expected).max()
    assert np.abs(expected - alone(plain, start[0], latent[0], draws[:, 0])).max() > 0.05


BOUNDED = {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.2}
THRESHOLDED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("DDIMScheduler", {}, {"eta": 0.4}),
    ("DDPMScheduler", {"variance_type": "learned_range"}, {}),
    ("DPMSolverMultistepScheduler", {}, {}),
    ("UniPCMultistepScheduler", {}, {}),
    ("DEISMultistepScheduler", {}, {}),
    ("DPMSolverSinglestepScheduler", {"solver_order": 3}, {}),
]


def variance(x: np.ndarray, t: float) -> np.ndarray:
    """What the stand-in says of its variance."""
    return np.sin(x.dtype.type(3.0) * x + x.dtype.type(t / 300)) * x.dtype.type(1.1)


@pytest.mark.parametrize(("name", "config", "step"), THRESHOLDED)
def test_thresholding_and_learned_variance_are_the_reference_loops(
    name: str, config: dict[str, Any], step: dict[str, Any]
) -> None:
    whole = {**NOISE.config, "_class_name": name, **BOUNDED, **config}
    program = program_from_diffusers(whole, steps=6, **step)
    plain = program_from_diffusers({**whole, "thresholding": False}, steps=6, **step)
    start, _, draws = material(1, 20)
    state, drawn, preview = SlotState(1, SHAPE, 6), iter(draws[:, 0]), np.empty(SHAPE, np.float32)
    state.latent[:] = program.init_noise * start
    for i in range(program.evaluations):
        if program.draws[i]:
            state.noise[0] = next(drawn)
        x, t = program.input_scale[i] * state.latent, float(program.timesteps[i])
        state.preview(0, program, i, network(x, t)[0], preview)
        assert np.abs(preview).max() <= np.float32(1.0)
        state.advance([0], [program], [i], network(x, t), variance(x, t))
    results = []
    for one in (program, plain):
        again = iter(draws[:, 0])

        def model(x: np.ndarray, t: float, *, says: bool = one.spread is not None) -> Any:
            out = network(x[None], t)[0]
            return (out, variance(x[None], t)[0]) if says else out

        results.append(one.run(model, start[0].astype(np.float64), lambda a=again: next(a)))  # type: ignore[misc]
    expected, unbounded = results
    assert np.abs(state.latent[0] - expected).max() < 2e-5 * np.abs(expected).max()
    assert np.abs(expected - unbounded).max() > 0.01
    if program.spread is not None:
        with pytest.raises(ArgumentError, match="variance"):
            state.advance([0], [program], [0], network(x, t))


def test_what_a_wipe_is_for() -> None:
    """Without it the former image's NaN comes back through the history of a multistep program."""
    program = compile_program("dpmpp_2m", steps=3, noise=NOISE)
    for wipe in (True, False):
        state = SlotState(1, SHAPE, 2)
        state.latent[:], state.history[:] = np.nan, np.nan
        if wipe:
            state.wipe(0)
        for i in range(3):
            state.advance([0], [program], [i], np.ones((1, *SHAPE), np.float32))
        assert np.isfinite(state.latent).all() == wipe


def test_half_precision_engines_leave_the_state_in_float32() -> None:
    program = compile_program("unipc_2", steps=6, noise=NOISE)
    start, latent, draws = material(1, 1)
    state = SlotState(1, SHAPE, 4)
    state.latent[:] = start
    buffer = np.empty((1, *SHAPE), np.float16)
    for i in range(6):
        state.model_input(0, program, i, buffer[0])
        state.advance([0], [program], [i], network(buffer.astype(np.float32), program.timesteps[i]).astype(np.float16))
    expected = alone(program, start[0], latent[0], draws[:, 0])
    assert state.latent.dtype == np.float32
    assert 0 < np.abs(state.latent[0] - expected).max() < 0.02


def test_previews_are_x0() -> None:
    program = compile_program("euler", steps=5, noise=NOISE, prediction="v_prediction")
    start, _, _ = material(1, 1)
    state = SlotState(1, SHAPE, 1)
    state.latent[:] = start
    out = network(start, 0.0)
    into = np.empty(SHAPE, np.float32)
    state.preview(0, program, 2, out[0], into)
    assert np.allclose(into, program.x0_x[2] * start[0] + program.x0_out[2] * out[0], atol=1e-6)
    state.finish(0, program, into)
    assert np.array_equal(into, state.latent[0])


def test_nothing_is_allocated_in_a_tick() -> None:
    shape = (4, 64, 64)
    chosen = [compile_program(name, steps=8, noise=NOISE) for name in ("euler", "dpmpp_3m_sde", "plms", "unipc_3")]
    state = SlotState(4, shape, 4)
    outputs = np.ones((4, *shape), np.float32)
    buffer = np.empty((4, *shape), np.float32)
    for i in (0, 1):
        state.advance(range(4), chosen, [i] * 4, outputs)
    tracemalloc.start()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    for i in (2, 3, 4):
        for slot in range(4):
            state.model_input(slot, chosen[slot], i, buffer[slot])
        state.advance(range(4), chosen, [i] * 4, outputs)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak - before < outputs[0].nbytes / 4


def test_a_new_program_in_a_used_slot_is_noticed() -> None:
    first, second = (compile_program("euler", steps=n, noise=NOISE) for n in (4, 9))
    state = SlotState(1, SHAPE, 1)
    start, _, _ = material(1, 1)
    for program in (first, second):
        state.latent[:] = start
        state.advance([0], [program], [0], start)
        assert np.allclose(state.latent, (program.a[0] + program.b[0, 0]) * start, atol=1e-5)


@pytest.mark.parametrize("arguments", [(0, SHAPE, 1), (1, (0, 2), 1), (1, SHAPE, 0)])
def test_impossible_sizes(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ArgumentError, match="positive"):
        SlotState(*arguments)


def test_too_little_history_is_an_error_of_its_own() -> None:
    program = compile_program("unipc_3", steps=9, noise=NOISE)
    state = SlotState(1, SHAPE, 2)
    with pytest.raises(ArgumentError, match="larger history"):
        state.advance([0], [program], [0], np.ones((1, *SHAPE), np.float32))


def test_the_torch_form_is_the_numpy_form() -> None:
    """On CPU tensors: the arithmetic and the gathers, not the device."""
    torch = pytest.importorskip("torch")
    from fewstep.runtime.device.torch_update import TorchSlotState

    chosen = programs()
    start, latent, draws = material(len(chosen), 40)
    state = TorchSlotState(len(chosen), SHAPE, MOST_HISTORY, longest_program=32, max_draws=40, device="cpu")
    state.latent.fill_(float("nan"))
    state.history.fill_(float("nan"))
    for slot, program in enumerate(chosen):
        state.wipe(slot)
        begin = program.init_noise * start[slot] + program.init_latent * latent[slot]
        state.load(slot, program, begin.astype(np.float32), draws[: np.count_nonzero(program.draws), slot])
    state.flush()
    for tick in range(max(program.evaluations for program in chosen)):
        active = [slot for slot, program in enumerate(chosen) if tick < program.evaluations]
        index = torch.tensor(active)
        inputs, fed = torch.empty((len(active), *SHAPE)), torch.empty(len(active))
        state.model_input(index, inputs, fed)
        outputs = np.stack([network(x, t) for x, t in zip(inputs.numpy(), fed.tolist(), strict=True)])
        state.advance(index, torch.from_numpy(outputs))
    for slot, program in enumerate(chosen):
        expected = alone(program, start[slot], latent[slot], draws[:, slot])
        found = state.latent[slot].numpy()
        assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max(), program.sampler


def test_the_torch_form_refuses_what_does_not_fit() -> None:
    pytest.importorskip("torch")
    from fewstep.runtime.device.torch_update import TorchSlotState

    state = TorchSlotState(1, SHAPE, 2, longest_program=4, device="cpu")
    start = np.zeros(SHAPE, np.float32)
    with pytest.raises(ArgumentError, match="longest_program"):
        state.load(0, compile_program("euler", steps=9, noise=NOISE), start)
    with pytest.raises(ArgumentError, match="history"):
        state.load(0, compile_program("lms", steps=4, noise=NOISE), start)
    with pytest.raises(ArgumentError, match="draws 4 times and is given 0"):
        state.load(0, compile_program("euler_ancestral", steps=4, noise=NOISE), start)
