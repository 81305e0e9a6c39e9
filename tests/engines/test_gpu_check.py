"""The GPU check on the CPU: the same steps on the embedded model, cut off after each slice and gone on with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import fewstep
import pytest

SCRIPT = Path(fewstep.__file__).parent / "bench" / "gpu_check.py"


def run(folder: Path, *arguments: str) -> tuple[int, dict]:
    command = [sys.executable, str(SCRIPT), "--device", "cpu:torch", "--tiny", "--repeat", "2"]
    command += ["--folder", str(folder), "--output", str(folder / "report.json"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 75), done.stderr
    return done.returncode, json.loads((folder / "report.json").read_text())


def test_it_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    code, first = run(tmp_path, "--slice-seconds", "0")
    assert (code, first["complete"], list(first["results"])) == (75, False, ["machine"])
    (tmp_path / "tiny-bundle").write_text("a file where the bundle should go")
    code, failed = run(tmp_path)
    assert "ArgumentError" in failed["results"]["tiny/bundle"]["error"]
    assert "error" in failed["results"]["tiny/64/1/torch-eager"]
    (tmp_path / "tiny-bundle").unlink()
    before = (tmp_path / "state.json").stat().st_mtime_ns
    assert "error" in run(tmp_path)[1]["results"]["tiny/bundle"]
    assert (tmp_path / "state.json").stat().st_mtime_ns == before, "nothing is done twice, unless it is asked for"

    code, report = run(tmp_path, "--retry")
    results = report["results"]
    assert (code, report["complete"]) == (0, True)
    assert results["machine"] == first["results"]["machine"]
    assert {n: r["error"] for n, r in results.items() if "error" in r} == {}
    timings = {n: r for n, r in results.items() if "p50_ms" in r}
    assert {n.rpartition("/")[2] for n in timings} == {"torch-eager", "torch-graph", "ort-cpu"}
    for name, found in timings.items():
        assert 0 < found["p50_ms"] <= found["p99_ms"]
        assert found["times_the_floor"] == pytest.approx(found["p50_ms"] / found["floor_ms"], rel=0.01)
        assert len(found["stages_ms"]["evaluations"]) == int(name.split("/")[2])
        assert found["psnr_to_eager_db"] is None or found["psnr_to_eager_db"] > 45
        assert found["graphs"]["captures"] == (1 if name.endswith("torch-graph") else 0)
    assert results["tiny/build/ort-cpu"]["unet"]["gate"]["passed"]
    work = results["tiny/work"]["64"]["unet"]
    assert work["bytes"] > 1e7
    assert work["flops"] > 1e8
