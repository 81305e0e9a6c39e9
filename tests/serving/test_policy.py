"""The policy on a clock of its own: who is served, in which buckets, and when everybody ends."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, replace

import pytest
from fewstep.errors import ArgumentError, MismatchError
from fewstep.serving.batch_sizes import BatchSizes, admitted_rows, measure
from fewstep.serving.policy import TURN_OF_LATE, Candidate, choose

COSTS = {1: 5.2, 2: 8.4, 4: 10.1, 8: 18.5}
BUCKETS = BatchSizes(COSTS)
DECODE_S = 0.005


@dataclass
class Sim:
    """Requests of one lane that are ticked until all are done; `ends` holds when each was, in seconds."""

    now: float = 0.0
    ticks: int = 0
    longest: float = 0.0

    def alone(self, steps: int, rows: int = 1, images: int = 1) -> float:
        return 1e-3 * steps * BUCKETS.cost_ms(rows * images) + DECODE_S

    def request(self, steps: int, *, arrival: float = 0.0, rows: int = 1, deadline: float | None = None) -> Candidate:
        return Candidate(
            lane="one",
            buckets=BUCKETS,
            images=1,
            rows=rows,
            remaining=steps,
            arrival=arrival,
            alone_s=self.alone(steps, rows),
            tail_s=DECODE_S,
            deadline=deadline,
        )

    def run(self, requests: dict[str, Candidate]) -> dict[str, float]:
        waiting, active, ends = dict(requests), {}, {}
        while waiting or active:
            if not active:
                self.now = max(self.now, min(c.arrival for c in waiting.values()))
            for name in [n for n, c in waiting.items() if c.arrival <= self.now]:
                active[name] = waiting.pop(name)
            choice = choose(list(active.values()), self.now, tick=self.ticks)
            rows = sum(c.rows * n for c, n in choice.taken)
            assert rows <= choice.bucket
            took = 1e-3 * COSTS[choice.bucket]
            self.now, self.ticks, self.longest = self.now + took, self.ticks + 1, max(self.longest, took)
            served = [c for c, _ in choice.taken]
            for name, c in list(active.items()):
                if c in served:
                    active[name] = replace(c, remaining=c.remaining - 1)
                    if c.remaining == 1:
                        ends[name] = self.now + DECODE_S
                        del active[name]
        return ends


@pytest.mark.parametrize("guided", [1, 2])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_short_request_behind_a_long_one_is_soon_done(steps: int, guided: int) -> None:
    for offset in (0.0001, 0.004, 0.0523, 0.1, 0.149):
        sim = Sim()
        ends = sim.run({"long": sim.request(30, rows=guided), "short": sim.request(steps, arrival=offset)})
        assert ends["short"] - offset <= 1.5 * sim.alone(steps) + sim.longest
        assert ends["long"] <= sim.alone(30, guided) + 1.4 * sim.alone(steps), "the long one is not starved"


def test_a_lone_request_takes_the_smallest_bucket() -> None:
    sim = Sim()
    assert choose([sim.request(30)], 0.0).bucket == 1
    assert choose([sim.request(30, rows=2)], 0.0).bucket == 2


def test_a_crowd_is_served_in_large_buckets_and_in_time() -> None:
    """Goodput (ended within 3x the time alone) of Poisson arrivals, against one request at a time in their order."""
    draw, sim = random.Random(1), Sim()
    at, requests, free, one_at_a_time = 0.0, {}, 0.0, 0
    for i in range(600):
        at += draw.expovariate(30.0)
        steps = draw.choice([1, 2, 4, 4, 8, 20])
        requests[f"r{i}"] = sim.request(steps, arrival=at)
        free = max(free, at) + sim.alone(steps)
        one_at_a_time += free - at <= 3 * sim.alone(steps)
    ends = sim.run(requests)
    in_time = sum(ends[n] - c.arrival <= 3 * c.alone_s for n, c in requests.items())
    assert in_time > 0.9 * 600
    assert one_at_a_time < 0.1 * 600


def test_overload_keeps_serving_in_time_and_starves_nobody() -> None:
    sim = Sim()
    arrivals = {f"r{i}": 0.005 * i for i in range(300)}
    ends = sim.run({n: sim.request(4, arrival=at) for n, at in arrivals.items()})
    waits = [ends[n] - at for n, at in arrivals.items()]
    assert sum(w <= 3 * sim.alone(4) for w in waits) > 100
    assert max(ends.values()) < 1.2 * 300 * 4 * BUCKETS.row_ms * 1e-3, "rows are not wasted"
    long = {"long": sim.request(30)} | {f"r{i}": sim.request(4, arrival=0.005 * i) for i in range(300)}
    ends = Sim().run(long)
    assert ends["long"] < 0.9 * max(ends.values()), "it is not left for the end of twice what can be done"


def test_an_explicit_deadline_goes_first() -> None:
    sim = Sim()
    crowd = [sim.request(8) for _ in range(8)]
    urgent = sim.request(8, deadline=0.06)
    choice = choose([*crowd, urgent], 0.0)
    assert urgent in [c for c, _ in choice.taken]
    assert choice.bucket == 1, "larger ticks would miss it"


def test_lanes_do_not_mix_and_images_of_a_request_may_be_split() -> None:
    sim = Sim()
    other = replace(sim.request(4, arrival=-1.0), lane="two", alone_s=0.4)
    many = replace(sim.request(4), images=20, alone_s=0.2)
    assert {c.lane for c, _ in choose([many, other], 0.0).taken} in ({"one"}, {"two"})
    choice = choose([many], 0.0)
    assert choice.taken[0][1] * many.rows <= choice.bucket <= 8


def test_buckets_drop_what_a_larger_one_beats() -> None:
    buckets = BatchSizes({1: 5.0, 2: 8.0, 3: 11.0, 4: 10.0})
    assert buckets.rows == (1, 2, 4)
    assert [buckets.fit(r) for r in (1, 2, 3, 4, 9)] == [1, 2, 4, 4, 4]
    assert buckets.cost_ms(6) == 18.0
    assert buckets.fastest == 4
    with pytest.raises(ArgumentError, match="buckets of"):
        BatchSizes({})


def test_measuring_stops_where_nothing_is_gained() -> None:
    asked = []
    measure(asked.append, [1, 2, 4, 8, 16])
    assert asked[:4] == [1, 1, 1, 1]
    asked.clear()
    found = measure(lambda rows: (asked.append(rows), time.sleep(0.002 * rows)), [1, 2, 4, 8, 16, 32, 64])
    assert max(asked) <= 8, "a cost in proportion to the rows gains nothing"
    assert found.rows[0] == 1


def test_buckets_are_the_ones_the_engine_has_profiles_for() -> None:
    class Profiled:
        def bind(self, dims: dict[str, int]) -> None:
            if dims["rows"] not in (2, 8) or dims["height"] != 16:
                raise MismatchError("no profile")

    dims = {"height": 16, "width": 16, "tokens": 77}
    assert admitted_rows(Profiled(), dims, [1, 2, 4, 8]) == [2, 8]  # type: ignore[arg-type]
    assert admitted_rows(Profiled(), {**dims, "height": 8}, [1, 2, 4, 8]) == []  # type: ignore[arg-type]


def test_what_a_request_takes_alone_does_not_grow_with_the_load() -> None:
    buckets = BatchSizes({1: 4.0, 2: 5.0})
    for _ in range(200):
        buckets.observe(1, 12.0)
        buckets.observe(2, 3.0)
    assert buckets.cost_ms(1) == pytest.approx(12.0)
    assert buckets.lone_ms(1) == 4.0
    assert buckets.lone_ms(2) == pytest.approx(3.0)


def test_a_crowd_of_late_ones_costs_the_others_nothing() -> None:
    sim = Sim()
    late = [sim.request(4, arrival=-10.0 - i) for i in range(64)]
    fresh = [sim.request(2, arrival=-0.001 * i) for i in range(3)]
    choice = choose([*late, *fresh], 0.0)
    assert {id(c) for c in fresh} < {id(c) for c, _ in choice.taken}
    assert choice.bucket == 4, "the most rows a second with which they are in time"
    assert len(choice.taken) == 4, "what is left over goes to the late ones"
    assert choose(late, 0.0).bucket == 8


def test_who_is_a_little_late_goes_before_who_is_very_late() -> None:
    sim = Sim()
    old = [sim.request(4, arrival=-5.0 - i) for i in range(20)]
    fresh = sim.request(4, arrival=-0.07)
    served = [c for c, _ in choose([*old, fresh], 0.0, tick=0).taken]
    assert served[0] is fresh
    turn = [c for c, _ in choose([*old, fresh], 0.0, tick=TURN_OF_LATE - 1).taken]
    assert turn[0] is old[-1], "but now and then the longest overdue leads"
