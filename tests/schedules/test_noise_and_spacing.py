"""Noise schedules and spacings: against torch's tables, scipy's quantiles, and the formulas themselves."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import numpy as np
import pytest
import scipy.stats
from fewstep.errors import ArgumentError, CorruptError, UnknownNameError, UnsupportedError
from fewstep.schedules import NoiseSchedule, compile_program, spacing
from fewstep.schedules.beta import beta_quantile
from fewstep.schedules.compat.tables import Tables
from hypothesis import given, settings
from hypothesis import strategies as st

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CONFIGS: list[dict[str, Any]] = [
    SD,
    {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"},
    {"beta_schedule": "squaredcos_cap_v2"},
    {**SD, "num_train_timesteps": 1100},
    {**SD, "rescale_betas_zero_snr": True},
    {"trained_betas": [0.1, 0.2, 0.25, 0.3]},
]


@pytest.mark.parametrize("config", CONFIGS)
def test_alpha_bar_is_that_of_diffusers(config: dict[str, Any]) -> None:
    reference = diffusers.DDIMScheduler(**config).alphas_cumprod.numpy()
    noise = NoiseSchedule.from_diffusers(config)
    assert noise.alpha_bar.dtype == np.float64
    assert np.allclose(noise.alpha_bar, reference, rtol=2e-5, atol=1e-9)
    tables = Tables.of(config, rescales=True, floored=False, single=True)
    if "rescale_betas_zero_snr" not in config:
        assert np.array_equal(tables.alpha_bar, reference)


def test_zero_terminal_snr_is_zero_but_sigma_is_finite() -> None:
    noise = NoiseSchedule.from_diffusers({**SD, "rescale_betas_zero_snr": True})
    assert noise.zero_terminal_snr
    assert noise.alpha_bar[-1] == 0.0
    assert noise.sigmas[-1] == pytest.approx(4096, rel=1e-6)
    assert not NoiseSchedule.scaled_linear().zero_terminal_snr


def test_class_defaults_fill_in_what_a_config_leaves_out() -> None:
    for name in ("EulerDiscreteScheduler", "HeunDiscreteScheduler", "LCMScheduler"):
        reference = getattr(diffusers, name)().alphas_cumprod.numpy()
        assert np.allclose(NoiseSchedule.from_diffusers({"_class_name": name}).alpha_bar, reference, rtol=2e-5)


def test_json_gives_the_same_schedule_back() -> None:
    noise = NoiseSchedule.scaled_linear(prediction="v_prediction")
    again = NoiseSchedule.from_json(noise.to_json())
    assert np.array_equal(again.alpha_bar, noise.alpha_bar)
    assert again.prediction == "v_prediction"
    assert again.to_json() == noise.to_json()


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 999))
def test_timesteps_and_sigmas_invert_each_other_at_training_timesteps(t: float) -> None:
    noise = NoiseSchedule.scaled_linear()
    whole = round(t)
    assert float(noise.timestep_at(noise.sigma_at(whole))) == whole
    assert abs(float(noise.timestep_at(noise.sigma_at(t))) - t) < 0.51


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ({"beta_schedule": "scaledlinear"}, UnknownNameError, "scaled_linear"),
        ({"prediction_type": "eps"}, UnknownNameError, "epsilon"),
        ({"prediction_type": "flow_prediction"}, UnsupportedError, "flow"),
        ({"use_flow_sigmas": True}, UnsupportedError, "flow"),
        ({"num_train_timesteps": 1}, ArgumentError, "num_train_timesteps"),
        ({"num_train_timesteps": True}, CorruptError, "num_train_timesteps"),
        ({"num_train_timesteps": 10**400}, CorruptError, "num_train_timesteps"),
        ({"beta_start": 10**400}, CorruptError, "beta_start"),
        ({"beta_schedule": None}, CorruptError, "beta_schedule"),
        ({"beta_schedule": []}, CorruptError, "beta_schedule"),
        ({"prediction_type": []}, CorruptError, "prediction_type"),
        ({"set_alpha_to_one": "x"}, CorruptError, "set_alpha_to_one"),
        ({"steps_offset": "x"}, CorruptError, "steps_offset"),
        ({"timestep_spacing": 5}, CorruptError, "timestep_spacing"),
        ({"beta_start": 0.5, "beta_end": 0.1}, ArgumentError, "beta_start"),
        ({"beta_end": 2.0}, ArgumentError, "beta_end"),
        ({"trained_betas": [0.1, 1.5, 0.1]}, ArgumentError, "fall"),
        ({"trained_betas": [0.1, math.nan]}, CorruptError, "trained_betas"),
        ({"trained_betas": 5}, CorruptError, "trained_betas"),
        ({"timestep_type": "other"}, UnknownNameError, "discrete"),
    ],
)
def test_wrong_configs_are_named(config: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        NoiseSchedule.from_diffusers(config)


@settings(max_examples=300, deadline=None)
@given(st.floats(1e-12, 1) | st.just(0.0), st.floats(0.2, 4), st.floats(0.2, 4))
def test_the_beta_quantile_is_scipys(p: float, a: float, b: float) -> None:
    ours, reference = beta_quantile(p, a, b), float(scipy.stats.beta.ppf(p, a, b))
    assert ours == pytest.approx(reference, rel=1e-11, abs=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 5, 30, 100])
def test_the_quantiles_of_the_beta_schedule(steps: int) -> None:
    for p in 1 - np.linspace(0, 1, steps):
        reference = float(scipy.stats.beta.ppf(p, 0.6, 0.6))
        assert beta_quantile(p, 0.6, 0.6) == pytest.approx(reference, rel=1e-12, abs=1e-14)


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(sorted(set(spacing.SPACINGS) - {"ays_svd", "ays_deepfloyd"})), st.integers(1, 50))
def test_every_spacing_falls_from_the_top_to_zero(name: str, steps: int) -> None:
    noise = NoiseSchedule.scaled_linear()
    steps = min(steps, spacing.SPACINGS[name].most_steps or steps)
    program = compile_program("euler", schedule=name, steps=steps, noise=noise)
    assert program.evaluations == steps
    assert np.all(np.diff(program.sigmas) < 0)
    assert program.sigmas[-1] == 0.0
    assert noise.sigmas[0] * 0.99 < program.sigmas[-2]
    if name != "leading":
        assert program.timesteps[0] == pytest.approx(999, abs=0.01)


def test_few_step_timesteps_are_those_of_the_distilled_models() -> None:
    noise = NoiseSchedule.scaled_linear()

    def timesteps(schedule: str, steps: int) -> list[float]:
        return list(compile_program("euler", schedule=schedule, steps=steps, noise=noise).timesteps)

    assert timesteps("trailing", 1) == [999]
    assert timesteps("trailing", 2) == [999, 499]
    assert timesteps("trailing", 4) == [999, 749, 499, 249]
    assert timesteps("trailing", 8) == [999, 874, 749, 624, 499, 374, 249, 124]
    assert timesteps("lcm", 4) == [999, 759, 499, 259]
    assert timesteps("lcm", 8) == [999, 879, 759, 639, 499, 379, 259, 139]
    assert timesteps("leading", 4) == [751, 501, 251, 1]
    assert timesteps("turbo_tenths", 1) == [999]
    assert timesteps("SDTurboScheduler", 4) == [999, 899, 799, 699]
    assert timesteps("turbo_tenths", 10) == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    with pytest.raises(ArgumentError, match="at most 10"):
        timesteps("turbo_tenths", 11)
    program = compile_program("euler", steps=4, noise=NoiseSchedule.scaled_linear())
    assert np.allclose(program.sigmas, [14.6146, 4.0817, 1.6129, 0.6932, 0], atol=1e-3)


def test_spacing_options() -> None:
    noise = NoiseSchedule.scaled_linear()
    program = compile_program("euler", schedule="karras", steps=5, noise=noise, sigma_max=10.0, sigma_min=0.1, rho=5)
    assert program.sigmas[0] == pytest.approx(10.0)
    assert program.sigmas[4] == pytest.approx(0.1)
    assert compile_program("euler", schedule="leading", steps=4, noise=noise, steps_offset=0).timesteps[-1] == 0
    assert compile_program("euler", steps=4, noise=noise, last_sigma="sigma_min").sigmas[-1] == noise.sigmas[0]
    assert compile_program("euler", steps=4, noise=noise, last_sigma=0.5).sigmas[-1] == 0.5
    assert compile_program("euler", schedule="leading", steps=1000, noise=noise).timesteps[0] == 999
