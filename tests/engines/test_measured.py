"""The choice among the CPU's backends: measured once, kept, and never a guess where nothing may be measured."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import onnxruntime
import pytest
from fewstep.bundle import Bundle
from fewstep.engines import Store, build_engines
from fewstep.engines.measured import _read, choose_measured
from fewstep.export import embedded

OTHER = Path(__file__).parents[2] / "build" / "bench" / "fewstep-openvino" / "bin" / "python"
SCRIPT = """
import json, sys
from pathlib import Path
from fewstep.bundle import read_bundle
from fewstep.engines import Store, build_engines, open_engines
from fewstep.engines.measured import choose_measured
bundle, store = read_bundle(sys.argv[1]), Store(Path(sys.argv[2]))
before = choose_measured(bundle, "unet", store=store, build="never")
built = build_engines(bundle, components=["unet"], store=store)["unet"]
engine = open_engines(bundle, ["unet"], store=store, build="never")["unet"]
again = choose_measured(bundle, "unet", store=store)
print(json.dumps([before.backend, before.reason, built.backend, built.reason, engine.backend, again.milliseconds]))
"""


def test_without_another_backend_there_is_no_choice(bundle: Bundle, store: Store) -> None:
    if "OpenVINOExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-openvino is installed")
    choice = choose_measured(bundle, "unet", store=store)
    assert (choice.backend, choice.reason, choice.milliseconds) == ("ort-cpu", "", {})
    built = build_engines(bundle, components=["unet"], store=store)["unet"]
    assert built.backend == "ort-cpu"
    assert not list(store.root.glob(".choice.*"))


@pytest.mark.skipif(not OTHER.is_file(), reason="make bench-peers makes the environment with OpenVINO's provider")
def test_the_fastest_is_measured_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE_DIR", str(tmp_path / "cache"))
    student, _ = embedded.embedded_bundle("student")
    command = [str(OTHER), "-c", SCRIPT, str(student.folder), str(tmp_path / "store")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    first, why_first, chosen, why, opened, times = json.loads(ran.stdout.splitlines()[-1])
    assert (first, why_first) == ("ort-cpu", "nothing was measured")
    assert times.keys() == {"ort-cpu", "ort-openvino"}
    assert chosen == opened == min(times, key=times.__getitem__)
    assert "measured here" in why
    assert "ms on ort-cpu" in why
    assert "ms on ort-openvino" in why
    assert len(list((tmp_path / "store").glob(".choice.*.json"))) == 1


@pytest.mark.skipif(not OTHER.is_file(), reason="make bench-peers makes the environment with OpenVINO's provider")
def test_what_a_backend_cannot_run_is_said(bundle: Bundle, tmp_path: Path) -> None:
    command = [str(OTHER), "-c", SCRIPT, str(bundle.folder), str(tmp_path / "store")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    chosen, why = json.loads(ran.stdout.splitlines()[-1])[2:4]
    assert chosen == "ort-cpu"
    assert "ort-openvino cannot run it: the attention" in why  # this graph states no shapes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"backend": "tensorrt", "reason": "", "milliseconds": {}}',
        '{"backend": "ort-cpu", "reason": ""}',
    ],
)
def test_a_record_that_cannot_be_read_is_no_record(tmp_path: Path, text: str) -> None:
    record = tmp_path / "choice.json"
    assert _read(record) is None
    record.write_text(text)
    assert _read(record) is None
    record.write_text('{"backend": "ort-openvino", "reason": "why", "milliseconds": {"ort-cpu": 2}}')
    choice = _read(record)
    assert choice is not None
    assert (choice.backend, choice.reason, choice.milliseconds) == ("ort-openvino", "why", {"ort-cpu": 2.0})
