"""Batch sizes: the row counts an engine is evaluated with, and what each costs, measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from ..engines.base import Engine
from ..errors import ArgumentError, FewstepError

SMOOTHING = 0.1
ROUNDS = 3, 12
EACH_S = 0.15
ENOUGH_S = 2.0


class BatchSizes:
    """Milliseconds an evaluation takes for each row count that is worth using.

    A row count is dropped when a larger one is no slower: fewer rows are then padded. Costs follow what ticks take,
    which is more while other stages run beside them; `lone_ms` is what they came down to at best.
    """

    def __init__(self, cost_ms: dict[int, float]) -> None:
        if not cost_ms or min(cost_ms) < 1 or min(cost_ms.values()) < 0:
            raise ArgumentError(f"buckets of {cost_ms} rows", expected="at least one, each of one row or more")
        rows = sorted(cost_ms)
        self.rows = tuple(r for i, r in enumerate(rows) if all(cost_ms[r] < cost_ms[m] for m in rows[i + 1 :]))
        self._cost_ms = {r: cost_ms[r] for r in self.rows}
        self._least_ms = dict(self._cost_ms)

    @property
    def most_rows(self) -> int:
        return self.rows[-1]

    @property
    def costs_ms(self) -> dict[int, float]:
        return dict(self._cost_ms)

    @property
    def fastest(self) -> int:
        """The bucket with the most rows a second."""
        return max(self.rows, key=lambda r: r / self._cost_ms[r])

    @property
    def row_ms(self) -> float:
        """What a row costs at best."""
        return self._cost_ms[self.fastest] / self.fastest

    def fit(self, rows: int) -> int:
        """The smallest bucket with this many rows, or the largest there is."""
        return next((r for r in self.rows if r >= rows), self.most_rows)

    def cost_ms(self, rows: int) -> float:
        """Milliseconds to evaluate this many rows, in several evaluations if need be."""
        return self._sum(self._cost_ms, rows)

    def lone_ms(self, rows: int) -> float:
        """As `cost_ms`, with nothing else to do."""
        return self._sum(self._least_ms, rows)

    def observe(self, bucket: int, took_ms: float) -> None:
        """Let the cost of a bucket follow what a tick of it took."""
        if bucket in self._cost_ms:
            self._cost_ms[bucket] += SMOOTHING * (took_ms - self._cost_ms[bucket])
            self._least_ms[bucket] = min(self._least_ms[bucket], self._cost_ms[bucket])

    def _sum(self, costs_ms: dict[int, float], rows: int) -> float:
        whole, rest = divmod(rows, self.most_rows)
        return whole * costs_ms[self.most_rows] + (costs_ms[self.fit(rest)] if rest else 0.0)


def admitted_rows(engine: Engine, dims: dict[str, int], candidates: Iterable[int]) -> list[int]:
    """The row counts that the engine has profiles for."""
    admitted = []
    for rows in candidates:
        try:
            engine.bind({**dims, "rows": rows})
        except FewstepError:
            continue
        admitted.append(rows)
    return admitted


def measure(evaluate: Callable[[int], object], candidates: Iterable[int]) -> BatchSizes:
    """Time `evaluate(rows)` for each row count; larger ones are left out once two of them gained nothing a row."""
    costs: dict[int, float] = {}
    spent, idle = 0.0, 0
    for rows in sorted(candidates):
        best_row = min((c / r for r, c in costs.items()), default=float("inf"))
        costs[rows], took = _time(lambda rows=rows: evaluate(rows), quick=spent > ENOUGH_S)  # type: ignore[misc]
        spent += took
        idle = idle + 1 if costs[rows] / rows > 0.97 * best_row else 0
        if idle == 2:
            break
    return BatchSizes(costs)


def _time(call: Callable[[], object], *, quick: bool) -> tuple[float, float]:
    """Milliseconds of a call at best, after a first one, and the seconds spent in all.

    The best of a few, and of more where calls are short: what else the machine does makes some of them slower, and
    a bucket that looks slow once is never used.
    """
    began = time.perf_counter()
    call()
    first = time.perf_counter()
    best = float("inf")
    least, most = (1, 1) if quick else ROUNDS
    for done in range(most):
        at = time.perf_counter()
        if done >= least and at - first > EACH_S:
            break
        call()
        best = min(best, 1e3 * (time.perf_counter() - at))
    return best, time.perf_counter() - began
