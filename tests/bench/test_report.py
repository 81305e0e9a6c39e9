"""The report's turns: those in which the machine gave all cores have figures of their own, once they are enough."""

from __future__ import annotations

import re
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
    made = Meeting(plan, ["fewstep", "diffusers"], tmp_path, print)
    for name, fast in (("fewstep", 10.0), ("diffusers", 40.0)):
        made.found[name].wall[STEPS] = [fast if c > 1.8 else fast + 20.0 for c in cores]
        made.found[name].cores[STEPS] = cores
        made.found[name].stages[STEPS] = [{} for _ in cores]
        made.found[name].cpu[STEPS] = made.found[name].wall[STEPS]
    return made


def test_turns_with_all_cores_have_figures_of_their_own(tmp_path: Path) -> None:
    met = meeting(tmp_path, [1.1] * 8 + [1.9] * 6)
    report = make_report(met.plan, met.found, [met])
    found = report["ratios"]["fewstep"]["diffusers"][str(STEPS)]
    assert (found["ratio"], found["rounds"]) == (2.0, 14)
    assert (found["all_cores"]["ratio"], found["all_cores"]["rounds"]) == (4.0, 6)
    assert report["contenders"]["fewstep"]["whole"]["4"]["p50"] == 30.0
    assert report["contenders"]["fewstep"]["whole_all_cores"]["4"]["p50"] == 10.0
    printed = "\n".join(lines({**report, "what": {"measured": "whole requests"}}, (STEPS,)))
    assert re.search(r"4 steps 2\.00x \[.*?\] \(4\.00x \[4\.00, 4\.00\] with all cores\)", printed)
    assert "cores given round 28 turns of 4 steps: median 1.10, least 1.10" in printed


def test_too_few_such_turns_make_no_figure(tmp_path: Path) -> None:
    met = meeting(tmp_path, [1.1] * 8 + [1.9] * 4)
    report = make_report(met.plan, met.found, [met])
    assert "all_cores" not in report["ratios"]["fewstep"]["diffusers"][str(STEPS)]
    assert report["contenders"]["fewstep"]["whole_all_cores"] == {}


def test_a_contender_that_dropped_out_has_no_turns_to_compare(tmp_path: Path) -> None:
    met = meeting(tmp_path, [1.9] * 6)
    met.found["diffusers"] = Samples(error="out of memory")
    report = make_report(met.plan, met.found, [met])
    assert report["contenders"]["diffusers"] == {"error": "out of memory"}
    assert report["ratios"]["fewstep"] == {"diffusers": {}}


def test_one_thread_is_one_core() -> None:
    probe = CoreProbe(1)
    try:
        assert probe.cores() == pytest.approx(1.0, abs=0.9)
    finally:
        probe.close()
