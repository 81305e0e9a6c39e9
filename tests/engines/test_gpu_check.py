"""The GPU check's plan `first` on stand-ins: every step on the embedded model and CPU tensors. No GPU is used."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "gpu_check.py"
SKIPPED = {
    "design/seeds": "there is no CUDA generator here",
    "design/stream_wrap": "there are no streams here",
    "design/synchronisations": "torch counts synchronisations on CUDA alone",
    **dict.fromkeys(
        (f"tiny/time/torch-{n}" for n in ("autotune-graph", "compile-graph", "reduce-overhead")),
        "torch.compile is timed on CUDA",
    ),
}


def run(folder: Path, *arguments: str, script: Path = SCRIPT, code: int = 0, **variables: str) -> tuple[Any, str]:
    command = [sys.executable, str(script), "--device", "cpu:torch", "--tiny", "--repeat", "2"]
    command += ["--folder", str(folder), "--output", str(folder / "report.json"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **variables})
    assert done.returncode == code, done.stderr
    report = folder / "report.json"
    return json.loads(report.read_text()) if report.is_file() else None, done.stderr


@pytest.mark.slow
def test_plan_first_says_what_became_of_every_step(tmp_path: Path) -> None:
    report, _ = run(tmp_path)
    results = report["results"]
    assert report["complete"]
    assert report["summary"] == {"failed": [], "skipped": sorted(SKIPPED), "not begun": []}
    for name, why in SKIPPED.items():
        assert results[name]["skipped"].startswith(why)
    timings = {n: r["requests"] for n, r in results.items() if r.get("requests")}
    assert set(timings) == {f"tiny/time/torch-{n}" for n in ("graph", "eager", "eager-plain-norms", "eager-nchw")}
    for name, requests in timings.items():
        assert [r["steps"] for r in requests] == [1, 2]
        for figures in requests:
            assert 0 < figures["known_prompt"]["p50_ms"] <= figures["known_prompt"]["p99_ms"]
            assert figures["new_prompt"]["n"] == 2
            expected = figures["known_prompt"]["p50_ms"] / figures["floor_ms"]
            assert figures["times_the_floor"] == pytest.approx(expected, rel=0.01)
            assert figures["graphs"]["failures"] == 0
            assert bool(figures["graphs"]["captures"]) == (name == "tiny/time/torch-graph")
    assert results["design/replays"]["counts"]["replays"] == 16
    assert results["tiny/profile"]["operations"] > 100
    assert set(results["tiny/shared"]) >= {"1 at once", "4 at once", "16 at once"}
    assert report["sources"] == json.loads((tmp_path / "state.json").read_text())["of"]["sources"]


def test_it_goes_on_where_it_was_cut_off_and_does_again_what_failed(tmp_path: Path) -> None:
    def some(**more: Any) -> tuple[Any, str]:
        return run(tmp_path, "--only", "tiny/bundle", **more)

    report, _ = run(tmp_path, "--only", "machine", code=1)
    assert report["complete"], "no timing is part of it, so none worked"
    (tmp_path / "tiny-bundle").write_text("a file where the bundle should go")
    failed, words = some(code=1)
    assert "ArgumentError" in failed["results"]["tiny/bundle"]["error"]
    assert "failed: tiny/bundle" in words
    (tmp_path / "tiny-bundle").unlink()
    again, _ = some(code=1)
    assert "error" not in again["results"]["tiny/bundle"], "what failed is done again"
    before = (tmp_path / "state.json").stat().st_mtime_ns
    some(code=1)
    assert (tmp_path / "state.json").stat().st_mtime_ns == before, "what was done is not"
    shutil.rmtree(tmp_path / "tiny-bundle")
    some(code=1)
    assert (tmp_path / "tiny-bundle" / "bundle.json").is_file(), "what it made is gone, so it is made again"
    cut, words = run(tmp_path, "--only", "tiny", "--slice-seconds", "1", code=75)
    assert not cut["complete"]
    assert "tiny/shared" in cut["summary"]["not begun"]


def test_a_step_that_hangs_or_crashes_ends_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import gpu_check

    options = gpu_check.argparse.Namespace(
        folder=tmp_path, plan="first", only="machine", device="cpu:torch", tiny=True, repeat=1,
        slice_seconds=100.0, least_seconds=0.5, output=None,
    )  # fmt: skip
    check = gpu_check.Check(options)
    hung = check.in_a_child(gpu_check.CheckStep("x", "machine"), 0.01)
    assert hung["error"] == "it was ended after 0 s"
    crashed = check.in_a_child(gpu_check.CheckStep("x", "no_such_step"), 60.0)
    assert crashed["error"].startswith("AttributeError")


def test_what_is_missing_is_said_first(tmp_path: Path) -> None:
    """What the steps import, and what that requires in turn."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    lines = ["import importlib.util as u, importlib.metadata as m", "f, d = u.find_spec, m.distribution"]
    lines.append("u.find_spec = lambda n, *a: None if n == 'diffusers' else f(n, *a)")
    lines.append(
        "m.distribution = lambda n: (_ for _ in ()).throw(m.PackageNotFoundError(n)) if n == 'psutil' else d(n)"
    )
    (hidden / "sitecustomize.py").write_text("\n".join(lines))
    report, words = run(tmp_path, code=3, PYTHONPATH=str(hidden))
    assert report is None
    assert "missing: diffusers, psutil;" in words


def test_it_runs_from_a_checkout_of_any_name(tmp_path: Path) -> None:
    """Where nothing is installed under fewstep's name, as on a fresh machine."""
    checkout = tmp_path / "checkout"
    rooms = [p.parent.name for p in ROOT.glob("*/__init__.py")]
    for name in (*rooms, "tools"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for file in (*ROOT.glob("*.py"), ROOT / "presets.json"):
        shutil.copy(file, checkout)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "sitecustomize.py").write_text(
        "import sys\nsys.meta_path = [f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', '')]"
    )
    script = checkout / "bench" / "gpu_check.py"
    report, _ = run(tmp_path / "out", "--only", "design/failed", script=script, code=1, PYTHONPATH=str(bare))
    assert report["results"]["design/failed_capture"]["captures"] == 7
