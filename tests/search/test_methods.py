"""The methods on a mixture in 64 dimensions, whose denoiser is exact: what each promises, held on pairs of its own."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from fewstep.schedules import compile_program
from fewstep.schedules.fitted import rows_of
from fewstep.search import trajectory
from fewstep.search.descent import _with_own_rows
from fewstep.search.endpoint import FedTimesteps, InnerLevels, LastLevel, descend, descend_rows
from fewstep.search.known import known_schedules
from fewstep.search.noise import BrownianDraws
from fewstep.search.problem import Knots, Pairs, Problem, mean_distance, square_distances
from fewstep.search.rows import fit_row, fit_rows, own_rows
from fewstep.search.teacher import Trajectories, follow_teacher, teach, teacher_knots
from fewstep.search.toys import Mixture, toy_noise

DETERMINISTIC = ("euler", "dpmpp_2m", "unipc_2", "deis_2", "lms", "heun", "ddim")


def problem_of(sampler: str) -> Problem:
    rng = np.random.default_rng(5)
    mixture = Mixture("clouds", means=rng.standard_normal((24, 64)), width=0.2)
    return Problem(network=mixture, sampler=sampler, noise=toy_noise(0.03, 15.0))


def pairs_of(count: int, seed: int) -> Pairs:
    noise = np.random.default_rng(seed).standard_normal((count, 64), np.float32)
    return Pairs(index=np.arange(count), gaussians=noise)


@pytest.fixture(scope="module")
def walked() -> tuple[Trajectories, Pairs]:
    """Trajectories to search on, and other pairs with the teacher's results to judge by."""
    problem = problem_of("dpmpp_2m")
    return follow_teacher(problem, pairs_of(32, 1), 100), teach(problem, pairs_of(64, 2), 100)


def distance(problem: Problem, knots: Knots, pairs: Pairs) -> float:
    return mean_distance(problem.errors([knots], pairs)[0])


def start_of(problem: Problem, steps: int) -> Knots:
    return next(k for k in known_schedules(problem, steps) if k.name == "kl_optimal")


def test_trajectories_between_grid_levels_are_those_of_a_finer_teacher(walked: tuple[Trajectories, Pairs]) -> None:
    problem, (trajectories, _) = problem_of("dpmpp_2m"), walked
    for sigma in (9.3, 2.2, 0.71, 0.15, 0.05):
        levels = [s for s in teacher_knots(problem, 400).sigmas if s > sigma]
        ended = compile_program("dpmpp_2m", sigmas=[*levels, sigma], noise=problem.noise)
        (finer,) = problem.run([(ended, trajectories.pairs)])
        assert np.sqrt(np.mean((trajectories.at(sigma) - finer) ** 2)) < 2e-3
    assert np.array_equal(trajectories.at(0.0), trajectories.states[-1])


@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_an_infinite_ridge_gives_the_sampler_back(sampler: str, walked: tuple[Trajectories, Pairs]) -> None:
    problem, (trajectories, judge) = problem_of(sampler), walked
    knots = Knots(name="usual", sigmas=(*map(float, np.geomspace(15, 0.03, 6)), 0.0))
    (fitted,) = fit_rows(problem, [(knots, math.inf)], trajectories)
    assert list(fitted.rows or ()) == own_rows(problem, knots)[1]
    results = problem.run([(problem.program(k), judge) for k in (knots, fitted)])
    assert np.abs(results[0] - results[1]).max() < 2e-5


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_fitted_rows_come_nearer_and_rows_for_other_pairs_lose(
    sampler: str, walked: tuple[Trajectories, Pairs]
) -> None:
    problem, (trajectories, judge) = problem_of(sampler), walked
    knots = start_of(problem, 6)
    order = np.roll(np.arange(len(trajectories.pairs)), 1)
    states = trajectories.states.copy()
    states[1:] = states[1:, order]
    shuffled = replace(trajectories, states=states, x0=trajectories.x0[:, order])
    right, wrong = (fit_rows(problem, [(knots, 1e-3)], t)[0] for t in (trajectories, shuffled))
    assert distance(problem, right, judge) < 0.95 * distance(problem, knots, judge)
    assert distance(problem, wrong, judge) > 1.5 * distance(problem, knots, judge)


def test_a_row_is_the_least_of_its_objective() -> None:
    """Against a search over many other rows, with the objective written out."""
    rng = np.random.default_rng(0)
    x, h, g, y = rng.standard_normal((4, 16, 8))
    weights = rng.uniform(0.5, 2.0, 16)
    own = rows_of("dpmpp_2m", "x0", noise=toy_noise(0.03, 15.0), sigmas=[3.0, 2.0, 1.0, 0.5])[1]

    def objective(b: np.ndarray, ridge: float) -> float:
        z, w = np.stack([x, h, g]), weights[:, None]
        rest = np.mean((w * (y - np.tensordot(b, z, 1))) ** 2)
        prior = np.array([own.a, *own.b])
        return float(rest + ridge * np.sum(np.mean((w * z) ** 2, axis=(1, 2)) * (b - prior) ** 2))

    for ridge in (0.0, 0.1, 3.0):
        row = fit_row(x, [h, g], y, own, ridge=ridge, weights=weights)
        b = np.array([row.a, *row.b])
        least = objective(b, ridge)
        assert all(objective(b + 0.01 * rng.standard_normal(3), ridge) > least for _ in range(200))


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_programming_finds_the_least_path(
    sampler: str, walked: tuple[Trajectories, Pairs], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against all paths over a small grid, whose costs are steps of real programs started on the trajectories."""
    problem, (trajectories, _) = problem_of(sampler), walked
    few = trajectories.first(4)
    grid = [0, 20, 40, 60, 80, 99, 100]
    costs = trajectory._Costs(problem, few, grid)
    levels = [float(few.sigmas[i]) for i in grid]
    for i, j, k in itertools.combinations(range(7), 3):
        asked = [*levels[i : i + 1], levels[j], levels[k]]
        program = compile_program(
            sampler,
            sigmas=[*asked, *([0.5 * levels[k]] if levels[k] else [])],
            noise=problem.noise,
            prediction="sample",
        )
        kept = {0: few.x0[grid[i]], 1: few.x0[grid[j]]}
        state = float(program.a[1]) * few.states[grid[j]]
        for slot in np.flatnonzero(program.b[1]):
            owner = max(r for r in (0, 1) if program.write[r] == slot)
            state = state + float(program.b[1, slot]) * kept[owner]
        stepped = np.mean((state - few.states[grid[k]]) ** 2)
        assert costs.of(i, j, k) == pytest.approx(float(stepped), rel=1e-3, abs=1e-7)
    weights = np.linspace(2.0, 1.0, 7)
    paths = trajectory._shortest(costs, weights, 5)

    def summed(path: tuple[int, ...]) -> float:
        steps = [weights[path[1]] * costs.of(None, *path[:2])]
        before = path if costs.multistep else (None,) * len(path)
        steps += [weights[k] * costs.of(i, j, k) for i, j, k in zip(before, path[1:], path[2:], strict=False)]
        return float(sum(steps))

    for n, path in paths.items():
        every = [(0, *inner, 6) for inner in itertools.combinations(range(1, 6), n - 1)]
        assert len(path) == n + 1
        assert summed(path) == pytest.approx(min(map(summed, every)))


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_paths_on_trajectories_beat_the_usual_start(sampler: str, walked: tuple[Trajectories, Pairs]) -> None:
    problem, (trajectories, judge) = problem_of(sampler), walked
    found = trajectory.find_on_trajectories(problem, trajectories, [4, 6, 10])
    assert [k.steps for k in found.values()] == [4, 6, 10]
    gains = [distance(problem, k, judge) / distance(problem, start_of(problem, n), judge) for n, k in found.items()]
    assert np.exp(np.mean(np.log(gains))) < 0.9


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "unipc_2"])
def test_descent_gains_and_keeps_the_best_that_was_judged(sampler: str, walked: tuple[Trajectories, Pairs]) -> None:
    problem, (trajectories, judge) = problem_of(sampler), walked

    def judged(knots: Knots) -> float:
        return distance(problem, knots, judge)

    start = start_of(problem, 5)
    first = distance(problem, start, judge)
    levels = InnerLevels(problem=problem)
    knots, error = descend(problem, start, along=[levels], on=trajectories.pairs, judge=judged, rounds=6)
    assert error == pytest.approx(distance(problem, knots, judge))
    assert error < 0.9 * first
    assert (knots.sigmas[0], knots.sigmas[-1]) == (start.sigmas[0], start.sigmas[-1])
    rows = _with_own_rows(problem, knots)
    assert distance(problem, rows, judge) == pytest.approx(error, rel=1e-4)
    fitted, nearer = descend_rows(problem, rows, on=trajectories.pairs, judge=judged, rounds=4)
    assert nearer < 0.95 * error
    moved, nearest = descend(problem, fitted, along=[levels], on=trajectories.pairs, judge=judged, rounds=2)
    assert nearest <= nearer
    assert moved.kept == fitted.kept


def test_numbers_are_written_as_they_are_read(walked: tuple[Trajectories, Pairs]) -> None:
    problem = replace(problem_of("dpmpp_2m"), noise=toy_noise(0.03, 15.0))
    knots = Knots(name="k", sigmas=(15.0, 4.0, 1.0, 0.2, 0.1))
    for freedom in (InnerLevels(problem=problem), LastLevel()):
        written = freedom.write(knots, freedom.read(knots))
        assert written is not None
        assert written.sigmas == pytest.approx(knots.sigmas)
        assert freedom.write(knots, freedom.read(knots) + 50.0) is None


def test_fed_timesteps_stay_in_the_networks_range() -> None:
    from fewstep.schedules import NoiseSchedule

    problem = replace(problem_of("euler"), noise=NoiseSchedule.scaled_linear())
    fed = FedTimesteps(problem=problem)
    knots = Knots(name="k", sigmas=(14.6, 2.0, 0.5, 0.0))
    moved = fed.write(knots, fed.read(knots) + np.array([5.0, 0.1, -20.0]))
    assert moved is not None
    assert moved.fed == pytest.approx((999.0, float(problem.timesteps([2.0])[0]) + 10.0, 0.0))
    assert problem.program(moved).timesteps == pytest.approx(moved.fed)


DRAWING = ("dpmpp_2m_sde", "euler_ancestral", "ddpm")


@pytest.mark.parametrize("sampler", ["dpmpp_1m_sde", *(pytest.param(n, marks=pytest.mark.slow) for n in DRAWING)])
def test_samplers_that_draw_converge_along_one_path(sampler: str) -> None:
    """With noise of one Brownian path, more steps come ever nearer to the finest; with fresh noise they do not."""
    plain, pairs = problem_of(sampler), pairs_of(16, 3)
    problem = replace(plain, draws=BrownianDraws(*plain.range, seed=4))

    def run(n: int, seed: int = 4) -> np.ndarray:
        drawn = replace(problem, draws=BrownianDraws(*plain.range, seed=seed))
        program = compile_program(sampler, sigmas=teacher_knots(problem, n).sigmas, noise=problem.noise)
        return np.asarray(drawn.run([(program, pairs)])[0])

    finest = run(320)
    apart = [float(np.sqrt(np.mean((run(n) - finest) ** 2))) for n in (10, 40, 160)]
    assert apart[0] > 1.7 * apart[1] > 1.7**2 * apart[2]
    assert float(np.sqrt(np.mean((run(320, seed=5) - finest) ** 2))) > 1.5 * apart[0]


def test_two_steps_draw_what_one_over_both_draws() -> None:
    """n12 g12 = f2 g1 n1 + g2 n2, with f = (sigma'/sigma)^2 and g^2 = sigma'^2 (1 - sigma'^2/sigma^2)."""
    pairs = pairs_of(4, 0)
    draws = BrownianDraws(0.03, 15.0, seed=9)
    levels = [float(15.0 * (0.03 / 15.0) ** (i / 2**9)) for i in (20, 200, 390)]

    def noise(a: float, b: float) -> np.ndarray:
        return np.asarray(draws._between(pairs, a, b)())

    def g(a: float, b: float) -> float:
        return b * math.sqrt(1 - b * b / (a * a))

    a, b, c = levels
    both = (c / b) ** 2 * g(a, b) * noise(a, b) + g(b, c) * noise(b, c)
    assert both == pytest.approx(g(a, c) * noise(a, c), abs=1e-4)
    many = BrownianDraws(0.03, 15.0, seed=1)._between(pairs_of(500, 0), a, b)()
    assert (abs(float(many.mean())), float(many.std())) == (pytest.approx(0, abs=0.02), pytest.approx(1, abs=0.02))


def test_distances_are_to_the_teachers_results() -> None:
    pairs = replace(pairs_of(3, 0), finals=np.ones((3, 64), np.float32))
    assert square_distances(np.full((3, 64), 3.0, np.float32), pairs) == pytest.approx([4.0] * 3)
