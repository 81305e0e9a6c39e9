"""The kernels of Triton against torch's operations, which are the NumPy kernels': every sampler, mixed batches.

Without a GPU Triton's interpreter runs them: `TRITON_INTERPRET`, which the tests' configuration sets before they are
imported.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

pytest.importorskip("triton")

import torch
from fewstep.runtime.device.base import MOST_HISTORY
from fewstep.runtime.device.torch_update import Extras, TorchSlotState
from fewstep.runtime.device.triton_state import TritonSlotState
from fewstep.runtime.pictures.inpaint import make_blend
from fewstep.schedules import NoiseSchedule, Program, compile_program, program_from_diffusers
from fewstep.schedules.solvers.registry import SAMPLERS
from torch.utils._python_dispatch import TorchDispatchMode

NOISE = NoiseSchedule.scaled_linear()
SHAPE = (4, 5, 7)
GROUP = 9
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def on_the_device() -> Iterator[None]:
    """What the tests make is made there."""
    with DEVICE:
        yield


CLIPPED = {**NOISE.config, "_class_name": "DDIMScheduler", "clip_sample": True, "clip_sample_range": 0.7}


BOUNDED = {**NOISE.config, "thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.2}


def programs(names: list[str]) -> list[Program]:
    """One of each, two that clip x0, three that threshold, one of them spread, and the one that remembers most."""
    clipped = [
        program_from_diffusers({**CLIPPED, "_class_name": n}, steps=4) for n in ("DDIMScheduler", "LCMScheduler")
    ]
    kinds = ("DDIMScheduler", "DPMSolverMultistepScheduler", "DDPMScheduler")
    clipped += [program_from_diffusers({**BOUNDED, "_class_name": n, **learned(n)}, steps=4) for n in kinds]
    longest = program_from_diffusers({**NOISE.config, "_class_name": "PNDMScheduler"}, steps=5)
    assert longest.history == MOST_HISTORY
    return [*(compile_program(n, steps=3 + i % 3, noise=NOISE) for i, n in enumerate(names)), *clipped, longest]


def learned(name: str) -> dict[str, str]:
    return {"variance_type": "learned_range"} if name == "DDPMScheduler" else {}


def states(chosen: list[Program], *, blends: bool) -> tuple[TorchSlotState, TritonSlotState]:
    """Both loaded alike, with an unused slot of NaN at the end."""
    rng = np.random.default_rng(7)
    made = []
    for kind in (TorchSlotState, TritonSlotState):
        state = kind(len(chosen) + 1, SHAPE, MOST_HISTORY, longest_program=16, max_draws=12, device=DEVICE)
        state.latent.fill_(float("nan"))
        state.history.fill_(float("nan"))
        made.append(state)
    for slot, program in enumerate(chosen):
        start, latent, draws = (rng.standard_normal(s).astype(np.float32) for s in (SHAPE, SHAPE, (12, *SHAPE)))
        mask = (rng.random(SHAPE[1:]) > 0.5).astype(np.float32)
        for state in made:
            state.wipe(slot)
            blend = make_blend(program, mask, latent, start) if blends and slot % 2 else None
            state.load(slot, program, start, draws[: np.count_nonzero(program.draws)], blend)
            state.flush()
    return made[0], made[1]  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("blends", [False, True])
@pytest.mark.parametrize("at", range(0, len(SAMPLERS), GROUP))
def test_a_mixed_batch_is_what_torch_s_operations_make_of_it(at: int, blends: bool, dtype: torch.dtype) -> None:
    chosen = programs(list(SAMPLERS)[at : at + GROUP])
    ours, theirs = states(chosen, blends=blends)[::-1]
    rng = np.random.default_rng(3)
    for tick in range(max(p.evaluations for p in chosen)):
        active = [slot for slot, p in enumerate(chosen) if tick < p.evaluations]
        guided = [slot % 3 != 0 for slot in active]
        slot_of_row = torch.tensor([s for s, g in zip(active, guided, strict=True) for _ in range(1 + g)])
        ends = np.cumsum([1 + g for g in guided])
        rows_of = torch.tensor([[end - 1 - g, end - 1] for end, g in zip(ends, guided, strict=True)])
        weights = torch.tensor([[-2.0, 3.0] if g else [0.0, 1.0] for g in guided])
        fed = []
        for state in (ours, theirs):
            sample, timestep = torch.empty((len(slot_of_row), *SHAPE), dtype=dtype), torch.empty(len(slot_of_row))
            state.model_input(slot_of_row, sample, timestep)
            fed.append((sample, timestep))
        assert torch.equal(fed[0][1], fed[1][1])
        assert torch.allclose(fed[0][0].float(), fed[1][0].float(), rtol=1e-3, atol=1e-6)
        out, said = (torch.from_numpy(rng.standard_normal(tuple(fed[0][0].shape))).to(DEVICE, dtype) for _ in range(2))
        spread = torch.tensor([chosen[s].spread is not None for s in slot_of_row.tolist()])
        said[~spread] = float("nan")
        previews = [torch.zeros((len(active), *SHAPE)) for _ in range(2)]
        before = theirs.latent.abs().amax((1, 2, 3))
        for state, x0 in zip((ours, theirs), previews, strict=True):
            clips = [chosen[s].clip for s in active if chosen[s].clip is not None]
            extras = Extras(
                previews=bool(tick % 2),
                blends=blends,
                clips=bool(clips),
                thresholds=any(c.bound.ratio is not None for c in clips),
                spreads=bool(spread.any()),
            )
            state.step(out, rows_of, weights, torch.tensor(active), x0=x0, extras=extras, variance=said)
        assert torch.allclose(previews[0], previews[1], rtol=2e-5, atol=1e-5)
        assert torch.equal(ours.position, theirs.position)
        for slot, program in zip(active, (chosen[s] for s in active), strict=True):
            scale = max(theirs.latent[slot].abs().max(), before[slot])
            assert (ours.latent[slot] - theirs.latent[slot]).abs().max() <= 3e-6 * scale, program.sampler
    assert ours.latent[-1].isnan().all(), "a slot that takes no part is left alone"


@pytest.mark.parametrize("shape", [(5, 4, 3, 7), (3, 4, 20, 24)])
def test_frames_are_guided_each_by_its_own_factor(shape: tuple[int, ...]) -> None:
    """As NumPy says it; the second shape has frames that no block of the kernel begins with."""
    program, rng = compile_program("euler", steps=2, noise=NOISE), np.random.default_rng(5)
    start, out = (rng.standard_normal(s).astype(np.float32) for s in (shape, (3, *shape)))
    factors = np.linspace(1.0, 4.0, shape[0], dtype=np.float32)
    weights = torch.from_numpy(np.stack([[1 - factors, factors], [0 * factors, 0 * factors + 1]]))
    by_frame = factors[:, None, None, None]
    guided = out[0] + by_frame * (out[1] - out[0])
    latents = []
    for kind in (TorchSlotState, TritonSlotState):
        state = kind(3, shape, MOST_HISTORY, device=DEVICE)
        for slot in (0, 1):
            state.load(slot, program, start)
        state.flush()
        x0, rows_of = torch.zeros((2, *shape)), torch.tensor([[0, 1], [2, 2]])
        given = torch.from_numpy(out).to(DEVICE), rows_of, weights.to(DEVICE), torch.tensor([0, 1])
        state.step(*given, x0=x0, extras=Extras(previews=True))
        expected = np.stack([program.x0_x[0] * start + program.x0_out[0] * o for o in (guided, out[2])])
        np.testing.assert_allclose(x0.cpu().numpy(), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
        latents.append(state.latent[:2].cpu())
    assert torch.allclose(latents[0], latents[1], rtol=2e-5, atol=1e-5)


def test_a_tick_is_three_kernels() -> None:
    """Beside the UNet; each is an operator of torch's, so that whatever records operators records it."""

    class Count(TorchDispatchMode):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if not func.is_view and "new_empty" not in str(func):
                self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    chosen = programs(["euler", "dpmpp_2m"])[:2]
    _, state = states(chosen, blends=False)
    slots, rows = torch.tensor([0, 1]), torch.tensor([[0, 0], [1, 1]])
    sample, timestep, weights = torch.empty((2, *SHAPE)), torch.empty(2), torch.tensor([[0.0, 1.0]] * 2)
    x0 = torch.empty((2, *SHAPE))
    with Count() as seen:
        state.model_input(slots, sample, timestep)
        state.step(sample, rows, weights, slots, x0=x0, extras=Extras())
    assert seen.names == ["fewstep.gather.default", "fewstep.advance.default"]
