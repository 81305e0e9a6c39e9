"""A sampler whose coefficients were fitted to a network: a base sampler's levels, and rows of one's own on them.

A fitted row says the next state over the present one and over what was kept of the last evaluations,

    x_{i+1} = a x_i + sum_k b_k H_{i-k},

with x the network's input, x = alpha x0 + s noise, and H the estimate of x0, or of the noise, whichever the base
sampler keeps. So every multistep sampler here is such rows (`rows_of`), and fitted ones are run as its own are. Least
squares over the same span: OLSS (arXiv 2305.14677); coefficients learned by gradient: S4S (arXiv 2502.17423).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from ..errors import ArgumentError, UnsupportedError
from .algebra import Form, Tape
from .assemble import assemble
from .compile import compile_program
from .levels import Level, Path
from .noise import ZERO_SNR_FLOOR, NoiseSchedule
from .program import Program
from .solvers.registry import find_sampler

Kept = Literal["x0", "eps"]
MOST_KEPT = 5
"""Evaluations that a fitted row reads, the present one included: what the runtime's slots remember."""


@dataclass(frozen=True, slots=True)
class FittedRow:
    """One evaluation's coefficients: of the state, and of what was kept, newest first."""

    a: float
    b: tuple[float, ...]


def kept_by(sampler: str, *, noise: NoiseSchedule, **options: Any) -> Kept:
    """What a sampler keeps of an evaluation, x0 or eps, if its rows are said over that and the present state alone.

    Raises `UnsupportedError` for samplers that draw noise, and for those that keep something else.
    """
    chosen = find_sampler(sampler)
    if chosen.name == "edm_euler":
        raise UnsupportedError(f"fitted rows for {chosen.name}, on EDM's axis", expected="a sampler on the model's own")
    sigmas = [1.0, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05]
    for kept in ("x0", "eps"):
        program = _as_kept(sampler, kept, noise, {**options, "sigmas": sigmas})
        if bool(np.any(program.c)) or bool(np.any(program.draws)):
            raise UnsupportedError(f"fitted rows for {chosen.name}, which draws noise", expected="a sampler without")
        if not np.any(program.h_x) and np.all(program.h_out == 1.0):
            return "x0" if kept == "x0" else "eps"
    raise UnsupportedError(f"fitted rows for {chosen.name}", expected="a sampler that remembers x0 or eps")


def _as_kept(sampler: str, kept: str, noise: NoiseSchedule, asked: dict[str, Any]) -> Program:
    """The sampler's program for a network whose output is the kept quantity itself."""
    return compile_program(sampler, noise=noise, prediction="sample" if kept == "x0" else "epsilon", **asked)


def rows_of(sampler: str, kept: Kept, *, noise: NoiseSchedule, **asked: Any) -> list[FittedRow]:
    """The rows of a sampler's own program over what it keeps; asked: as for `compile_program`."""
    program = _as_kept(sampler, kept, noise, asked)
    rows: list[FittedRow] = []
    written: dict[int, int] = {}
    for i in range(program.evaluations):
        written[int(program.write[i])] = i
        ages = {i - written[int(k)]: float(program.b[i, k]) for k in np.flatnonzero(program.b[i])}
        b = tuple(ages.get(age, 0.0) for age in range(max(ages, default=0) + 1))
        rows.append(FittedRow(float(program.a[i]), b))
    return rows


def solve_fitted(model: Tape, path: Path, x: Form, *, rows: Sequence[FittedRow], kept: Kept) -> Form:
    """The rows, one after another; the last one gives the result in the base sampler's own coordinates of latents."""
    known: list[Form] = []
    for (here, _), row in zip(path.pairs, rows, strict=True):
        at = model(x, here, keep=kept)
        known = [at.x0 if kept == "x0" else at.eps, *known[: MOST_KEPT - 1]]
        x = row.a * x
        for factor, quantity in zip(row.b, known, strict=False):
            x = x + factor * quantity
    return x


def fitted_program(
    sampler: str, rows: Sequence[FittedRow], kept: Kept, *, noise: NoiseSchedule, start: int = 0, **asked: Any
) -> Program:
    """A program with the levels of `sampler` as `asked` for and with these rows, which count from its first step.

    Where `start` steps are skipped, a row that reads evaluations from before is the sampler's own; all of them are
    where the sampler then evaluates elsewhere than it would have (PLMS). Raises `ArgumentError` where there are not as
    many rows as evaluations, `UnsupportedError` as `kept_by`.
    """
    prediction = asked.pop("prediction", None)
    base = compile_program(sampler, noise=noise, prediction=prediction, start=start, **asked)
    whole = base if not start else compile_program(sampler, noise=noise, prediction=prediction, **asked)
    if len(rows) != whole.evaluations or any(not 1 <= len(row.b) <= MOST_KEPT for row in rows):
        raise ArgumentError(
            f"{len(rows)} fitted rows of {max((len(r.b) for r in rows), default=0)} coefficients",
            expected=f"{whole.evaluations}, of 1 to {MOST_KEPT}",
        )
    skipped = whole.evaluations - base.evaluations
    used = list(rows[skipped:])
    if not np.array_equal(base.timesteps, whole.timesteps[skipped:]):
        return base
    if skipped:
        own = rows_of(sampler, kept, noise=noise, start=start, **asked)
        used = [row if len(row.b) <= i + 1 else own[i] for i, row in enumerate(used)]
    tops = base.sigmas >= ZERO_SNR_FLOOR**-0.5
    sigmas = [math.inf if top else float(sigma) for top, sigma in zip(tops, base.sigmas, strict=True)]
    levels = [Level(float(t), sigma) for t, sigma in zip(base.timesteps, sigmas, strict=False)]
    levels.append(Level(0.0, sigmas[-1]))
    chosen = find_sampler(sampler)
    solve = partial(solve_fitted, rows=used, kept=kept)
    return dataclasses.replace(
        assemble(
            dataclasses.replace(chosen, solve=solve, space="vp", presets={}),
            Path(
                pairs=list(itertools.pairwise(levels)),
                skipped=base.start,
                total=base.steps,
                at_sigma=lambda sigma: Level(0.0, sigma),
                at_timestep=lambda t: Level(t, 0.0),
                trained=len(noise),
            ),
            schedule=base.schedule,
            prediction=base.prediction,
            init=(base.init_latent, base.init_noise),
            options={},
        ),
        steps=base.steps,
    )
