"""Found schedules on the command line: as files, forced, stored in a bundle, listed and shown."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commandline import call
from fewstep.bundle import Bundle, read_bundle
from fewstep.export.embedded import embedded_bundle
from fewstep.schedules import FoundSchedules, NoiseSchedule
from fewstep.schedules.found import FoundEntry, noise_digest
from PIL import Image


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return read_bundle(shutil.copytree(embedded_bundle("student")[0].folder, tmp_path / "student"))


@pytest.fixture
def found(bundle: Bundle) -> FoundSchedules:
    noise = NoiseSchedule.from_diffusers(bundle.noise_config)
    return FoundSchedules(
        sampler="euler",
        model=bundle.unet_digest,
        noise_digest=noise_digest(noise),
        guidance=1.0,
        size=(64, 64),
        entries=(
            FoundEntry(
                steps=2, method="trajectory", sigmas=(12.0, 1.5, 0.0), figures={"psnr_db": 28.25, "prompts": "held"}
            ),
            FoundEntry(steps=3, method="endpoint", sigmas=(12.0, 3.0, 0.8, 0.0), fed=(980.0, 700.5, 300.0)),
        ),
    )


def of_another(found: FoundSchedules) -> FoundSchedules:
    return replace(found, model="0" * 64, noise_digest="0" * 64)


def pixels(path: str | Path) -> Any:
    return np.asarray(Image.open(path))


def test_a_picture_from_a_file_is_made_again(
    capsys: pytest.CaptureFixture[str],
    bundle: Bundle,
    found: FoundSchedules,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    found.save("f.json")
    asked = ("--prompt", "a red circle", "--seed", "5", "--steps", "2")
    code, out, _ = call(capsys, "run", str(bundle.folder), *asked, "--schedule", "f.json", "--json")
    (parameters,) = json.loads(out)["parameters"]
    assert (code, parameters["schedule_digest"]) == (0, found.digest[:12])
    _, out, _ = call(capsys, "inspect", "image.png")
    words = [w for w in shlex.split(out)[1:] if not w.startswith("--output")]
    code, _, err = call(capsys, *words, "--output=again.png")
    assert code == 2, "the bundle holds none"
    assert found.digest[:12] in err
    assert call(capsys, *words, "--schedule=f.json", "--output=again.png")[0] == 0
    np.testing.assert_array_equal(pixels("again.png"), pixels("image.png"))
    changed = replace(found, entries=(found.entries[1],))
    changed.save("g.json")
    code, _, err = call(capsys, *words, "--schedule=g.json", "--output=other.png")
    assert (code, f"digest {found.digest[:12]}" in err) == (4, True)
    assert call(capsys, "schedule", "store", str(bundle.folder), "f.json")[0] == 0
    assert call(capsys, *words, "--output=held.png")[0] == 0
    np.testing.assert_array_equal(pixels("held.png"), pixels("image.png"))
    assert call(capsys, "schedule", "store", str(bundle.folder), "g.json")[0] == 0
    code, _, err = call(capsys, *words, "--output=other.png")
    assert (code, f"digest {found.digest[:12]}" in err) == (4, True)
    assert not Path("other.png").exists()


def test_another_models_file_has_to_be_forced(
    capsys: pytest.CaptureFixture[str], bundle: Bundle, found: FoundSchedules, tmp_path: Path
) -> None:
    file, output = str(of_another(found).save(tmp_path / "f.json")), str(tmp_path / "x.png")
    asked = ("run", str(bundle.folder), "--prompt", "x", "--seed", "1", "--output", output)
    code, _, err = call(capsys, *asked, "--schedule", file)
    assert (code, "another model" in err, "--force-schedule" in err) == (4, True, True)
    assert call(capsys, *asked, "--schedule", file, "--force-schedule")[0] == 0
    assert call(capsys, *asked, "--schedule", file, "--force-schedule", "--sampler", "dpmpp_2m")[0] == 0
    code, _, err = call(capsys, *asked, "--schedule", "karras", "--force-schedule")
    assert (code, "without a file" in err) == (2, True)
    assert call(capsys, *asked, "--schedule", str(tmp_path / "none.json"))[0] == 3
    assert call(capsys, "schedule", "store", str(bundle.folder), file)[0] == 4
    assert read_bundle(bundle.folder).schedules == ()


def test_a_grid_over_files(
    capsys: pytest.CaptureFixture[str], bundle: Bundle, found: FoundSchedules, tmp_path: Path
) -> None:
    found.save(tmp_path / "f.json")
    of_another(found).save(tmp_path / "g.json")
    target = str(tmp_path / "grid.png")
    asked = ("grid", str(bundle.folder), "--prompt", "x", "--sampler", "euler", "--steps", "2", "--output", target)
    files = f"schedule=karras,{tmp_path / 'f.json'}"
    code, out, _ = call(capsys, *asked, "--columns", files, "--json")
    assert (code, json.loads(out)["columns"]) == (0, ["karras", str(tmp_path / "f.json")])
    files = f"schedule=karras,{tmp_path / 'g.json'}"
    assert call(capsys, *asked, "--columns", files)[0] == 4
    assert call(capsys, *asked, "--columns", files, "--force-schedule")[0] == 0
    plain = ("--columns", "seed=1,2", "--schedule", str(tmp_path / "g.json"))
    assert call(capsys, *asked, *plain)[0] == 4
    assert call(capsys, *asked, *plain, "--force-schedule")[0] == 0


def test_a_bundles_schedules_are_stored_listed_and_shown(
    capsys: pytest.CaptureFixture[str], bundle: Bundle, found: FoundSchedules, tmp_path: Path
) -> None:
    folder, file = str(bundle.folder), str(found.save(tmp_path / "f.json"))
    code, out, _ = call(capsys, "samplers", "--for", folder, "--json")
    assert (code, json.loads(out)["searched"]) == (0, [])
    code, out, _ = call(capsys, "schedule", "store", folder, file, "--json")
    assert code == 0
    assert json.loads(out) == {
        **{"bundle": folder, "sampler": "euler", "steps": [2, 3], "digest": found.digest},
        **{"file": "searched_euler.json"},
    }
    code, out, _ = call(capsys, "samplers", "--for", folder, "--json")
    held = json.loads(out)["searched"]
    assert [(h["sampler"], h["steps"], h["method"]) for h in held] == [
        ("euler", 2, "trajectory"),
        ("euler", 3, "endpoint"),
    ]
    assert held[0]["figures"] == {"psnr_db": 28.25, "prompts": "held"}
    code, out, _ = call(capsys, "samplers", "--for", folder)
    assert "psnr_db 28.25" in out
    assert found.digest[:12] in out
    shown = []
    for named in ((file, "--prediction", "v_prediction"), (file, "--for", folder), ("searched", "--for", folder)):
        code, out, _ = call(capsys, "schedule", "show", "euler", "--schedule", *named, "--steps", "3", "--json")
        (program,) = json.loads(out)["programs"] if code == 0 else [None]
        shown.append(program)
    assert shown[0] == shown[1] == shown[2]
    assert (shown[0]["schedule"], [r["timestep"] for r in shown[0]["rows"]]) == ("searched", [980.0, 700.5, 300.0])
    code, out, _ = call(capsys, "schedule", "show", "euler", "--schedule", file, "--schedule", "karras")
    assert "euler under searched, epsilon: 3 evaluations" in out
    assert "euler under karras, epsilon: 10 evaluations" in out


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("store", "FOLDER"), 2),
        (("store", "FOLDER", "none.json"), 3),
        (("store", "nowhere", "FILE"), 3),
        (("show", "euler", "FILE"), 2),
        (("show", "dpmpp_2m", "--schedule", "FILE"), 4),
        (("show", "euler", "--schedule", "FILE", "--steps", "9"), 2),
        (("show", "euler", "--schedule", "FILE", "--s-churn", "1"), 2),
        (("show", "euler", "--schedule", "FILE", "--compat", "diffusers"), 2),
        (("show", "euler", "--schedule", "searched"), 2),
        (("show", "euler", "--schedule", "searched", "--for", "FOLDER"), 2),
        (("show", "euler", "--schedule", "FILE", "--for", "base"), 4),
        (("show", "euler", "--schedule", "FILE", "--for", "base", "--force-schedule"), 0),
    ],
    ids=lambda w: " ".join(w) if isinstance(w, tuple) else str(w),
)
def test_exit_codes_of_schedule(
    capsys: pytest.CaptureFixture[str],
    bundle: Bundle,
    found: FoundSchedules,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    code: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    file = str(found.save(tmp_path / "f.json"))
    filled = [{"FOLDER": str(bundle.folder), "FILE": file}.get(w, w) for w in words]
    assert call(capsys, "schedule", *filled)[0] == code


def test_a_file_with_hostile_figures_moves_no_cursor(
    capsys: pytest.CaptureFixture[str], bundle: Bundle, found: FoundSchedules
) -> None:
    from fewstep.bundle import add_schedules

    figures = {"\x1b[2J": "\x1b]0;own\x07", "deep": {"a": ["\u202e"] * 50}, "number": 10**30, "flag": True}
    add_schedules(bundle.folder, replace(found, entries=(replace(found.entries[0], figures=figures),)))
    for flags in ([], ["--json"]):
        code, out, err = call(capsys, "samplers", "--for", str(bundle.folder), *flags)
        assert code == 0
        assert (out + err).replace("\n", "").isprintable()
