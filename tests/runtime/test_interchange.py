"""What pictures say to other programs, and hear from them: A1111's text, EXIF, ComfyUI's prompts; no paths."""

from __future__ import annotations

import io
import json
import shlex
import time
from pathlib import Path
from typing import Any

import fewstep
import numpy as np
import pytest
from commandline import call
from fewstep.errors import ArgumentError, CorruptError
from fewstep.export.embedded import embedded_bundle
from fewstep.runtime.pictures.images import check_output, save_picture
from fewstep.runtime.pictures.infotext import MOST_LINE, infotext, read_infotext
from fewstep.runtime.pictures.parameters import read_call, read_parameters
from fewstep.runtime.pictures.texts import JSON_KEY, MOST_EXIF, TEXT_KEY, exif_of, read_texts
from fewstep.runtime.pictures.video import check_clip_output
from fewstep.schedules.a1111 import SAMPLER_LABELS, SCHEDULE_LABELS, read_labels
from fewstep.schedules.names import resolve_sampler, resolve_schedule
from hostile import edits
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

PROMPT = "a red circle on a blue background"
THEIRS = """masterpiece, (a red circle:1.2), <lora:ink:0.5>
on a blue background
Negative prompt: ugly, [blurry]
Steps: 3, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 12345, Size: 64x64, Model hash: 0123456789, \
Model: v1-5-pruned, VAE hash: 735e4c3a44, Clip skip: 2, RNG: CPU, Token merging ratio: 0.5, \
Lora hashes: "ink: 0123456789ab", Version: v1.10.1"""
"""What the web UI writes, version 1.10, of two lines and a LoRA."""
HIRES = """a cat
Steps: 20, Sampler: Euler a, Schedule type: Automatic, CFG scale: 6.5, Seed: 4, Size: 512x768, Variation seed: 9, \
Variation seed strength: 0.25, Denoising strength: 0.4, Hires upscale: 1.5, Hires steps: 8, \
Hires upscaler: R-ESRGAN 4x+, Version: v1.10.1"""


@pytest.fixture(scope="module")
def result() -> fewstep.runtime.Result:
    pipe = fewstep.load(embedded_bundle("student")[0])
    call_ = {"seed": 5, "steps": 2, "sampler": "DPM++ 2M", "schedule": "karras", "guidance": 0.0}
    return pipe(f"{PROMPT} (so)", negative="", variation=0.25, variation_seed=9, **call_)


def entries(text: str) -> dict[str, str]:
    return dict(e.split(": ", 1) for e in text.splitlines()[-1].split(", "))


def test_a_picture_speaks_the_web_ui_s_words(result: Any) -> None:
    text = infotext({**result.parameters[0], "recorded": {"clip_skip": 1, "mask": "m.png"}, "image": "i.png"})
    said = entries(text)
    assert list(said)[:6] == ["Steps", "Sampler", "Schedule type", "CFG scale", "Seed", "Size"]
    assert (said["Sampler"], said["Schedule type"], said["CFG scale"]) == ("DPM++ 2M", "Karras", "1")
    assert (said["Clip skip"], said["RNG"], said["Mask blur"], said["Denoising strength"]) == ("2", "CPU", "0", "1.0")
    assert (said["Variation seed"], said["Variation seed strength"]) == ("9", "0.25")
    assert text.splitlines()[0] == rf"{PROMPT} \(so\)", "what weighs nothing here weighs nothing there"
    other = {**result.parameters[0], "recorded": {"seed_device": "cuda", "prompt_syntax": "a1111"}}
    assert "RNG: NV" in infotext(other)
    assert infotext(other).splitlines()[0] == f"{PROMPT} (so)"
    loras = infotext({**result.parameters[0], "loras": {"ink.safetensors": 0.5, "x": {"unet": 0.2, "text": 1.0}}})
    assert loras.splitlines()[0].endswith("<lora:ink:0.5> <lora:x:1:0.2>")


def test_names_go_there_and_back() -> None:
    for ours, theirs in SAMPLER_LABELS.items():
        assert resolve_sampler(theirs).name in (ours, "unipc_2")
    for ours, theirs in SCHEDULE_LABELS.items():
        assert resolve_schedule(read_labels("Euler", theirs)[1]) in (ours, "ays_sd")
    assert read_labels("DPM++ 2M", "Automatic")[1] == "karras"
    assert read_labels("DPM++ 2M Karras", None)[1] == "karras"
    assert read_labels("Euler a", "Automatic")[1] == "linspace"
    assert read_labels("DDIM", None)[1] == "leading"


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".webp", ".avif"])
def test_every_format_says_how_it_was_made(result: Any, suffix: str, tmp_path: Path) -> None:
    (name,) = result.save(tmp_path / f"out{suffix}")
    assert read_parameters(name) == json.loads(json.dumps(result.parameters[0]))
    assert read_texts(name)[1][TEXT_KEY] == [infotext(result.parameters[0])]
    with Image.open(name) as image:
        assert image.format == {".png": "PNG", ".webp": "WEBP", ".avif": "AVIF"}.get(suffix, "JPEG")
        difference = np.asarray(image.convert("RGB")).astype(float) - result.images[0]
        assert abs(difference).mean() < (1e-9 if suffix == ".png" else 4)
        if suffix != ".png":
            comment = image.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
            assert comment == b"UNICODE\0" + infotext(result.parameters[0]).encode("utf-16-be")


def test_exif_is_typed_as_its_standard_says_and_fits_a_jpeg(result: Any, tmp_path: Path) -> None:
    block = exif_of({TEXT_KEY: "größe", JSON_KEY: "{}"})
    assert block.startswith(b"Exif\0\0MM\0*")
    for tag in (b"\x92\x86", b"\x92\x7c"):
        assert block[block.index(tag) + 2 : block.index(tag) + 4] == b"\0\x07", "of type UNDEFINED"
    long = {**result.parameters[0], "prompt": "x" * MOST_EXIF}
    save_picture(tmp_path / "x.jpg", result.images[0], long)
    assert read_texts(tmp_path / "x.jpg")[1] == {}, "a text that does not fit is left out, and the picture is whole"
    save_picture(tmp_path / "y.jpg", result.images[0], {**long, "prompt": "x" * 25_000})
    assert list(read_texts(tmp_path / "y.jpg")[1]) == [TEXT_KEY]


def test_outputs_that_are_no_pictures(result: Any, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"ends in .*\.avif"):
        result.save(tmp_path / "x.bmp")
    for check in (check_output, check_clip_output):
        with pytest.raises(ArgumentError, match="goes to standard output"):
            check("-")
    result.save(tmp_path / "x.PNG")
    assert (tmp_path / "x.PNG").is_file()


def test_a_picture_of_theirs_is_carried_over_and_the_rest_is_said() -> None:
    carried = read_infotext(THEIRS, "theirs.png")
    p = carried.parameters
    assert p["prompt"] == "masterpiece, (a red circle:1.2), <lora:ink:0.5>\non a blue background"
    assert p["negative"] == "ugly, [blurry]"
    assert (p["steps"], p["sampler"], p["schedule"], p["guidance"], p["seed"]) == (3, "DPM++ 2M", "karras", 7.0, 12345)
    assert p["recorded"] == {"prompt_syntax": "a1111", "clip_skip": 1}
    assert carried.left == ("VAE hash: 735e4c3a44", "Token merging ratio: 0.5")
    p = read_infotext(HIRES, "hires.png").parameters
    assert p["hires"] == {"scale": 1.5, "strength": 0.4, "steps": 8, "upscaler": "lanczos"}
    assert (p["variation_seed"], p["variation"], p["recorded"]["seed_device"]) == (9, 0.25, "cuda")
    assert any("R-ESRGAN 4x+" in entry for entry in read_infotext(HIRES, "hires.png").left)
    restart = read_infotext(HIRES.replace("Euler a", "Restart"), "x.png")
    assert any(e.startswith("Sampler: Restart") for e in restart.left)
    assert "sampler" not in restart.parameters
    for text in ("a cat", "a cat\nSteps: 3, Size: 64x64", HIRES.replace("20", "many"), HIRES.replace("512x768", "big")):
        with pytest.raises(CorruptError):
            read_infotext(text, "x.png")


@pytest.mark.parametrize("piece", ["a", " ", "a: ", 'a1: "', '\\"', "a1:,", 'a1:"\\"'])
def test_long_texts_take_no_time(piece: str) -> None:
    """A line of 64 KiB of what makes careless patterns look at everything again and again."""
    begun = time.process_time()
    for line in (piece * (MOST_LINE // len(piece)), "Steps: 3, Seed: 1, x: " + piece * (MOST_LINE // len(piece) // 2)):
        with pytest.raises(CorruptError):
            read_infotext(f"a cat\n{line}", "x.png")
    assert time.process_time() - begun < 2


def theirs(path: Path, text: str) -> Path:
    """A picture as the web UI saves it: a PNG's text, or EXIF's comment as `piexif` writes it."""
    image = Image.new("RGB", (8, 8))
    if path.suffix == ".png":
        info = PngInfo()
        info.add_text("parameters", text)
        image.save(path, pnginfo=info)
    else:
        image.save(path, exif=exif_of({TEXT_KEY: text}))
    return path


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_run_from_a_picture_of_theirs(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    picture = theirs(tmp_path / f"theirs{suffix}", THEIRS.replace(", <lora:ink:0.5>", "").replace("Clip skip: 2, ", ""))
    code, out, err = call(capsys, "inspect", str(picture))
    assert code == 0
    assert "--sampler='DPM++ 2M'" in out or "'--sampler=DPM++ 2M'" in out
    assert "not carried over: VAE hash: 735e4c3a44" in err
    code, out, err = call(capsys, "run", "student", "--from", str(picture), "--guidance", "1", "--json")
    assert code == 0, err
    assert "not carried over: Token merging ratio: 0.5" in err
    (made,) = json.loads(out)["parameters"]
    assert (made["seed"], made["sampler"], made["schedule"], made["guidance"]) == (12345, "DPM++ 2M", "karras", 1.0)
    assert made["recorded"] == {"prompt_syntax": "a1111"}


def test_run_from_a_picture_of_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ("--seed", "3", "--seed", "8", "--steps", "2", "--hires", "96x80", "--hires-strength", "0.75")
    more = ("--hires-upscaler", "latent", "--sampler", "euler_ancestral", "--variation", "0.2")
    code, _, err = call(capsys, "run", "student", "--prompt", PROMPT, *asked, *more, "--output", "a.webp")
    assert code == 0, err
    assert call(capsys, "run", "student", "--from", "a-1.webp", "--output", "b.png")[0] == 0
    first, again = read_parameters("a-1.webp"), read_parameters("b.png")
    assert {**again, "index": 1} == first
    _, command, _ = call(capsys, "inspect", "a-1.webp")
    assert call(capsys, *shlex.split(command)[1:-1], "--output=c.png")[0] == 0
    pixels = [np.asarray(Image.open(n)) for n in ("b.png", "c.png")]
    np.testing.assert_array_equal(*pixels)
    assert pixels[0].shape == (80, 96, 3)
    assert call(capsys, "run", "student", "--from", "b.png", "--seed", "1", "--output", "d.png")[0] == 0
    assert read_parameters("d.png")["seed"] == 1
    assert call(capsys, "run", "student", "--prompt", "x", "--hires-steps", "3")[0] == 2
    assert call(capsys, "run", "student", "--from", "none.png")[0] == 3


def test_sheets_carry_their_call(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (
        ("--prompt", PROMPT, "--columns", "steps=1,2", "--rows", "seed=4,5", "--guidance", "0", "--cell", "64"),
        ("--prompt-matrix", "a red circle|small|on a blue background"),
        ("--columns", "prompt=a red circle, small|a green ring", "--steps", "1"),
    ):
        assert call(capsys, "grid", "student", *words, "--output", "a.png")[0] == 0
        code, command, _ = call(capsys, "inspect", "a.png")
        assert code == 0
        assert call(capsys, *shlex.split(command)[1:-1], "--output=b.png")[0] == 0
        np.testing.assert_array_equal(np.asarray(Image.open("a.png")), np.asarray(Image.open("b.png")))
        assert read_texts("a.png")[1][TEXT_KEY][0].count("Script: ") == 1
        assert call(capsys, "run", "student", "--from", "a.png")[0] == 2


def test_a_prompt_matrix_is_all_combinations_in_the_web_ui_s_order() -> None:
    from fewstep.commands.axes import cell_call, labels, matrix_axes

    first, columns, rows = matrix_axes("a busy street, | illustration | cinematic lighting | rain")
    cells = [
        [cell_call({"prompt": first}, columns, rows, across, down)["prompt"] for across in columns[1]]
        for down in rows[1]
    ]
    expected = []
    parts = ["illustration", "cinematic lighting", "rain"]
    for n in range(8):  # as the web UI's script counts
        expected.append(", ".join(["a busy street", *(p for i, p in enumerate(parts) if n & (1 << i))]))
    assert [c for row in cells for c in row] == expected
    assert labels(*rows) == ["", "rain"]
    for wrong in ("a", "a||b", "|a", "|".join("abcdefghijk")):
        with pytest.raises(ArgumentError, match="prompt matrix"):
            matrix_axes(wrong)


def test_no_picture_says_where_it_was_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bundle, start picture, mask and output are given by paths that hold a person's name; no file says it."""
    home = tmp_path / "home" / "jane.doe"
    home.mkdir(parents=True)
    monkeypatch.chdir(home)
    bundle = home / "models" / "student"
    bundle.parent.mkdir()
    bundle.symlink_to(embedded_bundle("student")[0].folder)
    Image.new("RGB", (64, 64), "red").save(home / "in.png")
    Image.new("L", (64, 64), 255).save(home / "mask.png")
    start = ("--image", str(home / "in.png"), "--mask", str(home / "mask.png"), "--strength", "1", "--seed", "1")
    for i, words in enumerate(
        [
            ("run", str(bundle), "--prompt", PROMPT, *start),
            ("run", str(bundle), "--prompt", PROMPT, "--hires", "2x"),
            ("grid", str(bundle), "--prompt", PROMPT, "--columns", "seed=1,2", "--image", str(home / "in.png")),
            ("demo",),
        ]
    ):
        for suffix in ("png", "jpg") if i < 2 else ("png",):
            file = home / f"out{i}.{suffix}"
            assert call(capsys, *words, "--output", str(file))[0] == 0
            said = "\n".join(t for texts in read_texts(file)[1].values() for t in texts)
            assert said
            for private in ("jane.doe", str(tmp_path), "models", str(embedded_bundle("student")[0].folder)):
                assert private not in said
                assert private.encode() not in file.read_bytes()
    monkeypatch.chdir(home)
    assert call(capsys, "inspect", "out1.png")[1].startswith("fewstep run models/student "), "found here by its weights"


def test_a_prompt_for_comfyui_is_a_graph_of_the_call(result: Any, tmp_path: Path) -> None:
    (name,) = result.save(tmp_path / "out.png")
    with Image.open(name) as image:
        nodes = json.loads(image.text["prompt"])
    classes = {n["class_type"]: n["inputs"] for n in nodes.values()}
    assert set(classes) == {"FewstepLoad", "FewstepSchedule", "FewstepSample", "FewstepDecode", "SaveImage"}
    assert classes["FewstepSample"]["prompt"] == f"{PROMPT} (so)"
    assert (classes["FewstepSample"]["seed"], classes["FewstepSchedule"]["steps"]) == (5, 2)
    for inputs in classes.values():
        for value in inputs.values():
            assert not isinstance(value, list) or (value[0] in nodes and value[1] == 0)
    save_picture(tmp_path / "b.png", result.images[0], {**result.parameters[0], "image": "in.png"})
    assert "prompt" not in read_texts(tmp_path / "b.png")[1], "a call that the nodes do not do is not told wrongly"


def test_no_edit_of_a_text_of_theirs_surprises(tmp_path: Path, result: Any) -> None:
    """350 edits of A1111's text and EXIF: typed errors, or parameters that are checked."""
    import random

    from fewstep.errors import FewstepError

    draw, refused = random.Random(5), 0
    for _ in range(250):
        text = list(HIRES if draw.random() < 0.5 else THEIRS)
        for _ in range(draw.randrange(1, 6)):
            at = draw.randrange(len(text))
            text[at : at + draw.randrange(4)] = draw.choice(["", "9" * 400, "nan", ": ", ",", '"', "\n", "\x1b[", "-"])
        try:
            read_call(theirs(tmp_path / "x.png", "".join(text)))
        except FewstepError:
            refused += 1
    assert 10 < refused < 240
    whole = io.BytesIO()
    Image.new("RGB", (8, 8)).save(whole, "JPEG", exif=exif_of({TEXT_KEY: THEIRS, JSON_KEY: "{"}))
    for _ in range(100):
        data = bytearray(whole.getvalue())
        data[draw.randrange(200)] = draw.randrange(256)
        (tmp_path / "x.jpg").write_bytes(data)
        try:
            read_call(tmp_path / "x.jpg")
        except FewstepError:
            refused += 1


def test_edits_of_what_sheets_and_passes_say(result: Any) -> None:
    from fewstep.errors import FewstepError
    from fewstep.runtime.pictures.parameters import check_parameters, command_line
    from fewstep.values import Reader

    data = {**json.loads(json.dumps(result.parameters[0])), "grid": {"columns": "steps=1,2", "cell": "64"}}
    data["hires"] = {"scale": 2.0, "size": "64x64", "strength": 0.5, "steps": 3, "upscaler": "latent"}
    refused = 0
    for _, changed in edits(data, 400, seed=3):
        try:
            check_parameters(changed, Reader(place="x"))
            assert command_line(changed, "x.png").isprintable()
        except FewstepError:
            refused += 1
    assert refused > 100
