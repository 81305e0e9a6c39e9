"""Every sampler against diffusers, on a small non-linear network: prints the worst relative error of each.

    python tests/schedules/parity.py                  all configurations (minutes)
    python tests/schedules/parity.py --sample 300     a seeded sample
    python tests/schedules/parity.py --only unipc     samplers whose label holds the word

Each configuration runs diffusers' scheduler the way its pipelines do, in float32, against the compiled program in
float32. Where that differs by more than 1e-5, both are computed again in float64 (diffusers with every float32 of its
module replaced), and have to agree to 1e-12. Where they do not, diffusers' formulas and our rows are both evaluated in
40 digits, which have to agree to 1e-12, and float64 has to be shown too short: see `Settled`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import exact
import numpy as np
from cases import Case, cases, sampled
from fewstep.errors import FewstepError
from sides import with_diffusers, with_program

FLOAT32_LIMIT, FLOAT64_LIMIT = 1e-5, 1e-12

SHAPE = (2, 3, 4, 5)
PICKED = 12
"""How many of a case's values are evaluated in 40 digits: those where the two sides differ most in float64."""

UNSTABLE = ("dpmpp_3s_sde", "deis_2 cosine")
"""Samplers that no float64 evaluation holds to 1e-12: what they compute amplifies any rounding, ours included.

dpmpp_3s_sde: the published sign gives the second derivative a weight that does not vanish with the step. deis_2 on the
squared-cosine schedule: 20000 times a difference of two eps.
"""
UNSTABLE_RATIO = 30.0
"""How much farther than diffusers' float64 ours may then be from the exact value."""


def inputs(case: Case) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """The Gaussian, the latent and the noises of a case, float64 of `SHAPE`."""
    rng = np.random.default_rng(7)
    gaussian, latent = (rng.standard_normal(SHAPE) for _ in range(2))
    return gaussian, latent, [rng.standard_normal(SHAPE) for _ in range(2 * (case.steps or 20) + 2)]


def relative_error(case: Case, dtype: Any) -> float:
    """The largest difference over the largest value.

    NaN where diffusers fails or gives what is not finite, infinity where the program does.
    """
    gaussian, latent, draws = inputs(case)
    ours = with_program(case, gaussian.astype(dtype), latent.astype(dtype), draws)
    if not np.isfinite(ours).all():
        return float("inf")
    try:
        reference = with_diffusers(case, gaussian.astype(dtype), latent.astype(dtype), draws)
    except (AssertionError, IndexError, ValueError, RuntimeError):
        return float("nan")
    if not np.isfinite(reference).all():
        return float("nan")
    return float(np.abs(ours - reference).max() / np.abs(reference).max())


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """A case that float64 leaves open, against diffusers' formulas in 40 digits, relative to the largest value.

    method: of our rows in 40 digits. ours, theirs: of either side in float64.
    """

    label: str
    method: float
    ours: float
    theirs: float

    @classmethod
    def of(cls, case: Case) -> Settled:
        given = inputs(case)
        ours, theirs = with_program(case, *given), with_diffusers(case, *given)
        worst = np.argsort(np.abs(ours - theirs), axis=None)[-PICKED:]
        scale = float(np.abs(theirs).max())

        def picked(values: np.ndarray) -> np.ndarray:
            return np.asarray(values.ravel()[worst].reshape(-1, 1, 1, 1))

        few = picked(given[0]), picked(given[1]), [picked(noise) for noise in given[2]]
        truth = exact.with_diffusers(case, *few)
        return cls(
            label=case.label,
            method=exact.distance(exact.with_rows(case, *few), truth, scale),
            ours=exact.distance(picked(ours), truth, scale),
            theirs=exact.distance(picked(theirs), truth, scale),
        )

    @property
    def holds(self) -> bool:
        """Whether what float64 leaves open is rounding: diffusers' own, or where named, that of any float64."""
        if self.method > FLOAT64_LIMIT:
            return False
        near = self.ours <= UNSTABLE_RATIO * self.theirs and self.label in UNSTABLE
        return self.ours <= FLOAT64_LIMIT or near


@dataclass
class Worst:
    """The worst of one sampler, by the way its cases were settled.

    single: in float32. beyond: how many differ by more there; double: the worst of these that float64 settles.
    open: how many float64 leaves open; method, ours: the worst in 40 digits, and of our float64, in those.
    unstable: how many of them our float64 does not hold either. wrong: how many fail.
    """

    cases: int = 0
    single: float = 0.0
    beyond: int = 0
    double: float = 0.0
    open: int = 0
    method: float = 0.0
    ours: float = 0.0
    theirs: float = 0.0
    unstable: int = 0
    wrong: int = 0
    not_finite: int = 0
    at: str = ""

    def add(self, case: Case) -> None:
        self.cases += 1
        error = relative_error(case, np.float32)
        if np.isnan(error):
            self.not_finite += 1
            return
        if error <= FLOAT32_LIMIT:
            self.single = max(self.single, error)
            return
        self.beyond += 1
        double = relative_error(case, np.float64)
        if double <= FLOAT64_LIMIT:
            self.double = max(self.double, double)
            return
        self.open += 1
        settled = Settled.of(case)
        self.unstable += settled.ours > FLOAT64_LIMIT
        self.method, self.theirs = max(self.method, settled.method), max(self.theirs, settled.theirs)
        if not (settled.holds and np.isfinite([error, double]).all()):
            self.wrong += 1
        if settled.ours >= self.ours or not settled.holds:
            self.ours, self.at = max(self.ours, settled.ours), f"{case} float32 {error:.1e}, float64 {double:.1e}"


def measure(chosen: Iterator[Case] | list[Case], progress: bool = False) -> dict[str, Worst]:
    """The worst relative error of each label over the cases."""
    table: dict[str, Worst] = {}
    for count, case in enumerate(chosen):
        try:
            table.setdefault(case.label, Worst()).add(case)
        except FewstepError as error:
            raise RuntimeError(f"refused: {case}") from error
        if progress and count % 500 == 0:
            print(f"{count} cases, at {case.label}", file=sys.stderr)
    return table


def report(table: dict[str, Worst]) -> tuple[str, bool]:
    """The table as text, and whether every sampler is within its limits."""
    columns = ("cases", "float32", "beyond", "float64", "open", "40 digits", "ours", "theirs", "unstable", "not finite")
    lines = [f"{'sampler':28}" + "".join(f"{column:>11}" for column in columns)]
    for label, w in table.items():
        double = f"{w.double:.1e}" if w.beyond > w.open else "-"
        exactly = [f"{v:.1e}" if w.open else "-" for v in (w.method, w.ours, w.theirs)]
        cells = [w.cases, f"{w.single:.1e}", w.beyond, double, w.open, *exactly, w.unstable, w.not_finite]
        lines.append(f"{label:28}" + "".join(f"{cell:>11}" for cell in cells))
        if w.wrong:
            lines.append(f"    {w.wrong} FAIL: {w.at}")
    return "\n".join(lines), not any(w.wrong for w in table.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sample", type=int, default=0, help="cases a sampler, instead of all")
    parser.add_argument("--only", default="", help="samplers whose label holds this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar=("I", "N"), help="the I-th of N parts")
    arguments = parser.parse_args()
    chosen = sampled(arguments.sample, arguments.seed) if arguments.sample else cases()
    part, parts = arguments.part
    chosen = (case for count, case in enumerate(chosen) if count // 60 % parts == part)
    begun = time.perf_counter()
    text, good = report(measure((case for case in chosen if arguments.only in case.label), progress=True))
    print(text)
    print(f"{time.perf_counter() - begun:.0f} s; limits {FLOAT32_LIMIT} in float32, {FLOAT64_LIMIT} in float64")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
