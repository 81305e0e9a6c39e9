"""Published schedules against the figures they were published with, and at other step counts."""

import math

import numpy as np
import pytest
from fewstep.errors import ArgumentError, UnknownNameError
from fewstep.schedules import NoiseSchedule, compile_program, program_from_diffusers
from fewstep.schedules.tables import load_table, table_names

NOISE = NoiseSchedule.scaled_linear()
FIGURES = {
    "ays_sd": (
        "14.615 6.475 3.861 2.697 1.886 1.396 .963 .652 .399 .152 .029",
        "999 850 736 645 545 455 343 233 124 24 0",
        "14.6146412293 6.4745760956 3.8636745985 2.6946151520 1.8841921177 1.3943805092 .9642583904 .6523686016 "
        ".3977456272 .1515232662 .0291671582",
    ),
    "ays_sdxl": (
        "14.615 6.315 3.771 2.181 1.342 .862 .555 .380 .234 .113 .029",
        "999 845 730 587 443 310 193 116 53 13 0",
        "14.6146412293 6.3184485287 3.7681790315 2.1811480769 1.3405244945 .8620721141 .5550693289 .3798540708 "
        ".2332364134 .1114188177 .0291671582",
    ),
    "ays_deepfloyd": (
        "160.41 8.081 3.315 1.885 1.207 .785 .553 .293 .186 .030 .006",
        "995 920 811 686 555 418 315 174 109 12 0",
        None,
    ),
    "ays_svd": ("700 54.5 15.886 7.977 4.248 1.789 .981 .403 .173 .034 .002", None, None),
    "gits": (
        "14.61464119 5.85520077 2.84484982 1.67050016 1.08895338 .74807048 .50118381 .32104823 .19894916 .09824532 "
        ".02916753",
        None,
        None,
    ),
}


def numbers(text: str) -> list[float]:
    return [float(word) for word in text.split()]


def test_every_table_has_its_figures_and_its_source() -> None:
    assert set(table_names()) == set(FIGURES)
    for name in table_names():
        assert "arXiv" in load_table(name).source


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_tables_hold_the_published_figures(name: str) -> None:
    table, (sigmas, timesteps, exact) = load_table(name), FIGURES[name]
    assert list(table.published_sigmas) == numbers(sigmas)
    assert table.timesteps == (tuple(int(n) for n in numbers(timesteps)) if timesteps else None)
    assert list(table.sigmas) == numbers(exact or sigmas)
    assert np.allclose(table.sigmas, table.published_sigmas, rtol=0.02, atol=0.001)


@pytest.mark.parametrize("name", ["ays_sd", "ays_sdxl"])
def test_the_exact_sigmas_are_those_of_the_published_timesteps(name: str) -> None:
    table = load_table(name)
    assert table.timesteps is not None
    assert np.allclose(NOISE.sigma_at(np.array(table.timesteps, float)), table.sigmas, rtol=2e-5)


@pytest.mark.parametrize("name", ["ays_sd", "ays_sdxl", "gits"])
def test_at_their_own_length_tables_are_themselves(name: str) -> None:
    table = load_table(name)
    program = compile_program("dpmpp_2m", schedule=name, steps=10, noise=NOISE)
    assert np.allclose(program.sigmas[:-1], table.sigmas[:-1], rtol=1e-12)
    assert program.sigmas[-1] == 0.0
    if table.timesteps is not None:
        assert np.allclose(program.timesteps, table.timesteps[:-1], atol=0.01)


@pytest.mark.parametrize("steps", [1, 4, 7, 20, 33])
def test_at_other_lengths_they_are_linear_in_log_sigma(steps: int) -> None:
    logs = np.log(load_table("ays_sd").sigmas)
    program = compile_program("euler", schedule="ays", steps=steps, noise=NOISE)
    assert program.evaluations == steps
    for i in range(steps):
        where = i * 10 / steps
        low = int(where)
        wanted = logs[low] + (where - low) * (logs[low + 1] - logs[low])
        assert math.log(program.sigmas[i]) == pytest.approx(wanted, abs=1e-12)
    assert program.sigmas[-1] == 0.0


def test_the_how_to_list_can_be_asked_for_both_ways() -> None:
    """The list [999, ..., 13, 0]: ten evaluations that end at sigma 0.0292, or eleven that end at 0."""
    how_to = load_table("ays_sdxl").timesteps
    assert how_to is not None
    ten = compile_program("dpmpp_2m_sde", timesteps=how_to, last_sigma="own", noise=NOISE)
    assert ten.evaluations == 10
    assert ten.sigmas[-1] == pytest.approx(0.0291671582, rel=1e-5)
    assert list(ten.timesteps) == list(how_to[:-1])
    eleven = compile_program("dpmpp_2m_sde", timesteps=how_to, noise=NOISE)
    assert eleven.evaluations == 11
    assert eleven.sigmas[-1] == 0.0
    stock = program_from_diffusers(
        {**NOISE.config, "_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"},
        timesteps=how_to,
    )
    assert stock.evaluations == 11
    assert stock.sigmas[-1] == 0.0
    table = compile_program("dpmpp_2m_sde", schedule="ays_sdxl", steps=10, last_sigma="own", noise=NOISE)
    assert np.allclose(table.sigmas, ten.sigmas, rtol=1e-4)


def test_svd_is_for_continuous_timesteps() -> None:
    continuous = NoiseSchedule.from_diffusers(
        {**NOISE.config, "timestep_type": "continuous", "prediction_type": "v_prediction"}
    )
    program = compile_program("ddim", schedule="ays_svd", steps=10, noise=continuous)
    assert program.sigmas[0] == pytest.approx(700)
    assert np.allclose(program.timesteps, np.log(load_table("ays_svd").sigmas[:-1]) / 4)
    with pytest.raises(ArgumentError, match="trained to"):
        compile_program("ddim", schedule="ays_svd", steps=10, noise=NOISE)


def test_a_network_without_timesteps_is_spaced_by_its_own_sigmas() -> None:
    config = {**NOISE.config, "timestep_type": "continuous", "prediction_type": "v_prediction"}
    stated = NoiseSchedule.from_diffusers({**config, "sigma_min": 0.002, "sigma_max": 700.0})
    for schedule in (None, "karras"):
        program = compile_program("dpmpp_2m", schedule=schedule, steps=5, noise=stated)
        assert (program.sigmas[0], program.sigmas[-2]) == (pytest.approx(700.0), pytest.approx(0.002))
        assert np.allclose(program.timesteps, np.log(program.sigmas[:-1]) / 4)
    for schedule in ("trailing", "leading", "linspace"):
        with pytest.raises(ArgumentError, match="picks training timesteps"):
            compile_program("euler", schedule=schedule, steps=5, noise=stated)
    table = NoiseSchedule.from_diffusers({**NOISE.config, "sigma_max": 700.0})
    assert compile_program("euler", schedule="karras", steps=5, noise=table).sigmas[0] < 15, "a discrete table counts"


def test_deepfloyd_is_for_the_cosine_schedule() -> None:
    cosine = NoiseSchedule.from_diffusers({"beta_schedule": "squaredcos_cap_v2"})
    program = compile_program("dpmpp_2m", schedule="ays_if", steps=10, noise=cosine)
    timesteps = load_table("ays_deepfloyd").timesteps
    assert timesteps is not None
    assert np.abs(program.timesteps - timesteps[:-1]).max() < 2
    with pytest.raises(ArgumentError, match="trained to"):
        compile_program("dpmpp_2m", schedule="ays_if", steps=10, noise=NOISE)


def test_the_circulating_wrong_table_is_not_here() -> None:
    for name in table_names():
        assert not any(abs(sigma - 10.4708) < 1e-3 for sigma in load_table(name).sigmas)


def test_compat_has_tables_at_their_own_length_only() -> None:
    program = compile_program("euler", schedule="ays", steps=10, noise=NOISE, compat="diffusers")
    timesteps = load_table("ays_sd").timesteps
    assert timesteps is not None
    assert list(program.timesteps) == list(timesteps[:-1])
    with pytest.raises(ArgumentError, match="compat=None"):
        compile_program("euler", schedule="ays", steps=8, noise=NOISE, compat="diffusers")


def test_an_unknown_table() -> None:
    with pytest.raises(UnknownNameError, match="ays_sd"):
        load_table("ays_sd3")
