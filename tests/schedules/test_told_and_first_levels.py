"""Timesteps that are told lower than a state's own (NitroFusion), and sampling that begins below the greatest level."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fewstep.errors import ArgumentError, FewstepError, UnknownNameError
from fewstep.schedules import NoiseSchedule, Program, compile_program
from fewstep.schedules.spacing import SPACINGS

NOISE = NoiseSchedule.scaled_linear()
ALPHA_BAR = np.cumprod(1.0 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
SHAPE = (1, 4, 3, 5)
BEGINNING = [s.name for s in SPACINGS.values() if s.begins]


def network(x: np.ndarray, t: float) -> np.ndarray:
    return np.tanh(0.9 * x + t / 700) * 0.8 + 0.15 * np.sin(2.0 * x)


def draws(seed: int = 3) -> Iterator[np.ndarray]:
    random = np.random.default_rng(seed)
    while True:
        yield random.standard_normal(SHAPE)


def run(program: Program, seed: int = 3) -> np.ndarray:
    noise = draws(seed)
    return np.asarray(program.run(network, next(noise), lambda: next(noise)))


def as_published(steps: int, shifted: int, seed: int = 3) -> tuple[np.ndarray, list[float]]:
    """NitroFusion's published rule: LCM among 999, 749, 499, 249, with the network told floor(t shifted / 1000).

    x0 is read at the level that is told; the next state is noised to its own level (the repository's README).
    """
    noise = draws(seed)
    own = [(999, 749, 499, 249)[math.floor(4 * i / steps)] for i in range(steps)]
    told = [t * shifted // 1000 for t in own]
    x = next(noise)
    for i, tau in enumerate(told):
        a, s = math.sqrt(ALPHA_BAR[tau]), math.sqrt(1 - ALPHA_BAR[tau])
        x0 = (x - s * network(x, tau)) / a
        x = 10 * tau / math.hypot(10 * tau, 0.5) * x0 + 0.25 / ((10 * tau) ** 2 + 0.25) * x
        if i + 1 < steps:
            after = ALPHA_BAR[own[i + 1]]
            x = math.sqrt(after) * x + math.sqrt(1 - after) * next(noise)
    return x, [float(t) for t in told]


@pytest.mark.parametrize("shifted", [250, 500, 1000])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_shifted_timesteps_are_nitrofusions(steps: int, shifted: int) -> None:
    program = compile_program("lcm", steps=steps, noise=NOISE, original_steps=4, shifted_timestep=shifted)
    expected, told = as_published(steps, shifted)
    assert program.timesteps.tolist() == told
    np.testing.assert_allclose(run(program), expected, atol=1e-12, rtol=0)
    plain = compile_program("lcm", steps=steps, noise=NOISE, original_steps=4)
    assert program.sigmas.tolist() == plain.sigmas.tolist(), "states stay at their own levels"
    assert np.array_equal(run(program), run(plain)) == (shifted == 1000)


def test_previews_of_shifted_steps_are_read_where_the_network_is_told() -> None:
    program = compile_program("lcm", steps=4, noise=NOISE, original_steps=4, shifted_timestep=250)
    for i, tau in enumerate((249, 187, 124, 62)):
        assert program.x0_x[i] == pytest.approx(1 / math.sqrt(ALPHA_BAR[tau]))


def test_skipped_steps_keep_the_levels_of_the_rest() -> None:
    whole = compile_program("lcm", steps=4, noise=NOISE, original_steps=4, shifted_timestep=250)
    rest = compile_program("lcm", steps=4, noise=NOISE, original_steps=4, shifted_timestep=250, start=2)
    assert rest.timesteps.tolist() == whole.timesteps[2:].tolist()
    assert (rest.init_latent, rest.init_noise) == pytest.approx(
        (math.sqrt(ALPHA_BAR[499]), math.sqrt(1 - ALPHA_BAR[499]))
    )


@pytest.mark.parametrize("value", [-1, 1001, 2.5, True, "250"])
def test_shifts_that_cannot_be(value: Any) -> None:
    with pytest.raises(ArgumentError, match="shifted_timestep"):
        compile_program("lcm", steps=2, noise=NOISE, shifted_timestep=value)


def test_shifts_are_lcms_alone() -> None:
    with pytest.raises(UnknownNameError, match="shifted_timestep"):
        compile_program("euler", steps=2, noise=NOISE, shifted_timestep=250)
    with pytest.raises(UnknownNameError, match="shifted_timestep"):
        compile_program("lcm", steps=2, noise=NOISE, compat="diffusers", shifted_timestep=250)


@pytest.mark.parametrize("schedule", BEGINNING)
def test_sampling_begins_where_it_is_told(schedule: str) -> None:
    """At that level exactly, from its noise alone; the rest of the levels are spread below it."""
    asked: dict[str, Any] = {"schedule": schedule, "steps": 5, "noise": NOISE}
    whole = compile_program("euler", **asked)
    sigma = float(NOISE.sigmas[625])
    for first in ({"first_timestep": 625}, {"first_sigma": sigma}):
        program = compile_program("euler", **asked, **first)
        assert program.timesteps[0] == pytest.approx(625, abs=1e-9)
        assert program.sigmas[0] == pytest.approx(sigma, rel=1e-12)
        assert program.init_noise == pytest.approx(sigma / math.hypot(1, sigma))
        assert np.all(np.diff(program.sigmas) < 0)
        assert program.sigmas[-1] == 0.0
        assert program.evaluations == 5
        assert whole.timesteps[0] == 999
    again = compile_program("euler", **asked, first_timestep=999)
    np.testing.assert_allclose(again.sigmas, whole.sigmas, rtol=1e-12)
    between = compile_program("euler", **asked, first_sigma=1.2345)
    assert between.sigmas[0] == pytest.approx(1.2345, rel=1e-12)


def test_the_levels_below_are_those_of_the_rule() -> None:
    program = compile_program("euler", schedule="trailing", steps=4, noise=NOISE, first_timestep=625)
    assert program.timesteps.tolist() == [625, 469, 312, 155]  # round(626 - 156.5 i) - 1, half to even
    program = compile_program("euler", schedule="sgm_uniform", steps=4, noise=NOISE, first_timestep=625)
    assert program.timesteps.tolist() == [625 * (1 - i / 4) for i in range(4)]


@pytest.mark.parametrize(("steps", "least"), [(1, 1e-7), (2, 6e-3), (4, 6e-3)])
def test_sids_rule(steps: int, least: float) -> None:
    """x = sqrt(alpha) x0 + sqrt(1 - alpha) n at 625 (1 - i / n), x0 from the network, from x0 = 0 on (SiD-LSG).

    Its code cuts timesteps down to whole ones, which shows from the second step on.
    """
    noise = draws()
    x0 = np.zeros(SHAPE)
    for i in range(steps):
        t = int(625 * (1 - i / steps))
        x = math.sqrt(ALPHA_BAR[t]) * x0 + math.sqrt(1 - ALPHA_BAR[t]) * next(noise)
        x0 = (x - math.sqrt(1 - ALPHA_BAR[t]) * network(x, t)) / math.sqrt(ALPHA_BAR[t])
    program = compile_program("lcm", schedule="sgm_uniform", steps=steps, noise=NOISE, first_timestep=625)
    np.testing.assert_allclose(run(program), x0, atol=least, rtol=0)


def test_zero_terminal_snr_can_begin_at_its_top() -> None:
    noise = NoiseSchedule.from_diffusers(
        {**NOISE.config, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    )
    for schedule in BEGINNING:
        asked: dict[str, Any] = {"schedule": schedule, "steps": 3, "noise": noise}
        program = compile_program("ddim", **asked, first_timestep=999)
        np.testing.assert_allclose(program.sigmas, compile_program("ddim", **asked).sigmas, rtol=1e-9)
        assert program.init_noise == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"first_timestep": 1000}, "at most 999"),
        ({"first_timestep": 0}, "above 0"),
        ({"first_timestep": True}, "finite number"),
        ({"first_timestep": math.nan}, "finite number"),
        ({"first_sigma": 20.0}, "trained to"),
        ({"first_sigma": -1.0}, "above 0"),
        ({"first_sigma": 2.0, "first_timestep": 3}, "one of them"),
        ({"first_timestep": 3, "schedule": "trailing", "steps": 5}, "at most 4"),
        ({"first_sigma": 0.01, "schedule": "karras"}, "sigma_min"),
        ({"first_sigma": 2.0, "sigma_max": 3.0, "schedule": "karras"}, "one of them"),
        ({"first_timestep": 625, "schedule": "leading"}, "option of euler under leading"),
        ({"first_timestep": 625, "schedule": "lcm"}, "option of euler under lcm"),
        ({"first_timestep": 625, "schedule": "ays_sd"}, "option of euler under ays_sd"),
        ({"first_timestep": 625, "timesteps": [600, 100], "steps": None}, "under timesteps"),
        ({"first_timestep": 625, "compat": "diffusers", "schedule": "trailing"}, "compat='diffusers'"),
    ],
)
def test_beginnings_that_cannot_be(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(FewstepError, match=words):
        compile_program("euler", noise=NOISE, **{"steps": 3, **asked})


def test_networks_on_other_axes() -> None:
    edm = compile_program("edm_euler", schedule="karras", steps=4, noise=NOISE, first_sigma=40.0)
    assert edm.sigmas[0] == pytest.approx(40.0)
    continuous = NoiseSchedule.from_diffusers({**NOISE.config, "timestep_type": "continuous"})
    program = compile_program("euler", schedule="karras", steps=4, noise=continuous, first_sigma=2.0)
    assert program.timesteps[0] == pytest.approx(math.log(2.0) / 4)
    with pytest.raises(ArgumentError, match="first_sigma"):
        compile_program("euler", schedule="karras", steps=4, noise=continuous, first_timestep=600)
