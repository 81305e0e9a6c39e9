"""The full-loop sums and means of diffusers' own scheduler tests (huggingface/diffusers, tests/schedulers, 58eb52c).

Their network is x t / (t + 1) on a ramp. For the schedulers with an input scaling those tests hand the *scaled* sample
to `step`, which no pipeline does and no compiled row can know of, so these are reproduced by running the sampler
functions themselves on arrays; the others by running programs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from fewstep.schedules import NoiseSchedule, compile_program, program_from_diffusers
from fewstep.schedules.compat.classes import CLASSES, solver_of
from fewstep.schedules.compat.layouts import Grid, GridRequest
from fewstep.schedules.compat.tables import Tables
from fewstep.schedules.levels import Level, Preconditioning

COUNT = 4 * 3 * 8 * 8
RAMP = (np.arange(COUNT).reshape(3, 8, 8, 4) / COUNT).transpose(3, 0, 1, 2).astype(np.float32)
NOISE = (np.arange(COUNT)[::-1].reshape(3, 8, 8, 4) / COUNT).transpose(3, 0, 1, 2).astype(np.float32)
LINEAR = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
LINEAR_1100 = {**LINEAR, "num_train_timesteps": 1100}
SCALED = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
V = {"prediction_type": "v_prediction"}
KARRAS = {"use_karras_sigmas": True}


def network(x: np.ndarray, t: float) -> np.ndarray:
    return np.asarray(x * np.float32(t / (t + 1)))


def torch_draws(seed: int = 0) -> Callable[[], np.ndarray]:
    generator = torch.manual_seed(seed)
    return lambda: torch.randn(RAMP.shape, generator=generator).numpy()


DPM = {**LINEAR, "lower_order_final": False, "final_sigmas_type": "sigma_min"}
SINGLE = {**LINEAR, "final_sigmas_type": "sigma_min"}
UNIPC = {**LINEAR, "final_sigmas_type": "sigma_min"}
PROGRAMS: list[tuple[str, dict[str, Any], int, int, str, float]] = [
    ("DDIMScheduler", {**LINEAR, "clip_sample": False}, 10, 0, "sum", 172.0067),
    ("DDIMScheduler", {**LINEAR, **V, "clip_sample": False}, 10, 0, "sum", 52.5302),
    ("DDIMScheduler", {**LINEAR, "clip_sample": False, "beta_start": 0.01}, 10, 0, "sum", 149.8295),
    (
        "DDIMScheduler",
        {**LINEAR, "clip_sample": False, "beta_start": 0.01, "set_alpha_to_one": False},
        10,
        0,
        "sum",
        149.0784,
    ),
    ("DDIMScheduler", {**LINEAR, "clip_sample": False}, 10, 8, "sum", 354.5418),
    ("DPMSolverMultistepScheduler", DPM, 10, 0, "mean", 0.3301),
    ("DPMSolverMultistepScheduler", {**DPM, **V}, 10, 0, "mean", 0.2251),
    ("DPMSolverMultistepScheduler", {**DPM, **V, **KARRAS}, 10, 0, "mean", 0.2096),
    ("DPMSolverMultistepScheduler", {**DPM, **V, "use_lu_lambdas": True}, 10, 0, "mean", 0.1554),
    ("DPMSolverMultistepScheduler", DPM, 10, 5, "sum", 318.4111),
    ("DPMSolverSinglestepScheduler", SINGLE, 10, 0, "mean", 0.2791),
    ("DPMSolverSinglestepScheduler", {**SINGLE, **KARRAS}, 10, 0, "mean", 0.2248),
    ("DPMSolverSinglestepScheduler", {**SINGLE, **V}, 10, 0, "mean", 0.1453),
    ("DPMSolverSinglestepScheduler", {**SINGLE, **V, **KARRAS}, 10, 0, "mean", 0.0649),
    ("DPMSolverSinglestepScheduler", SINGLE, 10, 5, "sum", 269.2187),
    ("DEISMultistepScheduler", LINEAR, 10, 0, "mean", 0.23916),
    ("DEISMultistepScheduler", {**LINEAR, **V}, 10, 0, "mean", 0.091),
    ("DEISMultistepScheduler", LINEAR, 10, 8, "sum", 315.3016),
    ("UniPCMultistepScheduler", UNIPC, 10, 0, "mean", 0.2464),
    ("UniPCMultistepScheduler", {**UNIPC, **KARRAS}, 10, 0, "mean", 0.2925),
    ("UniPCMultistepScheduler", {**UNIPC, **V}, 10, 0, "mean", 0.1014),
    ("UniPCMultistepScheduler", {**UNIPC, **V, **KARRAS}, 10, 0, "mean", 0.1966),
    ("UniPCMultistepScheduler", UNIPC, 10, 8, "sum", 315.5757),
    ("PNDMScheduler", LINEAR, 10, 0, "sum", 198.1318),
    ("PNDMScheduler", {**LINEAR, **V}, 10, 0, "sum", 67.3986),
    ("PNDMScheduler", {**LINEAR, "beta_start": 0.01, "set_alpha_to_one": True}, 10, 0, "sum", 230.0399),
    ("PNDMScheduler", {**LINEAR, "beta_start": 0.01}, 10, 0, "sum", 186.9482),
    ("LCMScheduler", SCALED, 1, 0, "sum", 18.7097),
    ("LCMScheduler", SCALED, 10, 0, "sum", 197.7616),
    ("TCDScheduler", SCALED, 1, 0, "sum", 29.8715),
    ("TCDScheduler", SCALED, 10, 0, "sum", 181.2040),
    ("EDMEulerScheduler", {"num_train_timesteps": 256, "sigma_min": 0.002, "sigma_max": 80.0}, 10, 0, "sum", 34.1855),
]


@pytest.mark.parametrize(("name", "config", "steps", "start", "kind", "published"), PROGRAMS)
def test_programs_give_the_published_figures(
    name: str, config: dict[str, Any], steps: int, start: int, kind: str, published: float
) -> None:
    options = {"eta": 0.0} if name == "TCDScheduler" else {}
    program = program_from_diffusers({**config, "_class_name": name}, steps=steps, start=start, **options)
    gaussian = NOISE if start else RAMP
    result = np.abs(program.run(network, gaussian, torch_draws(), RAMP))
    found = result.sum() if kind == "sum" else result.mean()
    assert found == pytest.approx(published, abs=1e-2 if kind == "sum" else 1e-3)


@dataclass
class Answer:
    x0: np.ndarray
    eps: np.ndarray
    out: np.ndarray


class ScaledArrays:
    """Stands for the tape with arrays: scales the sample it is called with in place, as those tests do."""

    def __init__(self, prediction: str, draws: Iterator[np.ndarray]) -> None:
        self.precondition = Preconditioning(prediction=prediction)
        self._draws = draws

    def __call__(self, x: np.ndarray, level: Level, keep: str = "x0") -> Answer:
        x *= level.scale
        out = network(x, level.t)
        sigma = level.sigma
        x0 = x - sigma * out
        if self.precondition.prediction == "v_prediction":
            x0 = x / (sigma**2 + 1) - out * (sigma / math.sqrt(sigma**2 + 1))
        return Answer(x0=x0, eps=(x - x0) / sigma, out=out)

    def noise(self) -> np.ndarray:
        return next(self._draws)


def grid_of(name: str, config: dict[str, Any], steps: int, start: int) -> Grid:
    tables = Tables.of(config, rescales=False, floored=True, single=True)
    request = GridRequest(tables=tables, steps=steps, timesteps=None, sigmas=None, start=start, options={})
    return CLASSES[name].layout(request)


def generator_draws() -> Iterator[np.ndarray]:
    draw = torch_draws()
    while True:
        yield draw()


def brownian_draws(grid: Grid) -> Iterator[np.ndarray]:
    """The unit increments that diffusers' seeded Brownian tree has over each half step of the path."""
    pytest.importorskip("torchsde")
    from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler

    levels = [here.sigma for here, _ in grid.path.pairs]
    tree = BrownianTreeNoiseSampler(torch.from_numpy(RAMP), min(levels), max(levels), 0)
    for here, there in grid.path.pairs:
        if there.sigma > 0.0:
            middle = math.sqrt(here.sigma * there.sigma)
            yield tree(torch.tensor(here.sigma), torch.tensor(middle)).numpy()
            yield tree(torch.tensor(middle), torch.tensor(there.sigma)).numpy()


LOOPS: list[tuple[str, dict[str, Any], int, float]] = [
    ("EulerDiscreteScheduler", {}, 0, 10.0807),
    ("EulerDiscreteScheduler", V, 0, 0.0002),
    ("EulerDiscreteScheduler", KARRAS, 0, 124.5230),
    ("EulerDiscreteScheduler", {}, 8, 57062.9297),
    ("EulerAncestralDiscreteScheduler", {}, 0, 152.3192),
    ("EulerAncestralDiscreteScheduler", V, 0, 108.4439),
    ("EulerAncestralDiscreteScheduler", {}, 8, 56163.0508),
    ("HeunDiscreteScheduler", {}, 0, 0.1233),
    ("HeunDiscreteScheduler", V, 0, 4.6934e-07),
    ("HeunDiscreteScheduler", KARRAS, 0, 0.00015),
    ("HeunDiscreteScheduler", {}, 8, 75074.8906),
    ("KDPM2DiscreteScheduler", {}, 0, 20.4125),
    ("KDPM2DiscreteScheduler", V, 0, 4.6934e-07),
    ("KDPM2DiscreteScheduler", {}, 8, 70408.4062),
    ("KDPM2AncestralDiscreteScheduler", {}, 0, 13979.9433),
    ("KDPM2AncestralDiscreteScheduler", V, 0, 331.8133),
    ("KDPM2AncestralDiscreteScheduler", {}, 8, 93087.3437),
    ("LMSDiscreteScheduler", {}, 0, 1006.388),
    ("LMSDiscreteScheduler", V, 0, 0.0017),
    ("LMSDiscreteScheduler", KARRAS, 0, 3812.9927),
    ("LMSDiscreteScheduler", {}, 8, 27663.6895),
    ("DPMSolverSDEScheduler", {}, 0, 162.5238),
    ("DPMSolverSDEScheduler", V, 0, 119.8488),
    ("DPMSolverSDEScheduler", KARRAS, 0, 170.3135),
]


@pytest.mark.parametrize(("name", "changes", "start", "published"), LOOPS)
def test_sampler_functions_give_the_published_figures(
    name: str, changes: dict[str, Any], start: int, published: float
) -> None:
    config = {**LINEAR_1100, **changes, "_class_name": name}
    grid = grid_of(name, config, 10, start)
    whole = grid_of(name, config, 10, 0)
    sampler, arguments = solver_of(name, config, {})
    draws = brownian_draws(whole) if name == "DPMSolverSDEScheduler" else generator_draws()
    x = RAMP * np.float32(whole.init_noise)
    if start:
        x = x + NOISE * np.float32(grid.path.first.sigma)
    model = ScaledArrays(str(config.get("prediction_type", "epsilon")), draws)
    result: Any = sampler.solve(model, grid.path, x.copy(), **{**sampler.presets, **arguments})
    assert np.abs(result).sum() == pytest.approx(published, abs=0.02, rel=2e-6)


class ClippedArrays:
    """The network on arrays in VP coordinates with its x0 clipped to [-1, 1], which rows cannot do."""

    def __init__(self, prediction: str, draws: Iterator[np.ndarray]) -> None:
        self.precondition = Preconditioning(prediction=prediction)
        self._draws = draws

    def __call__(self, x: np.ndarray, level: Level, keep: str = "x0") -> Answer:
        out = network(x, level.t)
        reading = self.precondition.at(level)
        x0 = np.clip(reading.x0_x * x + reading.x0_out * out, -1.0, 1.0)
        return Answer(x0=x0, eps=reading.eps_x * x + reading.eps_out * out, out=out)

    def noise(self, spread: float = 0.0) -> np.ndarray:
        assert not spread
        return next(self._draws)


@pytest.mark.parametrize(("changes", "start", "published"), [({}, 0, 258.9606), (V, 0, 202.0296), ({}, 998, 387.9466)])
def test_ddpm_with_clipped_x0_gives_the_published_sums(changes: dict[str, Any], start: int, published: float) -> None:
    config = {**LINEAR, **changes, "_class_name": "DDPMScheduler"}
    grid = grid_of("DDPMScheduler", config, 1000, start)
    sampler, arguments = solver_of("DDPMScheduler", config, {})
    first = grid.path.first
    x = first.alpha * RAMP + first.s * NOISE if start else RAMP.copy()
    model: Any = ClippedArrays(str(config.get("prediction_type", "epsilon")), generator_draws())
    result: Any = sampler.solve(model, grid.path, x.astype(np.float32), **arguments)
    # diffusers' float32 1 - alpha_bar_1 / alpha_bar_0 keeps three digits, which shows where it is half of all steps.
    assert np.abs(result).sum() == pytest.approx(published, abs=0.03 if start else 0.01)


def plms_by_hand(alpha_bar: np.ndarray, timesteps: list[int], x: np.ndarray) -> np.ndarray:
    """Pseudo linear multistep sampling as latent diffusion's first release has it (CompVis, PLMSSampler), on arrays."""
    weights = {1: [1.5, -0.5], 2: [23 / 12, -16 / 12, 5 / 12], 3: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}

    def ddim(x: np.ndarray, eps: np.ndarray, here: float, there: float) -> np.ndarray:
        x0 = (x - math.sqrt(1 - here) * eps) / math.sqrt(here)
        return math.sqrt(there) * x0 + math.sqrt(1 - there) * eps

    old: list[np.ndarray] = []
    for i, t in enumerate(timesteps):
        following = timesteps[min(i + 1, len(timesteps) - 1)]
        here, there = alpha_bar[t], alpha_bar[following] if i + 1 < len(timesteps) else 1.0
        eps = network(x, t)
        if old:
            mixed = sum(w * e for w, e in zip(weights[len(old)], [eps, *old], strict=True))
        elif len(timesteps) == 1:
            mixed = eps
        else:
            mixed = (eps + network(ddim(x, eps, here, there), following)) / 2
        x, old = ddim(x, np.asarray(mixed), here, there), [eps, *old][:3]
    return x


@pytest.mark.parametrize("timesteps", [[999], [999, 400], [900, 700, 500, 300, 100], list(range(991, 0, -10))])
def test_plms_is_the_loop_of_its_first_release(timesteps: list[int]) -> None:
    """PNDM's published sums are of its Runge-Kutta form; this is its multistep part alone."""
    noise = NoiseSchedule.from_diffusers(LINEAR)
    program = compile_program("plms", timesteps=timesteps, noise=noise)
    x = RAMP.astype(np.float64)
    by_hand = plms_by_hand(noise.alpha_bar, timesteps, x)
    result = program.run(network, x, torch_draws())
    assert program.evaluations == len(timesteps) + (len(timesteps) > 1)
    assert np.abs(result - by_hand).max() < 1e-11 * np.abs(by_hand).max()
