"""Whole searches on the embedded student: the same seeds the same file, a kill and going on, sets that share none."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fewstep.cli import main
from fewstep.commands.common import open_bundle
from fewstep.errors import ArgumentError, FewstepError, MismatchError, MissingError, UnsupportedError
from fewstep.runtime import Pipeline
from fewstep.schedules import FoundSchedules, NoiseSchedule, load_schedules
from fewstep.search import check_schedules, descent, ground, klub, search, search_schedules, trajectory, verdict
from fewstep.search.judging import compare, equal_error_steps, interval, psnr, ratio_interval, ssim
from fewstep.search.network import EngineNetwork
from fewstep.search.sets import Counts, read_prompts, share_prompts, usual_prompts
from hypothesis import given
from hypothesis import strategies as st

PROMPTS = [f"a {c} {s}" for c in ("red", "blue", "green", "white") for s in ("circle", "star", "ring", "cross")]
SMALL: dict[str, Any] = {"steps": (1, 2), "prompts": PROMPTS, "pairs": 4, "held_out": 8, "budget": 1e5}


@pytest.fixture(scope="module")
def student() -> Pipeline:
    return Pipeline(open_bundle("student"))


@pytest.fixture(scope="module")
def base() -> Pipeline:
    return Pipeline(open_bundle("base"))


@pytest.fixture(scope="module")
def found(student: Pipeline) -> FoundSchedules:
    return search_schedules(student, **SMALL)


def plain(found: FoundSchedules) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(json.dumps(found.to_json()))
    return data


class Killed(Exception):
    """What ends a search in a test, at any stage, as a kill does: nothing is cleaned up."""


def killed_at(stage: str) -> Callable[[str, float], None]:
    def progress(now: str, spent: float) -> None:
        if now == stage:
            raise Killed

    return progress


def test_the_same_seeds_give_the_same_file_and_others_another(student: Pipeline, found: FoundSchedules) -> None:
    assert plain(search_schedules(student, **SMALL)) == plain(found)
    other = search_schedules(student, **{**SMALL, "seed": 9, "steps": (2,), "method": "endpoint"})
    assert other.made["seeds"] == {"search": [9, 12], "choose": [13, 16], "held_out": [17, 24]}
    assert plain(other)["entries"] != plain(found)["entries"]


@pytest.mark.parametrize(
    "stage", ["the teacher's results: held out", pytest.param("2 steps: rows", marks=pytest.mark.slow)]
)
def test_a_killed_search_goes_on_to_the_same_file(
    student: Pipeline, found: FoundSchedules, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that was finished asks the network for nothing again."""
    work = tmp_path / "work"
    with pytest.raises(Killed):
        search_schedules(student, **SMALL, work=work, progress=killed_at(stage))
    before = json.loads((work / "search.json").read_text())["done"]
    assert before
    assert plain(search_schedules(student, **SMALL, work=work)) == plain(found)
    after = json.loads((work / "search.json").read_text())["done"]
    assert {k: after[k] for k in before} == before
    monkeypatch.setattr(EngineNetwork, "__call__", lambda *_: pytest.fail("evaluated again"))
    assert plain(search_schedules(student, **SMALL, work=work)) == plain(found)


def test_a_folder_of_another_search_is_refused_and_kept(student: Pipeline, tmp_path: Path) -> None:
    work = tmp_path / "work"
    with pytest.raises(Killed):
        search_schedules(student, **SMALL, work=work, progress=killed_at("1 steps: descent"))
    kept = (work / "search.json").read_bytes()
    with pytest.raises(MismatchError, match="another search"):
        search_schedules(student, **{**SMALL, "seed": 5}, work=work)
    assert (work / "search.json").read_bytes() == kept
    (work / "search.json").write_text("{")
    with pytest.raises(FewstepError):
        search_schedules(student, **SMALL, work=work)


def test_what_is_found_is_what_its_programs_do(student: Pipeline, found: FoundSchedules) -> None:
    """The pipeline's own images, from the file's programs, are as far from the student's eight steps as stated."""
    noise = NoiseSchedule.from_diffusers(student.bundle.noise_config)
    rows = check_schedules(student, found, prompts=PROMPTS, pairs=8)
    assert [r["steps"] for r in rows] == [1, 2]
    forced = replace(found, forced=True)
    for steps in (1, 2):
        image = student("a red circle", seed=3, steps=steps, schedule=found)
        assert image.parameters[0]["schedule_digest"] == found.digest[:12]
        program = forced.program(steps, noise=noise)
        assert program.evaluations == steps
        report = found.made["found"][str(steps)]
        assert report["pairs"] == 8
        assert report["beats_known"] == (found.entry(steps).method != "known")
        assert (report["ratio"]["high"] < 1.0) == report["beats_known"]


@pytest.mark.slow
def test_a_base_model_is_searched_by_every_method(base: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    for room in (ground, verdict):
        monkeypatch.setattr(room, "CURVE", (6,))
    for room, name, value in ((search, "KLUB_SWEEPS", 1), (search, "LEAST_DATA", 4), (klub, "FIRST", 4)):
        monkeypatch.setattr(room, name, value)
    for room, name, value in ((trajectory, "GRID", 16), (descent, "STARTS", 1)):
        monkeypatch.setattr(room, name, value)
    whole = search_schedules(base, **{**SMALL, "steps": (3,)})
    assert set(whole.made["found"]["3"]["chosen_by"]) == {"known", "klub", "trajectory", "endpoint", "rows"}
    assert whole.made["null"]["shuffled"] > whole.made["null"]["fitted"]
    assert whole.made["teacher"]["noise_floor"] < 0.01
    assert set(whole.made["equal_error"]) == {"3"}


@pytest.mark.parametrize("method", ["endpoint", "rows"])
def test_one_method_can_be_asked_for(student: Pipeline, method: str) -> None:
    report = search_schedules(student, **{**SMALL, "steps": (2,)}, method=method).made["found"]["2"]
    assert set(report["chosen_by"]) == {"known", method}


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        ({"steps": ()}, ArgumentError),
        ({"steps": (0,)}, ArgumentError),
        ({"steps": (8,)}, ArgumentError),
        ({"method": "magic"}, ArgumentError),
        ({"pairs": 1}, ArgumentError),
        ({"prompts": ["one", "two", "one"]}, ArgumentError),
        ({"teacher_steps": 20}, ArgumentError),
        ({"budget": 0}, ArgumentError),
        ({"budget": 1.0, "held_out": 4096}, ArgumentError),
        ({"sampler": "dpmpp_sde"}, UnsupportedError),
        ({"sampler": "lcm", "student": False}, UnsupportedError),
        ({"guidance": float("nan")}, ArgumentError),
    ],
)
def test_what_cannot_be_searched_is_said(student: Pipeline, asked: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        search_schedules(student, **{**SMALL, **asked})
    assert isinstance(caught.value, FewstepError)
    assert caught.value.expected


@given(
    count=st.integers(3, 60),
    sizes=st.tuples(*[st.integers(1, 40)] * 3),
    seed=st.integers(0, 2**31),
)
def test_sets_share_no_prompt(count: int, sizes: tuple[int, int, int], seed: int) -> None:
    prompts = [f"prompt {i}" for i in range(count)]
    counts = Counts(search=sizes[0], choose=sizes[1], held_out=sizes[2])
    shared = share_prompts(prompts, counts, seed)
    assert [len(s) for s in shared] == list(sizes)
    assert sum(len(set(s)) for s in shared) == len(set().union(*shared))
    assert shared == share_prompts(prompts, counts, seed)


def test_usual_prompts_differ_and_files_are_read(tmp_path: Path) -> None:
    assert len(set(usual_prompts())) == len(usual_prompts()) >= 320
    file = tmp_path / "p.txt"
    file.write_text("# no prompt\n\n a cat \nein Würfel\n", encoding="utf-8")
    assert read_prompts(file) == ["a cat", "ein Würfel"]
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ArgumentError):
        read_prompts(file)
    with pytest.raises(MissingError):
        read_prompts(tmp_path / "none.txt")


def test_intervals_hold_what_they_say() -> None:
    """Of many draws of known means, the interval holds the true mean about 95 times in a hundred."""
    rng = np.random.default_rng(0)
    draws = [interval(rng.exponential(1.0, 200)) for _ in range(300)]
    assert 0.90 < np.mean([d["low"] < 1.0 < d["high"] for d in draws]) < 0.99
    a = rng.uniform(1, 2, 400)
    assert ratio_interval(0.5 * a, a) == {"mean": 0.5, "low": 0.5, "high": 0.5}
    told = compare({"found": 0.5 * a, "x": a, "y": 2 * a}, "found")
    assert (told["best_known"], told["wins"], list(told["known"])) == ("x", 1.0, ["x", "y"])


def test_equal_error_is_read_off_the_curve() -> None:
    curve = [(5, 0.4), (10, 0.2), (20, 0.1)]
    assert equal_error_steps(0.2, curve) == pytest.approx(10)
    assert equal_error_steps(0.2 * 0.5**0.5, curve) == pytest.approx(10 * 2**0.5)
    assert (equal_error_steps(0.5, curve), equal_error_steps(0.01, curve)) == (5, None)


def test_pictures_are_compared_as_others_compare_them() -> None:
    """PSNR by its formula, SSIM against SciPy's filter; equal pictures are the most alike."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(1)
    a = rng.integers(0, 256, (40, 48, 3)).astype(np.uint8)
    b = np.clip(a.astype(int) + rng.integers(-30, 31, a.shape), 0, 255).astype(np.uint8)
    assert (psnr(a, a), ssim(a, a)) == (99.0, pytest.approx(1.0))
    assert psnr(a, b) == pytest.approx(10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2)))
    x, y = (p @ np.array([0.299, 0.587, 0.114]) for p in (a, b))

    def blurred(v: np.ndarray) -> np.ndarray:
        return np.asarray(gaussian_filter(v, 1.5, radius=5)[5:-5, 5:-5])

    mx, my = blurred(x), blurred(y)
    vx, vy, cov = blurred(x * x) - mx**2, blurred(y * y) - my**2, blurred(x * y) - mx * my
    c1, c2 = 6.5025, 58.5225
    index = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert ssim(a, b) == pytest.approx(float(index.mean()), abs=1e-6)


def test_the_command_searches_plots_and_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("\n".join(PROMPTS))
    asked = ["--prompts", "prompts.txt", "--pairs", "4", "--held-out", "8", "--steps", "1", "--budget", "1h"]
    assert main(["schedule", "search", "student", *asked, "--output", "s.json", "--plot", "s.png"]) == 0
    assert "held-out pairs" in capsys.readouterr().out
    assert (Path("s.png").read_bytes()[:4], Path("s.json.work").exists()) == (b"\x89PNG", False)
    found = load_schedules("s.json")
    assert main(["schedule", "check", "student", "s.json", "--prompts", "prompts.txt", "--pairs", "4", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["schedule"], [r["steps"] for r in told["rows"]]) == (found.digest, [1])
    assert main(["run", "student", "--prompt", "a red circle", "--schedule", "s.json", "--output", "x.png"]) == 0
    for wrong, code in (
        (["--output", "s.txt"], 2),
        (["--output", "none/s.json"], 3),
        (["--prompts", "none.txt"], 3),
        (["--budget", "soon"], 2),
        (["--steps", "1,x"], 2),
        (["--pictures", "none"], 3),
    ):
        assert main(["schedule", "search", "student", *asked, *wrong]) == code
    assert not list(Path().glob("*.work"))
