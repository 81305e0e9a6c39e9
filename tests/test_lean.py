"""With some extras alone, whatever is documented ends well or in an error of ours that names what is missing."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from fewstep.export.embedded import embedded_bundle
from lean import commands_run, lean_path, run_lean
from test_docs import STAND_IN, shell_lines

APART = {"bench", "memory", "serve"}
"""Verbs whose work is done by processes of their own, which would not be lean, or which do not end."""
RUN = ["run", "student", "--prompt", "a red circle", "--output", "x.png"]
NO_DRIVER = "no NVIDIA driver is loaded"
HAS_DRIVER = Path("/proc/driver/nvidia/version").exists()
without_gpu = pytest.mark.skipif(HAS_DRIVER, reason="there is a GPU here, whose driver comes first")


@pytest.fixture(scope="module")
def cpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pip install 'fewstep[cpu]'` brings."""
    return lean_path(tmp_path_factory.mktemp("lean") / "cpu", ["cpu"])


def shown(outcome: dict[str, Any]) -> str:
    return f"{outcome['out'][-300:]}\n{outcome['err'][-2000:]}"


def test_what_is_left_out_is_left_out(cpu: Path, tmp_path: Path) -> None:
    modules = ("torch", "onnx", "diffusers", "transformers", "starlette", "matplotlib", "numpy", "onnxruntime")
    script = f"import importlib.util as u, json; print(json.dumps([n for n in {modules!r} if u.find_spec(n)]))"
    assert json.loads(run_lean(cpu, script, cwd=tmp_path).stdout) == ["numpy", "onnxruntime"]


def test_every_documented_command_ends_in_our_words(cpu: Path, tmp_path: Path) -> None:
    """In the order in which they stand; what a reader brings himself (a folder, a file) is not there.

    Those of the README, and with FEWSTEP_SLOW_TESTS=1 those of all documents.
    """
    shutil.copytree(embedded_bundle("student")[0].folder, tmp_path / STAND_IN)
    everywhere = bool(os.environ.get("FEWSTEP_SLOW_TESTS"))
    lines = [shlex.split(p.text) for p in shell_lines() if everywhere or p.document.name == "README.md"]
    commands = [["student" if w == "BUNDLE" else w for w in words[1:]] for words in lines if words[0] == "fewstep"]
    commands = list(map(list, dict.fromkeys(map(tuple, commands))))
    commands = [c for c in commands if len(c) > 1 and c[0] not in APART and "search" not in c]
    outcomes = commands_run(cpu, commands, cwd=tmp_path)
    for command, outcome in zip(commands, outcomes, strict=True):
        assert outcome["code"] in (0, 2, 3, 4, 5), f"{shlex.join(command)}: {shown(outcome)}"
        assert outcome["code"] == 0 or "fewstep: " in outcome["err"], f"{shlex.join(command)}: {shown(outcome)}"
    assert sum(o["code"] == 0 for o in outcomes) > (15 if everywhere else 5), "the commands do nothing"


MISSING = [
    ([*RUN, "--backend", "torch"], 3, "fewstep[export]"),
    ([*RUN, "--backend", "ort-openvino"], 3, "fewstep[openvino]"),
    (["build", "student", "--backend", "ort-openvino-bf16"], 3, "fewstep[openvino]"),
    (["serve", "student"], 3, "fewstep[serve]"),
    (["verify", "student", "--polygraphy"], 3, "fewstep[verify]"),
    (["verify", "student", "--bisect"], 3, "fewstep[export]"),
    (["schedule", "show", "euler", "--plot", "x.png"], 3, "fewstep[plot]"),
    (["memory", "student", "--backend", "torch"], 3, "fewstep[export]"),
    ([*RUN, "--size", "4096x4096"], 3, "memory does not suffice"),
]
ON_GPUS = [
    *([*RUN, "--backend", b] for b in ("tensorrt", "tensorrt-rtx", "ort-cuda")),
    *(["build", "student", "--backend", b] for b in ("tensorrt", "ort-cuda")),
]


def test_what_is_missing_is_named(cpu: Path, tmp_path: Path) -> None:
    for (command, code, words), outcome in zip(
        MISSING, commands_run(cpu, [c for c, _, _ in MISSING], cwd=tmp_path), strict=True
    ):
        assert outcome["code"] == code, f"{command}: {shown(outcome)}"
        assert words in outcome["err"].splitlines()[-1], f"{command}: {shown(outcome)}"


@without_gpu
def test_a_missing_driver_is_told_before_what_would_be_of_no_use(cpu: Path, tmp_path: Path) -> None:
    for command, outcome in zip(ON_GPUS, commands_run(cpu, ON_GPUS, cwd=tmp_path), strict=True):
        assert outcome["code"] == 3, f"{command}: {shown(outcome)}"
        assert NO_DRIVER in outcome["err"], f"{command}: {shown(outcome)}"


def test_what_was_judged_without_torch_is_told(cpu: Path, tmp_path: Path) -> None:
    (outcome,) = commands_run(cpu, [["verify", "student"]], cwd=tmp_path)
    assert outcome["code"] == 0, shown(outcome)
    assert "passed" in outcome["out"]
    assert "the final image is not compared" in outcome["err"]


PYTHON = """
import json, fewstep
from fewstep.runtime.diffusers_adapter import StableDiffusionPipeline
said = []
for name, call in {
    "fewstep[export]": [
        lambda: fewstep.load("student", device="cpu:torch"),
        lambda: fewstep.load("student", backend="torch"),
        lambda: fewstep.load("student", devices=["cpu", "cpu:torch"]),
    ],
    "DRIVER": [
        lambda: fewstep.load("student", device="cuda"),
        lambda: fewstep.load("student", device="cuda:1"),
        lambda: fewstep.load("student", devices=["cuda:0", "cuda:1"]),
        lambda: fewstep.load("student", backend="tensorrt"),
        lambda: StableDiffusionPipeline.from_pretrained("student").to("cuda"),
    ],
}.items():
    for one in call:
        try:
            said.append([name, "nothing", repr(one())])
        except fewstep.FewstepError as error:
            said.append([name, type(error).__name__, str(error)])
print(json.dumps(said))
"""


def test_python_s_doors_end_in_our_errors(cpu: Path, tmp_path: Path) -> None:
    done = run_lean(cpu, PYTHON, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for asked, kind, words in json.loads(done.stdout):
        if asked == "DRIVER":
            assert HAS_DRIVER or (kind, NO_DRIVER in words) == ("MissingError", True), words
        else:
            assert kind == "MissingExtraError", (asked, words)
            assert asked in words


@pytest.mark.parametrize(
    ("extras", "command", "code", "words"),
    [
        ((), RUN, 3, "fewstep[cpu]"),
        (("cpu", "serve"), ["run", "student", "--prompt", "x", "--backend", "torch"], 3, "fewstep[export]"),
        (("cpu", "plot"), ["schedule", "show", "euler", "--steps", "3", "--plot", "x.png"], 0, ""),
        (("cpu", "video"), ["inspect", "student"], 0, ""),
        (("cpu", "verify"), ["verify", "student", "--polygraphy", "--no-image"], 0, ""),
    ],
    ids=lambda v: "+".join(v) if isinstance(v, tuple) else None,
)
def test_each_extra_alone(tmp_path: Path, extras: tuple[str, ...], command: list[str], code: int, words: str) -> None:
    (outcome,) = commands_run(lean_path(tmp_path / "lean", extras), [command], cwd=tmp_path)
    assert outcome["code"] == code, shown(outcome)
    assert words in outcome["err"], shown(outcome)
    if code == 0:
        assert "Traceback" not in outcome["err"], shown(outcome)


def test_the_http_door_needs_its_extra_alone(tmp_path: Path) -> None:
    lean = lean_path(tmp_path / "lean", ["cpu", "serve"])
    done = run_lean(lean, "import sys, fewstep.serving.http.app; print('torch' in sys.modules)", cwd=tmp_path)
    assert done.stdout.strip() == "False", done.stderr
