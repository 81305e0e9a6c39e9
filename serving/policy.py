"""Which requests a tick advances, and with how many rows.

Every request has a due time, `STRETCHES[-1]` times what it takes alone after its arrival (or its deadline, if that is
earlier). Ticks serve the earliest due first, which is fair to long and short ones alike: a due time moves out with the
work that was asked for. Rows are added to a tick, which slows it, only as far as they are needed for everybody to be in
time; and when not everybody can be, most are.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from .batch_sizes import BatchSizes

STRETCHES = (1.4, 2.5)
TURN_OF_LATE = 10


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Candidate:
    """A request with slots, as the policy sees it. Times in seconds on one clock.

    lane: what may share an evaluation. images: how many it advances in a tick, `rows` UNet rows each. remaining:
    evaluations until its last image is done. tail_s: what follows the last of them, beside the ticks or, with
    `in_turn`, in place of them. deadline: when it must be finished, if it must.
    """

    lane: object
    buckets: BatchSizes
    images: int
    rows: int
    remaining: int
    arrival: float
    alone_s: float
    tail_s: float
    in_turn: bool = False
    deadline: float | None = None

    def due(self, stretch: float) -> float:
        """When it should be finished, if it may take `stretch` times its time alone."""
        soft = self.arrival + stretch * self.alone_s
        return soft if self.deadline is None else min(soft, self.deadline)

    @property
    def pressing(self) -> bool:
        """Whether it has a deadline before the time it would be due anyway."""
        return self.deadline is not None and self.deadline < self.arrival + STRETCHES[-1] * self.alone_s

    def ends(self, now: float, bucket: int) -> float:
        """When it would be finished if each tick from now on took a full bucket and served it."""
        ticks = -(-self.images * self.rows // max(bucket, self.rows))
        return now + 1e-3 * self.remaining * ticks * self.buckets.cost_ms(max(bucket, self.rows)) + self.tail_s

    def stretch(self, now: float) -> float:
        """What it would take in all, in multiples of its time alone, if from now on it were alone."""
        return (self.ends(now, self.rows) - self.arrival) / self.alone_s


@dataclass(frozen=True, slots=True)
class Choice:
    """What a tick does: so many images of each of these candidates, in a bucket of so many rows."""

    bucket: int
    taken: tuple[tuple[Candidate, int], ...]


@dataclass(frozen=True, slots=True)
class _Plan:
    """With ticks of `bucket` rows these end in time, in the order of their due times; `hard` of them pressing."""

    bucket: int
    kept: tuple[Candidate, ...]
    hard: int


def choose(candidates: Sequence[Candidate], now: float, *, tick: int = 0) -> Choice:
    """The next tick for these candidates, of which there is at least one.

    Those that can be in time together come first, earliest due first. The others take what rows are left, those first
    that are the least late for what they ask, so that one who is late does not make all after him late too; and every
    `TURN_OF_LATE`th tick the longest overdue of them leads.
    """
    ordered = sorted(candidates, key=lambda c: c.due(STRETCHES[-1]))
    hopeful = [c for c in ordered if c.ends(now, c.rows) <= c.due(STRETCHES[-1]) or c.images > 1]
    plan = _plan(hopeful or ordered[:1], now, crowded=len(hopeful) < len(ordered))
    kept = set(plan.kept)
    late = [c for c in ordered if c not in kept]
    overdue = late[:1]
    late.sort(key=lambda c: c.stretch(now))
    queue = [*plan.kept, *late]
    if overdue and tick % TURN_OF_LATE == TURN_OF_LATE - 1:
        queue = [*overdue, *(c for c in queue if c is not overdue[0])]
    lead = queue[0]
    bucket = plan.bucket if kept else lead.buckets.fastest
    return _fill([c for c in queue if c.lane == lead.lane], max(bucket, lead.rows))


def _plan(ordered: Sequence[Candidate], now: float, *, crowded: bool) -> _Plan:
    """The smallest bucket with which all are soon done; else the one with which most are in time.

    Of buckets with which equally many are, the smallest, unless somebody is late (`crowded`, or one of these): then
    the fastest.
    """
    buckets = ordered[0].buckets
    for bucket in buckets.rows if not crowded else ():
        plan = _in_time(ordered, bucket, STRETCHES[0], now, all_or_none=True)
        if len(plan.kept) == len(ordered):
            return plan
    plans = [_in_time(ordered, b, STRETCHES[-1], now) for b in buckets.rows]
    crowded = crowded or max(len(p.kept) for p in plans) < len(ordered)

    def worth(plan: _Plan) -> tuple[int, int, float]:
        speed = plan.bucket / buckets.cost_ms(plan.bucket)
        return plan.hard, len(plan.kept), speed if crowded else -plan.bucket

    return max(plans, key=worth)


def _in_time(
    ordered: Sequence[Candidate], bucket: int, stretch: float, now: float, *, all_or_none: bool = False
) -> _Plan:
    """Which of the candidates to keep so that the most are in time when every tick serves `bucket` rows.

    Moore and Hodgson's algorithm (J. M. Moore 1968): earliest due first, and whenever one would be late the longest
    so far is given up; one with a pressing deadline last. all_or_none: give up at the first who would be late.
    """
    given_up: set[Candidate] = set()
    heap: list[tuple[bool, float, int, Candidate]] = []
    busy = now
    for i, c in enumerate(ordered):
        if all_or_none and given_up:
            return _Plan(bucket, (), 0)
        due, rows = c.due(stretch), max(bucket, c.rows)
        if c.ends(now, bucket) > due:
            given_up.add(c)
            continue
        tail_s, beside_s = (c.tail_s, 0.0) if c.in_turn else (0.0, c.tail_s)
        work = 1e-3 * c.remaining * c.images * c.rows * c.buckets.cost_ms(rows) / rows + tail_s
        heapq.heappush(heap, (c.pressing, -work, i, c))
        busy += work
        if busy + beside_s > due:
            _, less, _, longest = heapq.heappop(heap)
            busy += less
            given_up.add(longest)
    kept = tuple(c for c in ordered if c not in given_up)
    return _Plan(bucket, kept, sum(c.pressing for c in kept))


def _fill(queue: Sequence[Candidate], limit: int) -> Choice:
    """As many images as fit into the limit, in order; at least one."""
    taken: list[tuple[Candidate, int]] = []
    rows = 0
    for c in queue:
        count = min(c.images, (limit - rows) // c.rows)
        if not taken:
            count = max(count, 1)
        if count > 0:
            taken.append((c, count))
            rows += count * c.rows
    return Choice(queue[0].buckets.fit(rows), tuple(taken))
