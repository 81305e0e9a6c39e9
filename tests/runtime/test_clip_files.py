"""Clips in files, and from the command line."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import psnr
from clips import photograph
from commandline import call
from fewstep.errors import ArgumentError, MissingError, MissingExtraError
from fewstep.runtime.pictures.parameters import read_parameters
from fewstep.runtime.pictures.video import check_clip_output, save_clips
from PIL import Image

MADE = {"bundle": "clips", "prompt": "", "seed": 5, "recorded": {"frames": 6}}


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    """uint8 [1, 6, 48, 64, 3]: a picture that moves to the left."""
    wide = np.asarray(photograph(96, 48, 3).convert("L").convert("RGB"))
    return np.stack([wide[:, 4 * i : 4 * i + 64] for i in range(6)])[None]


def test_mp4(clip: np.ndarray, tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    assert save_clips(tmp_path / "a.mp4", clip, 12, [MADE]) == [str(tmp_path / "a.mp4")]
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        frames = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(stream)])
        assert (stream.average_rate, stream.codec_context.name, stream.pix_fmt) == (12, "h264", "yuv420p")
        assert json.loads(container.metadata["comment"]) == MADE
        assert float(container.duration) / 1e6 == pytest.approx(0.5, abs=0.05)
    assert frames.shape == clip.shape[1:]
    assert psnr(frames, clip[0]) > 30
    assert psnr(frames[0], frames[5]) < 25, "it does not move"
    assert list(tmp_path.iterdir()) == [tmp_path / "a.mp4"]


def test_mp4_of_odd_sides(clip: np.ndarray, tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    save_clips(tmp_path / "odd.mp4", clip[:, :, :47, :63], 1000, [MADE])
    with av.open(str(tmp_path / "odd.mp4")) as container:
        assert container.streams.video[0].codec_context.width == 64


@pytest.mark.parametrize(("suffix", "least"), [(".webp", 30.0), (".GIF", 25.0)])
def test_animated_pictures(clip: np.ndarray, tmp_path: Path, suffix: str, least: float) -> None:
    save_clips(tmp_path / f"a{suffix}", clip, 7, [MADE])
    with Image.open(tmp_path / f"a{suffix}") as opened:
        frames, shown = [], 0
        for i in range(opened.n_frames):
            opened.seek(i)
            frames.append(np.asarray(opened.convert("RGB")))
            shown += opened.info["duration"]
        said = opened.info.get("comment", b"") + opened.info.get("exif", b"")
    assert psnr(np.stack(frames), clip[0]) > least
    assert shown == pytest.approx(6000 / 7, abs=6)
    assert b'"seed": 5' in said


def test_a_folder_of_pictures_and_several_clips(clip: np.ndarray, tmp_path: Path) -> None:
    names = save_clips(tmp_path / "many", np.concatenate([clip, clip[:, ::-1]]), 7, [MADE, MADE])
    assert names == [str(tmp_path / "many-0"), str(tmp_path / "many-1")]
    files = sorted((tmp_path / "many-1").iterdir())
    assert [f.name for f in files] == [f"{i:04d}.png" for i in range(6)]
    np.testing.assert_array_equal(np.asarray(Image.open(files[0])), clip[0, 5])


def test_frames_take_the_place_of_an_earlier_clips_and_of_nothing_else(clip: np.ndarray, tmp_path: Path) -> None:
    for frames in (6, 2):
        save_clips(tmp_path / "one", clip[:, :frames], 7, [MADE])
        assert len(list((tmp_path / "one").iterdir())) == frames
    theirs = tmp_path / "one" / "notes.txt"
    theirs.touch()
    with pytest.raises(ArgumentError, match=r"notes\.txt"):
        check_clip_output(tmp_path / "one")
    with pytest.raises(ArgumentError, match=r"notes\.txt"):
        save_clips(tmp_path / "one", clip, 7, [MADE])
    assert len(list(theirs.parent.iterdir())) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one"]


@pytest.mark.parametrize("name", ["a.avi", "a.png", "none/a.mp4", "there.mp4", "file"])
def test_where_no_clip_can_go(tmp_path: Path, name: str) -> None:
    (tmp_path / "there.mp4").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises((ArgumentError, MissingError)):
        check_clip_output(tmp_path / name)


def test_without_pyav(clip: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtraError, match="Writing an MP4") as raised:
        save_clips(tmp_path / "a.mp4", clip, 7, [MADE])
    assert "fewstep[video]" in raised.value.remedy
    save_clips(tmp_path / "a.webp", clip, 7, [MADE])


@pytest.mark.parametrize(
    ("guidance", "told"),
    [
        (("--min-guidance=1.5", "--guidance=2.5"), 2.5),
        (("--guidance=1,2.5,3,1.25,2",), [1.0, 2.5, 3.0, 1.25, 2.0]),
    ],
)
def test_from_the_command_line(
    tiny_svd: Any,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    guidance: tuple[str, ...],
    told: float | list[float],
) -> None:
    monkeypatch.chdir(tmp_path)
    photograph(40, 30).save("first.png")
    bundle = str(tiny_svd.bundle.folder)
    asked = ["--image=first.png", "--size=16x24", "--steps=3", "--frames=5", "--fps=9", "--motion-bucket=90"]
    asked += ["--noise-augmentation=0.1", *guidance, "--decode-chunk=2", "--seed=4"]
    code, out, err = call(capsys, "run", bundle, *asked, "--output=clip", "--json")
    assert code == 0, err
    assert json.loads(out)["files"] == ["clip"]
    parameters = read_parameters("clip/0003.png")
    assert parameters["recorded"]["fps"] == 9
    assert parameters["guidance"] == told
    assert "image" in parameters
    _, command, _ = call(capsys, "inspect", "clip/0003.png")
    words = [w for w in shlex.split(command)[1:] if not w.startswith("--output")]
    assert not [w for w in words if w.startswith(("--prompt", "--strength"))]
    assert words[1] == tiny_svd.bundle.folder.name, "a name, and no path"
    assert call(capsys, words[0], bundle, *words[2:], "--output=again")[0] == 0
    for i in range(5):
        first, second = (np.asarray(Image.open(f"{folder}/{i:04d}.png")) for folder in ("clip", "again"))
        np.testing.assert_array_equal(first, second)
    wrong = ["run", bundle, *asked]
    assert "expected" in call(capsys, *wrong, "--output=clip.png")[2]
    assert "prompt for a model that makes clips" in call(capsys, *wrong, "--prompt=a cat", "--output=x")[2]
    code, _, err = call(capsys, "run", bundle, "--output=x")
    assert code
    assert "no image" in err


def test_what_else_is_told_of_a_bundle(tiny_svd: Any, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = str(tiny_svd.bundle.folder)
    code, out, _ = call(capsys, "inspect", bundle)
    assert code == 0
    assert "clips of up to 14 frames" in out
    code, out, _ = call(capsys, "memory", bundle, "--no-measure", "--size=64x64")
    assert code == 0
    assert all(name in out for name in ("image_encoder", "unet", "vae_decoder", "vae_encoder"))
    code, out, _ = call(capsys, "samplers", "--for", bundle)
    assert code == 0
    assert "dpmpp_2m" in out
    code, out, _ = call(capsys, "build", bundle, "--backend=ort-cpu", "--dry-run", "--dynamic=chunk=1:4:14")
    assert code == 0
    code, _, err = call(capsys, "serve", bundle)
    assert code
    assert "makes clips" in err
