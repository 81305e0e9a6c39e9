"""What the samplers promise, whatever diffusers does: accuracy, exactness, finite rows."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fewstep.errors import ArgumentError
from fewstep.schedules import NoiseSchedule, Program, compile_program
from fewstep.schedules.solvers.registry import SAMPLERS
from fewstep.schedules.spacing import SPACINGS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

NOISE = NoiseSchedule.scaled_linear()
ZERO_SNR = NoiseSchedule.from_diffusers({**NOISE.config, "rescale_betas_zero_snr": True})
ANY_SIGMA = NoiseSchedule.from_diffusers({**NOISE.config, "timestep_type": "continuous"})
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def vp_readout(prediction: str, x: np.ndarray, x0: np.ndarray, sigma: float) -> np.ndarray:
    """The network output that says x0 at a VP state x."""
    alpha, s = 1 / math.sqrt(1 + sigma**2), sigma / math.sqrt(1 + sigma**2)
    eps = (x - alpha * x0) / s
    return {"epsilon": eps, "v_prediction": alpha * eps - s * x0, "sample": x0}[prediction]


class Denoiser:
    """The exact denoiser of Gaussian data N(mean, variance), as a network that is called once a row."""

    def __init__(self, program: Program, mean: float, variance: float) -> None:
        self.sigmas, self.mean, self.variance = iter(program.sigmas), mean, variance
        self.prediction = program.prediction

    def __call__(self, x: np.ndarray, t: float) -> np.ndarray:
        sigma = float(next(self.sigmas))
        scaled = x * math.sqrt(1 + sigma**2)
        x0 = self.mean + self.variance / (self.variance + sigma**2) * (scaled - self.mean)
        return vp_readout(self.prediction, x, x0, sigma)


def ode_error(name: str, steps: int, low: float = 0.3, high: float = 200.0) -> float:
    """The error at sigma `low` of the probability-flow ODE of N(0.7, 1), whose solution is known, from `high`."""
    options = {"lower_order_final": False} if "lower_order_final" in SAMPLERS[name].options else {}
    program = compile_program(name, sigmas=list(np.geomspace(high, low, steps + 1)), noise=ANY_SIGMA, **options)
    gaussian = np.array([1.3, -0.4, 0.2])
    result = program.run(Denoiser(program, 0.7, 1.0), gaussian, lambda: np.zeros(3))
    if SAMPLERS[name].latent_space == "vp":
        result = result * math.sqrt(1 + low**2)
    start = gaussian * math.sqrt(1 + high**2)
    exact = 0.7 + (start - 0.7) * math.sqrt((1 + low**2) / (1 + high**2))
    return float(np.abs(result - exact).max())


DETERMINISTIC = [
    s.name for s in SAMPLERS.values() if s.name != "edm_euler" and (s.draws == "never" or s.name in ("euler", "ddim"))
]


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_error_falls_at_the_stated_order(name: str) -> None:
    order = SAMPLERS[name].order
    coarse, fine = (ode_error(name, steps) for steps in (192, 384))
    measured = math.log2(coarse / fine)
    assert order - 0.2 < measured < order + 0.5, f"{name}: measured order {measured:.2f}, stated {order}"


def test_the_published_third_order_term_costs_an_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why the clean 3M differs from diffusers': half the curvature term leaves second order."""
    clean = SAMPLERS["dpmpp_3m"]
    published = replace(clean, name="published", order=2, presets={**clean.presets, "published": True})
    monkeypatch.setitem(SAMPLERS, "published", published)
    measured = math.log2(ode_error("published", 192) / ode_error("published", 384))
    assert 1.8 < measured < 2.4


STOCHASTIC: list[tuple[str, dict[str, Any]]] = [
    *((s.name, {}) for s in SAMPLERS.values() if s.draws.startswith(("always", "second"))),
    ("ddpm", {}),
    ("ddpm", {"large_variance": True}),
    ("ddim", {"eta": 1.0}),
    ("ddim", {"eta": 0.5}),
    ("euler", {"s_churn": 10.0}),
]


def variance_error(name: str, options: dict[str, Any], steps: int) -> float:
    """How far the variance of the samples of N(0, 1/4) is off, exactly: states are rows of factors of each draw.

    The exact denoiser is linear, so the result is a linear form of the start and the draws, which the reference loop
    computes if it is run on the unit vectors of that space.
    """
    sigmas = list(np.geomspace(80.0, 0.05, steps + 1))
    program = compile_program(name, sigmas=sigmas, noise=ANY_SIGMA, **options)
    size = 1 + int(program.draws.sum())
    basis = iter(np.eye(size)[1:])
    result = program.run(Denoiser(program, 0.0, 0.25), np.eye(size)[0], lambda: next(basis))
    scale = math.sqrt(1 + sigmas[-1] ** 2) if SAMPLERS[name].latent_space == "vp" else 1.0
    return abs(float((result**2).sum()) * scale**2 - (0.25 + sigmas[-1] ** 2))


@pytest.mark.parametrize(("name", "options"), STOCHASTIC)
def test_stochastic_samplers_converge_to_the_right_variance(name: str, options: dict[str, Any]) -> None:
    coarse, fine = variance_error(name, options, 100), variance_error(name, options, 200)
    assert fine < 0.05
    assert coarse / fine > 1.7, f"{name}: {coarse:.2e} -> {fine:.2e}"


ENDING = [s.name for s in SAMPLERS.values() if s.exact and s.name != "edm_euler"]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", ENDING)
def test_a_perfect_denoiser_ends_on_x0(name: str, prediction: str) -> None:
    rng = np.random.default_rng(1)
    for schedule, steps, start in (("trailing", 1, 0), ("karras", 6, 0), ("ays", 10, 3), ("leading", 17, 0)):
        program = compile_program(name, schedule=schedule, steps=steps, start=start, noise=NOISE, prediction=prediction)
        x0 = rng.standard_normal(50)
        sigmas = iter(program.sigmas)
        result = program.run(
            lambda x, t, x0=x0, sigmas=sigmas: vp_readout(prediction, x, x0, float(next(sigmas))),
            rng.standard_normal(50),
            lambda: rng.standard_normal(50),
            x0,
        )
        assert np.abs(result - x0).max() < 1e-9, (schedule, steps)


def test_lcm_does_not_promise_it() -> None:
    assert not SAMPLERS["lcm"].exact


@st.composite
def combinations(draw: st.DrawFn) -> dict[str, Any]:
    name = draw(st.sampled_from(sorted(SAMPLERS)))
    schedules = [s for s in SPACINGS if s not in ("ays_deepfloyd", "ays_svd")]
    if name == "edm_euler":
        schedules = ["karras", "exponential", "beta"]
    schedule = draw(st.sampled_from(schedules))
    steps = draw(st.integers(1, {"lcm": 50, "turbo_tenths": 10}.get(schedule, 60)))
    predictions = ("epsilon", "v_prediction") if name == "edm_euler" else PREDICTIONS
    last: Any = draw(st.sampled_from(["zero", "sigma_min", 0.001]))
    return {
        "sampler": name,
        "schedule": schedule,
        "steps": steps,
        "start": draw(st.integers(0, steps - 1)),
        "prediction": draw(st.sampled_from(predictions)),
        "last_sigma": last,
        "noise": draw(st.sampled_from([NOISE, NoiseSchedule.from_diffusers({"beta_schedule": "linear"})])),
    }


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(combinations())
def test_any_valid_combination_compiles_to_finite_rows(chosen: dict[str, Any]) -> None:
    try:
        program = compile_program(**chosen)
    except ArgumentError as error:
        # A published table may reach beyond this noise schedule, above its greatest sigma or below its least.
        if "last_sigma" in str(error) or "trained to" in str(error):
            return
        raise
    assert program.evaluations >= chosen["steps"] - chosen["start"]
    assert program.history <= 5
    for name in ("a", "b", "c", "c_prev", "h_x", "h_out", "x0_x", "x0_out", "state_scale", "timesteps"):
        assert np.isfinite(getattr(program, name)).all(), name
    again = Program.from_json(program.to_json())
    for name in Program.__dataclass_fields__:
        assert np.array_equal(getattr(again, name), getattr(program, name)), name


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"edm_euler"}))
def test_a_last_step_of_no_length_compiles_and_leaves_the_state(name: str) -> None:
    """linspace ends on the least sigma, so that asking for it as the last one makes a step from there to there."""
    program = compile_program(name, schedule="linspace", steps=7, noise=NOISE, last_sigma="sigma_min")
    assert program.sigmas[-1] == program.sigmas[-2]
    if not name.startswith("unipc"):  # whose corrector still has the step before to mend
        assert program.a[-1] / program.state_scale[-2] == pytest.approx(1.0, abs=1e-12)
        assert not np.delete(program.b[-1], program.write[-1]).any()
        assert program.c[-1] == 0.0


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(set(SAMPLERS) - {"edm_euler"})), st.integers(1, 25))
def test_zero_terminal_snr_starts_at_pure_noise(name: str, steps: int) -> None:
    program = compile_program(name, schedule="trailing", steps=steps, noise=ZERO_SNR, prediction="v_prediction")
    assert program.timesteps[0] == 999
    assert program.sigmas[0] == pytest.approx(4096, rel=1e-6)
    out = np.array([0.3, -0.2])
    first = program.x0_x[0] * np.array([1.0, 2.0]) + program.x0_out[0] * out
    assert np.allclose(first, -out, atol=1e-3)


def test_epsilon_says_nothing_at_zero_terminal_snr() -> None:
    with pytest.raises(ArgumentError, match="v_prediction"):
        compile_program("ddim", schedule="trailing", steps=4, noise=ZERO_SNR, prediction="epsilon")


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"edm_euler"}))
def test_starting_late_is_compiled_anew(name: str) -> None:
    """The first row after skipped steps uses no history, and starts from latent and noise at its level."""
    program = compile_program(name, schedule="karras", steps=9, start=4, noise=NOISE)
    own = program.write[0]
    assert not np.delete(program.b[0], own).any()
    sigma = program.sigmas[0]
    assert program.init_latent == pytest.approx(1 / math.sqrt(1 + sigma**2))
    assert program.init_noise == pytest.approx(sigma / math.sqrt(1 + sigma**2))
    whole = compile_program(name, schedule="karras", steps=9, noise=NOISE)
    assert np.array_equal(np.unique(program.timesteps), np.unique(whole.timesteps)[: len(np.unique(program.timesteps))])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_reference_loop_keeps_the_float_type(dtype: Any) -> None:
    program = compile_program("dpmpp_sde", steps=3, start=1, noise=NOISE)
    one = np.ones((2, 3), dtype)
    fed: list[Any] = []

    def network(x: np.ndarray, t: float) -> np.ndarray:
        fed.append((x.dtype, type(t)))
        return x

    assert program.run(network, one, lambda: one, one).dtype == dtype
    assert fed == [(dtype, float)] * program.evaluations


def test_previews_and_callback_scales() -> None:
    program = compile_program("euler", steps=4, noise=NOISE)
    assert np.allclose(program.state_scale[:-1], np.sqrt(1 + program.sigmas[:-1] ** 2))
    assert program.state_scale[-1] == 1.0
    assert np.all(compile_program("dpmpp_2m", steps=4, noise=NOISE).state_scale == 1.0)
    x, x0, sigma = np.array([0.4, -1.0]), np.array([0.1, 0.2]), float(program.sigmas[2])
    out = vp_readout("epsilon", x, x0, sigma)
    assert np.allclose(program.x0_x[2] * x + program.x0_out[2] * out, x0)


def test_history_and_evaluations_are_what_the_papers_need() -> None:
    wanted = {
        "euler": 1,
        "heun": 2,
        "lms": 4,
        "plms": 4,
        "dpmpp_3m": 3,
        "dpmpp_2s": 2,
        "deis_3": 3,
        "unipc_2": 3,
        "unipc_3": 4,
        "dpmpp_sde": 2,
        "ddim": 1,
        "lcm": 1,
    }
    for name, history in wanted.items():
        assert compile_program(name, steps=12, noise=NOISE).history == history, name
    assert compile_program("heun", steps=12, noise=NOISE).evaluations == 23
    assert compile_program("plms", steps=12, noise=NOISE).evaluations == 13
