"""The command line: what it prints, its exit codes, its JSON."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commandline import call
from fewstep.bundle import write_manifest
from fewstep.cli import VERBS
from PIL import Image


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_json(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    code, out, _ = call(capsys, verb, "--help")
    assert code == 0
    assert "--json" in out
    assert "exit codes" in out


def test_help_loads_nothing_heavy() -> None:
    code = "import sys; from fewstep.cli import make_parser; make_parser('').format_help(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"numpy", "torch", "onnxruntime", "PIL", "tokenizers", "tqdm"} & {m.split(".")[0] for m in loaded}


def test_run_and_inspect(
    capsys: pytest.CaptureFixture[str], sd1_bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bundle = str(sd1_bundle.folder)
    code, out, _ = call(capsys, "run", bundle, "--prompt", "a cat", "--seed", "5", "--steps", "2", "--json")
    data = json.loads(out)
    assert (code, data["files"], data["seeds"]) == (0, ["image.png"], [5])
    code, out, _ = call(capsys, "inspect", "image.png")
    assert out.startswith("fewstep run ")
    assert out.startswith(f"fewstep run {sd1_bundle.folder.name} "), "a name, and no path"
    assert "--seed=5" in out.split()
    code, out, _ = call(capsys, "inspect", bundle, "--json")
    assert json.loads(out)["family"] == "sd1"
    code, out, _ = call(
        capsys,
        "run",
        bundle,
        "--prompt",
        "b",
        "--image",
        "image.png",
        "--strength",
        "0.5",
        "--steps",
        "4",
        "--seed",
        "1",
        "--output",
        "two.png",
    )
    assert code == 0
    assert "total" in out
    assert Image.open("two.png").size == (32, 32)


def test_the_printed_command_makes_the_same_picture(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shlex

    monkeypatch.chdir(tmp_path)
    code, _, _ = call(capsys, "demo", "--scale", "1", "--output", "demo.png")
    assert code == 0
    _, out, _ = call(capsys, "inspect", "demo.png")
    words = [w for w in shlex.split(out)[1:] if not w.startswith("--output")]
    assert call(capsys, *words, "--output=again.png")[0] == 0
    np.testing.assert_array_equal(np.asarray(Image.open("demo.png")), np.asarray(Image.open("again.png")))


def test_the_demo_shows_what_it_was_asked(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(capsys, "demo", "--model", "base", "--scale", "1")
    assert code == 0
    assert "demo.png" in out
    pixels = np.asarray(Image.open("demo.png")).astype(int)
    corner, middle = pixels[:4, :4].mean((0, 1)), pixels[30:34, 30:34].mean((0, 1))
    assert corner.argmax() == 2, "the background is blue"
    assert middle.argmax() == 0, "the shape is red"


def test_build_verify_and_the_store(capsys: pytest.CaptureFixture[str], sd1_bundle: Any) -> None:
    bundle = str(sd1_bundle.folder)
    assert call(capsys, "build", bundle)[0] == 0
    code, out, _ = call(capsys, "build", bundle, "--json")
    assert all(e["reused"] for e in json.loads(out)["engines"].values())
    code, out, _ = call(capsys, "build", bundle, "--dry-run")
    assert "already built" in out
    code, out, _ = call(capsys, "verify", bundle, "--json")
    assert (code, json.loads(out)["passed"]) == (0, True)
    code, out, _ = call(capsys, "engines", "list", "--json")
    names = [e["name"] for e in json.loads(out)["engines"]]
    assert any(n.startswith("unet.ort-cpu") for n in names)
    assert call(capsys, "engines", "verify")[0] == 0
    assert call(capsys, "engines", "show", names[0])[0] == 0
    assert call(capsys, "engines", "show", "nothing")[0] == 3
    assert call(capsys, "engines", "prune", "--dry-run", "--everything")[0] == 0
    code, out, _ = call(capsys, "engines", "prune", names[0], "--dry-run", "--json")
    assert [p["name"] for p in json.loads(out)["pruned"]] == names[:1], "what is named, and nothing else"
    for wrong in (["list", "nothing"], ["verify", "nothing"], ["prune", "nothing", "--dry-run"]):
        assert call(capsys, "engines", *wrong)[0] == 3
    for wrong in (["list", "--everything"], ["prune", names[0], "--everything"], ["prune", "--unused-days=nan"]):
        assert call(capsys, "engines", *wrong)[0] == 2
    assert len(json.loads(call(capsys, "engines", "list", "--json")[1])["engines"]) == len(names)
    assert call(capsys, "build", bundle, "--dynamic", "hight=4:8:16")[0] == 2
    code, _, err = call(capsys, "build", bundle, "--component", "unett")
    assert (code, "expected one like unet" in err) == (2, True)


def test_a_preset_is_shown_and_gone_by(capsys: pytest.CaptureFixture[str], sd1_bundle: Any, tmp_path: Path) -> None:
    folder = tmp_path / "lightning"
    shutil.copytree(sd1_bundle.folder, folder)
    defaults = replace(
        sd1_bundle.defaults,
        preset="own",
        sampler="euler",
        schedule="trailing",
        steps=1,
        guidance=0,
        prediction="sample",
    )
    write_manifest(replace(sd1_bundle, folder=folder, defaults=defaults))
    words = "preset own: euler under trailing, 1 step, guidance 0, 32x32"
    code, out, _ = call(capsys, "inspect", str(folder))
    assert (words in out, "PNDMScheduler, sample" in out) == (True, True)
    code, _, err = call(capsys, "run", str(folder), "--prompt", "x", "--output", str(tmp_path / "x"))
    assert (code, words in err) == (0, True)
    code, out, _ = call(capsys, "schedule", "show", "euler", "--for", str(folder), "--json")
    assert json.loads(out)["programs"][0]["prediction"] == "sample"


def test_samplers_and_schedules(capsys: pytest.CaptureFixture[str], sd1_bundle: Any, tmp_path: Path) -> None:
    code, out, _ = call(capsys, "samplers", "--json")
    names = {s["name"] for s in json.loads(out)["samplers"]}
    assert {"euler", "ddim", "dpmpp_2m", "lcm"} <= names
    code, out, _ = call(capsys, "samplers", "--for", str(sd1_bundle.folder))
    assert code == 0
    assert "LCM-distilled" in out
    picture = tmp_path / "sigmas.png"
    code, out, _ = call(
        capsys,
        "schedule",
        "show",
        "DPM++ 2M",
        "--schedule",
        "karras",
        "--schedule",
        "ays",
        "--steps",
        "6",
        "--plot",
        str(picture),
    )
    assert code == 0
    assert picture.stat().st_size > 5000
    code, out, _ = call(capsys, "schedule", "show", "euler", "--steps", "4", "--json")
    assert len(json.loads(out)["programs"][0]["rows"]) == 4


def test_a_grid(capsys: pytest.CaptureFixture[str], sd1_bundle: Any, tmp_path: Path) -> None:
    target = tmp_path / "grid.png"
    code, out, _ = call(
        capsys,
        "grid",
        str(sd1_bundle.folder),
        "--prompt",
        "x",
        "--columns",
        "sampler=euler,dpmpp_2m,lms",
        "--rows",
        "steps=1,2",
        "--output",
        str(target),
    )
    assert (code, "3 x 2" in out) == (0, True)
    assert Image.open(target).width > 3 * 128
    assert call(capsys, "grid", str(sd1_bundle.folder), "--prompt", "x", "--columns", "colour=red")[0] == 2


def test_a_grid_over_prompts_that_hold_commas(
    capsys: pytest.CaptureFixture[str], sd1_bundle: Any, tmp_path: Path
) -> None:
    folder, target = str(sd1_bundle.folder), tmp_path / "grid.png"
    asked = ("--columns", "prompt=a cat, asleep|a dog", "--steps", "1", "--json", "--output", str(target))
    code, out, _ = call(capsys, "grid", folder, *asked)
    assert (code, json.loads(out)["columns"]) == (0, ["a cat, asleep", "a dog"])
    code, _, err = call(capsys, "grid", folder, "--columns", "steps=1,2")
    assert (code, "no prompt was given" in err) == (2, True)


def test_exit_codes(capsys: pytest.CaptureFixture[str], sd1_bundle: Any, tiny_sd1: Path, tmp_path: Path) -> None:
    bundle = str(sd1_bundle.folder)
    assert call(capsys)[0] == 2
    assert call(capsys, "paint")[0] == 2
    assert call(capsys, "run", bundle)[0] == 2
    code, out, err = call(capsys, "run", bundle, "--prompt", "x", "--sampler", "eulr", "--json")
    assert code == 2
    assert json.loads(out)["error"]["type"] == "UnknownNameError"
    assert "euler" in err
    assert call(capsys, "run", bundle, "--prompt", "x", "--guidance", "nan")[0] == 2
    assert call(capsys, "run", bundle, "--prompt", "x", "--steps", "0")[0] == 2
    assert call(capsys, "run", bundle, "--prompt", "x", "--size", "33x32")[0] == 2
    assert call(capsys, "run", str(tmp_path), "--prompt", "x")[0] == 3
    assert call(capsys, "export", str(tmp_path / "none"), str(tmp_path / "b"))[0] == 3
    (tmp_path / "model.ckpt").write_bytes(b"x")
    assert call(capsys, "export", str(tmp_path / "model.ckpt"), str(tmp_path / "b"))[0] == 4
    (tmp_path / "bundle.json").write_text("{}")
    assert call(capsys, "inspect", str(tmp_path))[0] == 4
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("output", ["", "nowhere/x.png", "x.bmp", "."])
def test_outputs_are_checked_before_anything_is_made(
    capsys: pytest.CaptureFixture[str], sd1_bundle: Any, output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, "run", str(sd1_bundle.folder), "--prompt", "x", "--output", output, "--json")
    assert code in (2, 3)
    assert json.loads(out)["exit_code"] == code
    assert "output" in err or "folder" in err


def test_file_system_errors_are_typed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("FEWSTEP_CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(capsys, "demo", "--json")
    assert code == 3
    assert json.loads(out)["error"]["type"] == "WriteError"


def test_export_from_the_command_line(
    capsys: pytest.CaptureFixture[str], tiny_sd1: Path, sd1_bundle: Any, tmp_path: Path
) -> None:
    code, out, _ = call(capsys, "export", str(tiny_sd1), str(tmp_path / "b"), "--json", "--no-gate")
    data = json.loads(out)
    assert code == 0
    assert data["components"]["unet"]["dtype"] == "float32"
    assert data["peak_memory_bytes"] > 0


@pytest.mark.parametrize(
    "arguments", [("run", "--json"), ("--json", "nope"), ("build", "x", "--json", "--size", "wide")]
)
def test_a_usage_error_is_data_under_json(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    code, out, err = call(capsys, *arguments)
    said = json.loads(out)
    assert (code, said["exit_code"], said["error"]["type"]) == (2, 2, "UsageError")
    assert "--help" in said["error"]["remedy"]
    assert "See: fewstep" in err
