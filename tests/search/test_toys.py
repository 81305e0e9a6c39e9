"""Toys: their denoiser against the density, their divergences against what is known, their paths."""

from __future__ import annotations

import math

import numpy as np
import pytest
from fewstep.errors import ArgumentError
from fewstep.schedules.noise import NoiseSchedule
from fewstep.search.problem import Knots
from fewstep.search.toys import (
    SIGMA_MAX,
    SIGMA_MIN,
    TOYS,
    Divergences,
    Mixture,
    ReversePaths,
    gaussian,
    toy_judge,
    toy_noise,
    toy_pairs,
    toy_problem,
)


def test_a_toy_has_its_own_range() -> None:
    toy = TOYS["ring"]()
    assert toy_problem(toy, "euler").range == pytest.approx((SIGMA_MIN, SIGMA_MAX))
    assert toy_problem(toy, "euler", noise=toy_noise(0.1, 9.0)).range == pytest.approx((0.1, 9.0))
    assert toy_problem(toy, "euler", noise=NoiseSchedule.scaled_linear(prediction="sample")).range[1] < 15


@pytest.mark.parametrize("sigma", [0.004, 0.05, 0.4, 9.0, 80.0])
@pytest.mark.parametrize("name", TOYS)
def test_the_denoiser_is_the_posterior_mean(name: str, sigma: float) -> None:
    """By Tweedie's formula, x + sigma^2 grad log p(x), with the gradient by differences of the density."""
    toy = TOYS[name]()
    x = toy.sample(40, 3) + sigma * np.random.default_rng(4).standard_normal((40, 2))
    spread = toy.width**2 + sigma**2

    def log_density(at: np.ndarray) -> np.ndarray:
        squares = np.sum((at[:, None] - toy.means) ** 2, axis=2)
        return np.logaddexp.reduce(np.log(toy.weights) - squares / (2 * spread), axis=1)

    move = 1e-4 * math.sqrt(spread)
    slopes = [(log_density(x + move * e) - log_density(x - move * e)) / (2 * move) for e in np.eye(2)]
    exact = x + sigma**2 * np.stack(slopes, axis=1)
    inputs = (x / math.sqrt(1 + sigma**2)).astype(np.float32)
    found = toy_problem(toy, "euler").denoise(inputs, np.full(40, sigma), np.arange(40))
    assert found == pytest.approx(exact, abs=2e-3 * toy.width + 2e-5 * min(sigma, 1.0) + 2e-6)


@pytest.mark.parametrize("name", TOYS)
def test_cells_have_the_probability_of_their_samples(name: str) -> None:
    toy = TOYS[name]()
    measure, samples = Divergences(mixture=toy), toy.sample(200000, 1)
    p = measure.probabilities(16)
    assert p.sum() == pytest.approx(1.0, abs=1e-12)
    expected = 200000 * p
    chi2 = np.sum((measure.counts(samples, 16) - expected)[expected > 5] ** 2 / expected[expected > 5])
    count = int(np.sum(expected > 5))
    assert abs(chi2 - count) < 5 * math.sqrt(2 * count)


@pytest.mark.parametrize("name", TOYS)
def test_the_data_themselves_diverge_by_nothing(name: str) -> None:
    toy = TOYS[name]()
    measure = Divergences(mixture=toy)
    kls = [measure.kl(toy.sample(50000, seed)) for seed in range(8)]
    mmds = [measure.mmd2(toy.sample(50000, seed)) for seed in range(8)]
    for values in (kls, mmds):
        assert abs(np.mean(values)) < 4 * np.std(values, ddof=1) / math.sqrt(8)
    assert max(map(abs, kls)) < 3e-3
    assert max(map(abs, mmds)) < 3e-5


def test_divergences_are_those_of_gaussians() -> None:
    toy, factor, count = gaussian(0.5), 1.2, 400000
    measure = Divergences(mixture=toy, cells=48, least=1e-5)
    samples = (toy.sample(count, 1) * factor).astype(np.float32)
    exact = 2 * (math.log(factor) + 0.5 / factor**2 - 0.5)
    assert measure.kl(samples) == pytest.approx(exact, rel=0.05)

    def product(a: float, b: float) -> float:
        h2 = measure.bandwidth**2
        return h2 / (h2 + a**2 + b**2)

    squared = product(0.5, 0.5) - 2 * product(0.5, 0.6) + product(0.6, 0.6)
    assert measure.mmd2(samples) == pytest.approx(squared, rel=0.05)


def test_empty_cells_and_what_is_not_a_number_count_as_wrong() -> None:
    measure = Divergences(mixture=TOYS["ring"]())
    assert measure.kl(np.full((100000, 2), np.nan, np.float32)) > 3
    assert measure.kl(np.zeros((100000, 2), np.float32)) > 3


def test_one_path_serves_all_schedules() -> None:
    """Draws are unit noise, the same path gives the same draws, and a halved step's draws add up to the whole's."""
    problem = toy_problem(gaussian(0.5), "dpmpp_1m_sde")
    pairs = toy_pairs(gaussian(0.5), 20000, 0)
    paths = ReversePaths(pairs.gaussians.shape, 1)
    coarse = paths.draws(pairs, problem.program(Knots(name="a", sigmas=(4.0, 1.0, 0.0))))()
    draw = paths.draws(pairs, problem.program(Knots(name="b", sigmas=(4.0, 2.0, 1.0, 0.0))))
    halves = (draw(), draw())
    for noise in (coarse, *halves):
        assert np.std(noise) == pytest.approx(1.0, abs=0.02)
    assert np.corrcoef(halves[0].ravel(), halves[1].ravel())[0, 1] == pytest.approx(0.0, abs=0.03)
    parts = [math.sqrt(1 / low**2 - 1 / high**2) for high, low in ((4.0, 2.0), (2.0, 1.0), (4.0, 1.0))]
    assert parts[0] * halves[0] + parts[1] * halves[1] == pytest.approx(parts[2] * coarse, abs=1e-5)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "dpmpp_1m_sde"])
def test_more_steps_are_nearer_to_the_teacher(sampler: str) -> None:
    judge = toy_judge(TOYS["ring"](), sampler, count=128)
    errors = [
        judge(Knots(name="log", sigmas=(*map(float, np.geomspace(SIGMA_MAX, SIGMA_MIN, n)), 0.0)))
        for n in (10, 40, 160)
    ]
    assert errors[0] > 1.5 * errors[1] > 2.0 * errors[2]


def test_a_mixture_says_what_is_wrong_with_it() -> None:
    with pytest.raises(ArgumentError, match="width"):
        Mixture("flat", np.zeros((2, 2)), 0.0)
