"""Align Your Steps as a method: the bound against closed forms, its paths, and what found levels gain on exact toys."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.integrate
from fewstep.errors import ArgumentError
from fewstep.schedules.spacing import karras, kl_optimal
from fewstep.search import klub as method
from fewstep.search.klub import NoisedData, draw_levels, find_klub, gaussian_klub, gaussian_optimum, klub
from fewstep.search.problem import Knots, Problem
from fewstep.search.toys import (
    LOW,
    SIGMA_MAX,
    SIGMA_MIN,
    TOYS,
    Divergences,
    Mixture,
    gaussian,
    make_samples,
    toy_judge,
    toy_problem,
)

C = 0.5
FLAT = tuple(map(float, karras(SIGMA_MIN, SIGMA_MAX, 10)))


def knots(name: str, sigmas: np.ndarray | tuple[float, ...]) -> Knots:
    return Knots(name=name, sigmas=(*map(float, sigmas), 0.0))


def change(high: float, low: float) -> float:
    """E || D(x_low) - D(x_high) ||^2 for data N(0, C^2)."""
    return C**4 * (1 / (C**2 + low**2) - 1 / (C**2 + high**2))


def test_the_closed_form_is_the_integral() -> None:
    levels = (3.0, 0.7, 0.1)
    parts = [scipy.integrate.quad(lambda t, a=a: change(a, t) / t**3, b, a)[0] for a, b in itertools.pairwise(levels)]
    assert gaussian_klub(levels, C) == pytest.approx(sum(parts), rel=1e-8)


@pytest.mark.parametrize("steps", [5, 10, 20])
def test_no_point_of_the_optimum_can_be_moved_to_advantage(steps: int) -> None:
    best = gaussian_optimum(SIGMA_MAX, SIGMA_MIN, C, steps)
    assert (len(best), best[0], best[-1]) == (steps, SIGMA_MAX, SIGMA_MIN)
    for i, factor in itertools.product(range(1, steps - 1), (0.97, 1.03)):
        moved = best.copy()
        moved[i] *= factor
        assert gaussian_klub(moved, C) > gaussian_klub(best, C)


@pytest.mark.parametrize("levels", [FLAT, tuple(gaussian_optimum(SIGMA_MAX, SIGMA_MIN, C, 10)), (80.0, 1.0, 0.002)])
def test_the_estimate_meets_the_closed_form(levels: tuple[float, ...]) -> None:
    toy = gaussian(C, 3)
    value, error = klub(toy_problem(toy, "euler"), toy.sample(1024, 1), np.arange(1024), levels, seed=2)
    exact = 3 * gaussian_klub(levels, C)
    assert error < 0.04 * exact
    assert abs(value - exact) < 4 * error


def test_at_second_order_the_line_only_adds_where_the_denoiser_is_exact() -> None:
    toy, levels = gaussian(C, 4), (3.0, 0.9, 0.2)
    share = math.log(levels[0] / levels[1])

    def inside(t: float) -> float:
        return (change(levels[1], t) + (math.log(levels[1] / t) / share) ** 2 * change(levels[0], levels[1])) / t**3

    exact = 4 * (gaussian_klub(levels[:2], C) + scipy.integrate.quad(inside, levels[2], levels[1])[0])
    problem, data = toy_problem(toy, "dpmpp_2m"), toy.sample(2048, 1)
    value, error = klub(problem, data, np.arange(2048), levels, order=2, seed=1)
    assert error < 0.05 * exact
    assert abs(value - exact) < 4 * error
    assert value - 4 * error > 4 * gaussian_klub(levels, C)


def test_levels_are_drawn_with_the_density_that_is_stated() -> None:
    levels, weights = draw_levels(80.0, 0.002, C, 4000, 32, np.random.default_rng(0))
    assert levels.min() > 0.002 * (1 - 1e-12)
    assert levels.max() < 80.0 * (1 + 1e-12)
    assert np.all(np.diff(levels, axis=1) < 0)
    for power in (-1.0, 0.0, 1.0):  # the mean of t^power / density is its integral
        exact = math.log(80.0 / 0.002) if power == -1.0 else (80.0 ** (power + 1) - 0.002 ** (power + 1)) / (power + 1)
        assert np.mean(weights * levels**power) == pytest.approx(exact, rel=0.02)


def test_paths_are_nested_as_brownian_motion_is() -> None:
    toy, count = gaussian(C, 1), 20000
    paths = NoisedData(
        toy_problem(toy, "euler"),
        toy.sample(count, 0),
        np.arange(count),
        **{"high": 5.0, "low": 0.1, "c": C, "draws": 6, "rng": np.random.default_rng(3)},
    )
    asked = (1.0, 0.3, 4.9, 0.1, 0.6, 2.0, 0.31, 6.0)
    states = np.stack([paths.path(t)[:, 0] for t in asked])
    found = np.cov(states)
    exact = np.minimum.outer(np.square(asked), np.square(asked))
    scale = np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
    assert np.abs((found - exact) / scale).max() < 5 / math.sqrt(count)
    for t, state in zip(asked, states, strict=True):  # and with the points' own levels
        apart = (state[:, None] - paths._own_paths[:, :, 0]) ** 2 / np.abs(t**2 - paths.own**2)
        assert np.mean(apart) == pytest.approx(1.0, abs=0.03)


def test_what_is_evaluated_serves_every_candidate() -> None:
    toy = gaussian(C)
    noised = NoisedData(
        toy_problem(toy, "euler"),
        toy.sample(10, 0),
        np.arange(10),
        **{"high": 5.0, "low": 0.1, "c": C, "draws": 6, "rng": np.random.default_rng(3)},
    )
    assert toy.evaluations == 60
    first = noised.bound((5.0, 1.0, 0.1), 1)
    assert toy.evaluations == 80
    noised.bound((5.0, 1.0, 0.4, 0.1), 1)
    assert toy.evaluations == 90
    assert np.array_equal(noised.bound((5.0, 1.0, 0.1), 1), first)
    noised.forget(but=(5.0,))
    noised.know((5.0, 1.0))
    assert toy.evaluations == 100


def test_the_descent_finds_the_closed_form_from_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The closed form itself is no start here."""
    monkeypatch.setattr(method, "gaussian_optimum", lambda high, low, c, steps: karras(low, high, steps))
    toy = gaussian(C, 8)
    start = knots("edm", karras(0.02, SIGMA_MAX, 10))
    found = find_klub(
        toy_problem(toy, "euler"), toy.sample(400, 1), np.arange(400), [6, 10], start=start, order=1, seed=0
    )
    for count, levels in found.items():
        best = gaussian_optimum(SIGMA_MAX, 0.02, C, count)
        assert levels.sigmas[-1] == 0.0
        assert np.abs(np.log(levels.sigmas[:-1] / best)).max() < 0.08
        assert gaussian_klub(levels.sigmas[:-1], C) < 1.01 * gaussian_klub(best, C)
        assert gaussian_klub(karras(0.02, SIGMA_MAX, count), C) > 1.5 * gaussian_klub(best, C)


def search(toy: Mixture, problem: Problem, seed: int, count: int = 48, **more: object) -> dict[int, Knots]:
    asked: dict[str, object] = {"start": knots("edm", FLAT), "order": 1, "seed": seed, **more}
    return find_klub(problem, toy.sample(count, 1), np.arange(count), [4, 10, 13, 20], **asked)  # type: ignore[arg-type]


def test_a_seed_decides() -> None:
    toy = TOYS["ring"]()
    problem = toy_problem(toy, "euler")
    assert search(toy, problem, 5) == search(toy, problem, 5)
    assert search(toy, problem, 5) != search(toy, problem, 6)


@pytest.mark.parametrize("low", [None, LOW])
def test_the_ends_stay_and_levels_fall(low: float | None) -> None:
    toy = TOYS["ring"]()
    for count, found in search(toy, toy_problem(toy, "euler"), 0, low=low).items():
        assert found.steps == count
        assert (found.sigmas[0], found.sigmas[-1]) == (FLAT[0], 0.0)
        assert np.all(np.diff(found.sigmas) < 0)
        assert found.sigmas[-2] == FLAT[-1] if low is None else found.sigmas[-2] > LOW


def test_the_best_that_the_judge_saw_is_kept() -> None:
    toy = TOYS["ring"]()
    seen: dict[tuple[float, ...], float] = {}
    real = toy_judge(toy, "euler", count=64, steps=60)

    def judge(schedule: Knots) -> float:
        seen[schedule.sigmas] = real(schedule)
        return seen[schedule.sigmas]

    found = search(toy, toy_problem(toy, "euler"), 0, low=LOW, judge=judge)
    for count, schedule in found.items():
        assert real(schedule) == min(error for sigmas, error in seen.items() if len(sigmas) == count + 1)
    assert len(seen) > 20


def test_a_search_that_may_not_go_on_gives_its_best_start() -> None:
    toy, asked = TOYS["ring"](), []

    def refuse() -> bool:
        asked.append(1)
        return False

    problem = toy_problem(toy, "euler")
    found = search(toy, problem, 0, go_on=refuse)
    c = float(np.sqrt(np.mean(np.var(toy.sample(48, 1), axis=0))))
    assert found[10].sigmas[:-1] == pytest.approx(gaussian_optimum(SIGMA_MAX, SIGMA_MIN, c, 10), rel=1e-6)
    assert len(asked) == 4


def test_one_and_two_evaluations() -> None:
    toy = TOYS["ring"]()
    data, start = toy.sample(16, 1), knots("edm", FLAT)
    for low in (None, SIGMA_MIN):
        found = find_klub(toy_problem(toy, "euler"), data, np.arange(16), [1, 2], start=start, order=2, seed=0, low=low)
        assert found[1].sigmas == (FLAT[0], 0.0)
        assert found[2].sigmas[1] == FLAT[-1] if low is None else SIGMA_MIN < found[2].sigmas[1] < SIGMA_MAX
    assert gaussian_optimum(SIGMA_MAX, SIGMA_MIN, C, 1) == SIGMA_MAX


def test_what_cannot_be_searched_is_refused() -> None:
    toy = TOYS["ring"]()
    problem = toy_problem(toy, "euler")
    with pytest.raises(ArgumentError, match="fall"):
        klub(problem, toy.sample(8, 1), np.arange(8), (1.0, 2.0, 0.0))
    with pytest.raises(ArgumentError, match="4 or more"):
        search(toy, problem, 0, 3)
    with pytest.raises(ArgumentError, match="order 3"):
        search(toy, problem, 0, order=3)


SAMPLES = 32768
STEPS = (5, 10, 20)


def usual(steps: int) -> list[Knots]:
    """EDM's levels, uniform ones, and the cosine schedule's, over the whole range."""
    return [
        knots("edm", karras(SIGMA_MIN, SIGMA_MAX, steps)),
        knots("uniform", np.linspace(SIGMA_MAX, SIGMA_MIN, steps)),
        knots("cosine", kl_optimal(SIGMA_MIN, SIGMA_MAX, steps)),
    ]


@pytest.mark.parametrize(("sampler", "order"), [("dpmpp_1m_sde", 1), ("euler", 1), ("dpmpp_2m", 2)])
@pytest.mark.parametrize("name", TOYS)
def test_found_levels_are_nearer_to_the_data_than_usual_ones(name: str, sampler: str, order: int) -> None:
    toy = TOYS[name]()
    problem, measure = toy_problem(toy, sampler), Divergences(mixture=toy)
    judge = toy_judge(toy, sampler, count=128, steps=200)
    start = min(usual(10), key=judge)
    found = find_klub(
        problem, toy.sample(128, 1), np.arange(128), STEPS, start=start, order=order, seed=0, low=LOW, judge=judge
    )
    for steps in STEPS:
        kl = [measure.kl(make_samples(problem, toy, k, SAMPLES, 7)) for k in (found[steps], *usual(steps))]
        print(name, sampler, steps, *(f"{v:.4f}" for v in kl))
        assert kl[0] < 0.97 * min(kl[1:])
