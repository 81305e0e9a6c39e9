"""Prompts, pictures and memory from the command line, and what the library warns of."""

from __future__ import annotations

import json
import logging
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import fewstep
import numpy as np
import pytest
from commandline import call
from PIL import Image

LONG = "many words " * 60


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    grey = np.linspace(0, 255, 40 * 48).reshape(40, 48).astype(np.uint8)
    Image.fromarray(np.stack([grey, grey[::-1], grey], -1)).save("in.png")
    Image.fromarray(grey).save("mask.png")


ASKED = [
    ("sd1", ["--prompt-syntax=a1111", "--prompt=a (red:1.3) [circle] BREAK square", "--negative=(grey)"]),
    ("sd1", [f"--prompt={LONG}", "--long-prompts=chunk", "--seed-device=cuda", "--sampler=euler_ancestral"]),
    ("sd1", ["--prompt=x", "--clip-skip=1", "--vae-tiling=on", "--vae-slicing=on", "--drop-text-encoders"]),
    ("sd1", ["--prompt=x", "--image=in.png", "--mask=mask.png", "--fit=cover", "--strength=0.9"]),
    ("sd1", ["--prompt=x", "--image=in.png", "--mask=mask.png", "--mask-threshold=none", "--sampler=euler"]),
    ("sd1", ["--prompt=x", "--image=in.png", "--fit=diffusers", "--mask=mask.png", "--mask-threshold=0.8"]),
    (
        "sdxl",
        [
            "--prompt=x",
            "--prompt-2=y",
            "--negative-2=z",
            "--original-size=40x50",
            "--crop-top-left=3,4",
            "--target-size=30x20",
            "--negative-crop-top-left=-1,2",
        ],
    ),
]


@pytest.mark.parametrize(("family", "asked"), ASKED, ids=[f"{f}-{i}" for i, (f, _) in enumerate(ASKED)])
@pytest.mark.usefixtures("pictures")
def test_the_printed_command_makes_the_same_picture(
    capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest, family: str, asked: list[str]
) -> None:
    bundle = str(request.getfixturevalue(f"{family}_bundle").folder)
    plain = ["--seed=4", "--steps=3", "--guidance=3"]
    code, _, err = call(capsys, "run", bundle, *asked, *plain, "--output=one.png")
    assert code == 0, err
    _, out, _ = call(capsys, "inspect", "one.png")
    words = [w for w in shlex.split(out)[1:] if not w.startswith("--output")]
    kept = [w for w in asked if w.startswith(("--vae", "--drop"))]  # of memory, not of the picture
    assert words[1] == Path(bundle).name, "a name, and no path"
    code, _, err = call(capsys, words[0], bundle, *words[2:], *kept, "--output=two.png")
    assert code == 0, (words, err)
    np.testing.assert_array_equal(np.asarray(Image.open("one.png")), np.asarray(Image.open("two.png")))
    assert call(capsys, "run", bundle, "--prompt=other", *plain, "--output=three.png")[0] == 0
    assert np.asarray(Image.open("three.png")).tobytes() != np.asarray(Image.open("one.png")).tobytes()


@pytest.mark.usefixtures("pictures")
def test_cut_prompts_are_told(capsys: pytest.CaptureFixture[str], sd1_bundle: Any) -> None:
    code, out, err = call(
        capsys, "run", str(sd1_bundle.folder), "--prompt", LONG, "--prompt", "short", "--steps", "1", "--json"
    )
    assert code == 0
    assert json.loads(out)["truncated"] == [True, False]
    assert "warning: 1 prompt(s) are longer than the text encoder takes" in err
    assert "--long-prompts chunk" in err


@pytest.mark.parametrize(
    "arguments",
    [("--crop-top-left", "3"), ("--mask-threshold", "grey"), ("--fit", "squeeze"), ("--original-size", "40")],
)
def test_usage_errors(capsys: pytest.CaptureFixture[str], sd1_bundle: Any, arguments: tuple[str, str]) -> None:
    code, _, err = call(capsys, "run", str(sd1_bundle.folder), "--prompt", "x", *arguments)
    assert (code, arguments[0] in err) == (2, True)


@pytest.mark.usefixtures("pictures")
def test_a_picture_keeps_its_size_unless_another_is_asked_for(
    capsys: pytest.CaptureFixture[str], sd1_bundle: Any, tmp_path: Path
) -> None:
    Image.new("RGB", (47, 37), (90, 20, 60)).save(tmp_path / "odd.png")
    plain = ["run", str(sd1_bundle.folder), "--prompt=x", "--image=odd.png", "--steps=2", "--output=out.png"]
    code, _, err = call(capsys, *plain)
    assert (code, "size 46x36: that of the picture, 47x37" in err) == (0, True), err
    assert Image.open("out.png").size == (46, 36)
    code, _, err = call(capsys, *plain, "--size=32x32")
    assert (code, "that of the picture" in err, Image.open("out.png").size) == (0, False, (32, 32))
    code, _, err = call(capsys, *plain, "--size=47x37")
    assert (code, "width is 47; expected a multiple of 2. Use 46 or 48." in err) == (2, True), err


@pytest.mark.usefixtures("pictures")
def test_a_grid_takes_the_same(capsys: pytest.CaptureFixture[str], sd1_bundle: Any) -> None:
    code, out, err = call(
        capsys,
        "grid",
        str(sd1_bundle.folder),
        "--prompt=a (red) circle",
        "--prompt-syntax=a1111",
        "--image=in.png",
        "--mask=mask.png",
        "--columns=clip_skip=0,1",
        "--rows=strength=0.5,1",
        "--steps=2",
    )
    assert (code, "2 x 2" in out) == (0, True), err


def test_python_callers_are_warned_too(sd1_bundle: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Once a pipeline: a service that asks for the same thing a million times is told once."""
    lightning = replace(sd1_bundle, defaults=replace(sd1_bundle.defaults, preset="lcm-lora"))
    pipe = fewstep.load(lightning)
    with caplog.at_level(logging.WARNING, "fewstep.runtime"):
        request = pipe.request("x", guidance=7.0)
        pipe.request("x", guidance=7.0)
    assert request.warnings == ("lcm-lora was made for guidance of at most 2, not 7.",)
    assert [r.getMessage() for r in caplog.records] == list(request.warnings)
    assert fewstep.load(sd1_bundle).request("x", guidance=7.0).warnings == ()
