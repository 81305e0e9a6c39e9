"""The report's turns: those in which the machine gave all cores have figures of their own, once they are enough."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fewstep.bench.measure import Meeting, Plan, Samples
from fewstep.bench.probe import CoreProbe
from fewstep.bench.report import make_report
from fewstep.bench.table import lines

STEPS = 4


def meeting(tmp_path: Path, cores: list[float]) -> Meeting:
    """fewstep takes 10 ms with both cores and 30 with fewer; diffusers 40 and 60."""
    plan = Plan(
        load={"threads": 2}, request={}, steps=(STEPS,), against=("diffusers",), variants={"fewstep": {}}, cold=0
    )
    pair = Meeting(plan, ["fewstep", "diffusers"], tmp_path, print)
    for name, fast in (("fewstep", 10.0), ("diffusers", 40.0)):
        pair.samples[name].wall[STEPS] = [fast if c > 1.8 else fast + 20.0 for c in cores]
        pair.samples[name].cores[STEPS] = cores
        pair.samples[name].stages[STEPS] = [{} for _ in cores]
        pair.samples[name].cpu[STEPS] = pair.samples[name].wall[STEPS]
    return pair


def test_turns_with_all_cores_have_figures_of_their_own(tmp_path: Path) -> None:
    met = meeting(tmp_path, [1.1] * 8 + [1.9] * 6)
    report = make_report(met.plan, met.samples, [met.samples])
    ratio = report["ratios"]["fewstep"]["diffusers"][str(STEPS)]
    assert (ratio["ratio"], ratio["rounds"]) == (2.0, 14)
    assert (ratio["all_cores"]["ratio"], ratio["all_cores"]["rounds"]) == (4.0, 6)
    assert report["contenders"]["fewstep"]["whole"]["4"]["p50"] == 30.0
    assert report["contenders"]["fewstep"]["whole_all_cores"]["4"]["p50"] == 10.0
    printed = "\n".join(lines({**report, "what": {"measured": "whole requests"}}, (STEPS,)))
    assert re.search(r"4 steps 2\.00x \[.*?\] \(4\.00x \[4\.00, 4\.00\] with all cores\)", printed)
    assert "cores given round 28 turns of 4 steps: median 1.10, least 1.10" in printed


def test_too_few_such_turns_make_no_figure(tmp_path: Path) -> None:
    met = meeting(tmp_path, [1.1] * 8 + [1.9] * 4)
    report = make_report(met.plan, met.samples, [met.samples])
    assert "all_cores" not in report["ratios"]["fewstep"]["diffusers"][str(STEPS)]
    assert report["contenders"]["fewstep"]["whole_all_cores"] == {}


def test_a_contender_that_dropped_out_has_no_turns_to_compare(tmp_path: Path) -> None:
    met = meeting(tmp_path, [1.9] * 6)
    met.samples["diffusers"] = Samples(error="out of memory")
    report = make_report(met.plan, met.samples, [met.samples])
    assert report["contenders"]["diffusers"] == {"error": "out of memory"}
    assert report["ratios"]["fewstep"] == {"diffusers": {}}


@pytest.fixture
def probe() -> Iterator[CoreProbe]:
    probe = CoreProbe(4)
    yield probe
    probe.close()


def test_cores_are_work_done_at_once_over_work_done_alone(probe: CoreProbe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four threads that take as long as one are four cores; twice as long, two. A turn that was held up is left out."""
    seconds = iter([(0.010, 0.020), (0.035, 0.090), (0.012, 0.021)])
    turns = iter([s for turn in seconds for s in turn])
    asked = []
    monkeypatch.setattr(probe, "_spent", lambda threads: asked.append(threads) or next(turns))
    assert probe.cores() == pytest.approx(2.0)
    assert asked == [1, 4] * 3
    monkeypatch.setattr(probe, "_spent", lambda _: 0.010)
    assert probe.cores() == pytest.approx(4.0)


def test_each_thread_of_the_probe_has_the_whole_work(probe: CoreProbe, monkeypatch: pytest.MonkeyPatch) -> None:
    workers: list[int] = []
    monkeypatch.setattr("fewstep.bench.probe._work", lambda *_: workers.append(threading.get_ident()))
    probe._spent(3)
    assert len(workers) == len(set(workers)) == 3
