"""`fewstep run STAGE1 --then STAGE2`, and texts that are encoded before: by the command line, with what is refused."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import fewstep
import numpy as np
import pytest
from commandline import call
from fewstep.cli import main
from PIL import Image
from safetensors.numpy import load_file, save_file

PROMPT = "a red circle"


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_both_stages_in_one_command(
    deepfloyd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(deepfloyd)
    first, second, output = deepfloyd / "first", deepfloyd / "second", tmp_path / "x.png"
    words = ["run", str(first), f"--then={second},steps=3,guidance=3,size=24x32,noise_level=100", f"--prompt={PROMPT}"]
    code, out, err = call(capsys, *words, "--steps=4", "--seed=4", f"--output={output}", "--json")
    assert code == 0, err
    cascade = fewstep.Cascade([fewstep.load(first), fewstep.load(second, keep_text_encoders=False)])
    asked = {"steps": 3, "guidance": 3, "size": (24, 32), "noise_level": 100}
    expected = cascade(PROMPT, steps=4, seed=4, later=[asked]).images[0]
    np.testing.assert_array_equal(pixels(output), expected)
    assert json.loads(out)["parameters"][0]["then"] == ["second,steps=3,guidance=3,size=24x32,noise_level=100"]
    _, shown, _ = call(capsys, "inspect", str(output))
    again = shlex.split(next(line for line in shown.splitlines() if line.startswith("fewstep run")))
    output.unlink()
    assert main([*again[1:-1], f"--output={output}"]) == 0
    np.testing.assert_array_equal(pixels(output), expected)


def test_stages_one_after_another_by_files(
    deepfloyd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second alone, from a rounded picture; what its parameters say makes it again."""
    monkeypatch.chdir(deepfloyd)
    small, large = tmp_path / "small.png", tmp_path / "large.png"
    common = [f"--prompt={PROMPT}", "--seed=4", "--steps=3"]
    assert call(capsys, "run", str(deepfloyd / "first"), *common, f"--output={small}")[0] == 0
    words = ["run", str(deepfloyd / "second"), *common, f"--image={small}", "--noise-level=90", f"--output={large}"]
    assert call(capsys, *words)[0] == 0
    made = pixels(large)
    _, shown, _ = call(capsys, "inspect", str(large))
    line = next(line for line in shown.splitlines() if line.startswith("fewstep run"))
    assert "--noise-level=90" in line
    again = shlex.split(line)[1:-1]
    again = [f"--image={small}" if w.startswith("--image") else w for w in again]
    assert main([*again, f"--output={large}"]) == 0
    np.testing.assert_array_equal(pixels(large), made)


def test_texts_encoded_once(deepfloyd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, first = tmp_path / "texts.safetensors", str(deepfloyd / "first")
    code, out, err = call(
        capsys, "encode", first, f"--prompt={PROMPT}", "--negative=blue", f"--output={file}", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["truncated"] == [False]
    assert {n: t.shape for n, t in load_file(file).items()} == dict.fromkeys(
        ("prompt_embeds", "negative_prompt_embeds"), (1, 77, 32)
    )
    common = ["--steps=3", "--seed=2", f"--then={deepfloyd / 'second'},steps=2"]
    one, other = tmp_path / "one.png", tmp_path / "other.png"
    assert call(capsys, "run", first, *common, f"--prompt-embeds={file}", f"--output={one}")[0] == 0
    assert call(capsys, "run", first, *common, f"--prompt={PROMPT}", "--negative=blue", f"--output={other}")[0] == 0
    np.testing.assert_array_equal(pixels(one), pixels(other))


def test_bundles_without_their_text_encoders(
    deepfloyd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They take embeddings, and in a cascade those of the first stage; a text alone is an error that says so."""
    bare = [tmp_path / "one", tmp_path / "two"]
    for checkpoint, folder in zip(("if-i", "if-ii"), bare, strict=True):
        words = ["export", str(deepfloyd / checkpoint), str(folder), "--without=text_encoder", "--no-gate"]
        code, _, err = call(capsys, *words)
        assert code == 0, err
        assert not list(folder.glob("text_encoder*")), "nothing of it is written"
        assert not list(folder.glob("tokenizer*"))
    file, output = tmp_path / "texts.safetensors", tmp_path / "x.png"
    whole, common = [str(deepfloyd / n) for n in ("first", "second")], ["--steps=2", "--seed=3"]
    assert call(capsys, "encode", whole[0], f"--prompt={PROMPT}", f"--output={file}")[0] == 0
    assert call(capsys, "run", whole[0], f"--then={whole[1]},steps=2", *common, f"--prompt={PROMPT}",
                f"--output={output}")[0] == 0  # fmt: skip
    expected = pixels(output)
    for words in (
        [str(bare[0]), f"--then={bare[1]},steps=2", f"--prompt-embeds={file}"],
        [whole[0], f"--then={bare[1]},steps=2", f"--prompt={PROMPT}"],
    ):
        code, _, err = call(capsys, "run", *words, *common, f"--output={output}")
        assert code == 0, err
        np.testing.assert_array_equal(pixels(output), expected)
    for words in (
        ["run", str(bare[0]), f"--prompt={PROMPT}", *common, f"--output={output}"],
        ["encode", str(bare[0]), f"--prompt={PROMPT}", f"--output={file}"],
    ):
        code, _, err = call(capsys, *words)
        assert code != 0
        assert "text encoder" in err
    for verb in ("inspect", "memory"):
        code, _, err = call(capsys, verb, str(bare[0]))
        assert code == 0, err
    assert call(capsys, "samplers", "--for", str(bare[1]))[0] == 0


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([], "neither a prompt nor prompt_embeds"),
        (["--prompt=x", "--then=second"], "no bundle"),
        (["--prompt=x", "--then={second},steps"], "not NAME=VALUE"),
        (["--prompt=x", "--then={second},size=24"], "not WIDTHxHEIGHT"),
        (["--prompt=x", "--then={second},image=a.png"], "image for a later stage"),
        (["--prompt=x", "--then={second},noise_level=1000"], "noise_level is 1000"),
        (["--prompt=x", "--then={second},sampler=euler"], "thresholding"),
        (["--prompt=x", "--then={first}"], "as a later stage"),
        (["--prompt=x", "--prompt-embeds={file}"], "a prompt and prompt_embeds"),
        (["--prompt-embeds={wrong}"], "holds other"),
        (["--prompt-embeds=nowhere.safetensors"], "nowhere"),
    ],
)
def test_what_is_refused(
    deepfloyd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], found: str
) -> None:
    wrong, file = tmp_path / "wrong.safetensors", tmp_path / "file.safetensors"
    save_file({"other": np.zeros(3, np.float32)}, wrong)
    save_file({"prompt_embeds": np.zeros((1, 77, 32), np.float32)}, file)
    places = {n: str(deepfloyd / n) for n in ("first", "second")} | {"wrong": str(wrong), "file": str(file)}
    asked = [w.format(**places) for w in words]
    code, _, err = call(capsys, "run", places["first"], *asked, "--steps=1", f"--output={tmp_path / 'x.png'}")
    assert code in (2, 3, 4), err
    assert found in err


def test_the_second_stage_without_a_picture(deepfloyd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "run", str(deepfloyd / "second"), "--prompt=x", "--steps=1")
    assert code == 2
    assert "no image for DeepFloyd-IF's second stage" in err
    assert "--then" in err
