"""What a PNG says of itself: read without its pixels, by type and range; no word acts on terminal or shell."""

from __future__ import annotations

import io
import json
import os
import resource
import shlex
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
from commandline import call
from fewstep.cli import make_parser
from fewstep.errors import CorruptError, FewstepError
from fewstep.runtime.pictures.parameters import JSON_KEY, command_line, read_parameters
from hostile import edits
from PIL import Image

PARAMETERS: dict[str, Any] = {
    **{"bundle": "b", "model": "b", "prompt": "a cat", "negative": None, "prompt_2": "x", "seed": 3, "index": 0},
    **{"width": 8, "height": 16, "steps": 2, "guidance": 5.0, "sampler": "euler", "schedule": None, "compat": None},
    **{"strength": 0.5, "image": "in.png", "batch": {"prompts": ["a", "b"], "seed": 3}, "version": "1"},
    "options": {"eta": 0.5, "sigmas": [14.614647, 0.0], "rho": 5, "lower_order_final": False},
    "recorded": {"clip_skip": 1, "original_size": [64, 64], "mask": "m.png"},
}


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))


def itxt(text: bytes, *, packed: bool = False) -> bytes:
    head = JSON_KEY.encode() + (b"\0\1\0\0\0" if packed else b"\0\0\0\0\0")
    return chunk(b"iTXt", head + (zlib.compress(text) if packed else text))


def png(*chunks: bytes) -> bytes:
    plain = io.BytesIO()
    Image.new("RGB", (8, 8)).save(plain, "PNG")
    return plain.getvalue()[:33] + b"".join(chunks) + plain.getvalue()[33:]


def of(parameters: Any) -> bytes:
    return png(itxt(json.dumps(parameters).encode()))


def test_no_edit_of_a_pictures_parameters_surprises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """800 edits: typed errors, or a command that parses, shows as it is, and writes nowhere else."""
    file, refused = tmp_path / "x.png", 0
    parser = make_parser("run")
    for name, changed in edits(PARAMETERS, 800, seed=17):
        file.write_bytes(of(changed))
        try:
            words = command_line(read_parameters(file), file.name)
        except FewstepError:
            refused += 1
            continue
        assert words.isprintable(), name
        if "$'" not in words:
            split = shlex.split(words)
            assert len(split) == len(shlex.split(words.replace("\n", " ")))
            assert split[-1] == "--output=x.png"
            assert parser.parse_args(split[1:]).output == "x.png", name
        call(capsys, "inspect", str(file))
    assert 300 < refused < 790


HOSTILE = {
    "bomb": png(itxt(b" " * (64 << 20), packed=True)),
    "packed text": png(chunk(b"zTXt", JSON_KEY.encode() + b"\0\0" + zlib.compress(b" " * (64 << 20)))),
    "no zlib": png(itxt(b"", packed=True)),
    "deep": png(itxt(b"[" * 200_000)),
    "digits": png(itxt(b'{"a":' + b"9" * 5000 + b"}")),
    "not utf-8": png(itxt(b"\xff\xfe{")),
    "twice": png(itxt(json.dumps(PARAMETERS).encode()), itxt(json.dumps(PARAMETERS).encode())),
    "cut": of(PARAMETERS)[:-20],
    "damaged": of(PARAMETERS).replace(b"a cat", b"a dog"),
    "surrogate": of({**PARAMETERS, "prompt": "\ud800"}),
    "no png": b"GIF89a",
    "empty": b"",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_texts_that_cannot_be_read_are_corrupt(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(CorruptError):
        read_parameters(tmp_path / "x.png")


def test_pixels_are_not_decoded(tmp_path: Path) -> None:
    """A picture of 20,000^2 in 16 bits whose pixels are not even there: its text takes no memory of theirs."""
    size = struct.pack(">IIBBBBB", 20_000, 20_000, 16, 6, 0, 0, 0)
    content = png(itxt(json.dumps(PARAMETERS).encode()))
    (tmp_path / "x.png").write_bytes(content[:8] + chunk(b"IHDR", size) + content[33:])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert read_parameters(tmp_path / "x.png") == PARAMETERS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


@pytest.mark.parametrize("text", ["\x1b]0;own\x07", "a\nrm -rf /\n", "it's \\ \x9b31m", "\u202eabc", "$(id) `id`; id"])
def test_a_shell_takes_each_word_as_it_was(tmp_path: Path, text: str) -> None:
    words = command_line({**PARAMETERS, "batch": None, "prompt": text, "bundle": "-b"}, "x.png")
    assert words.isprintable()
    shown = f"fewstep() {{ printf '%s\\0' \"$@\"; }}; {words}"
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    taken = subprocess.run(["/bin/bash", "-c", shown], capture_output=True, check=True, env=environment).stdout
    assert taken.decode().split("\0")[:3] == ["run", "./-b", f"--prompt={text}"]


def test_sigmas_keep_their_digits() -> None:
    assert "--sigmas=14.614647,0" in shlex.split(command_line({**PARAMETERS, "batch": None}, "x.png"))


@pytest.mark.parametrize("as_json", [False, True])
def test_a_prompt_that_the_terminal_has_no_letters_for(tmp_path: Path, as_json: bool) -> None:
    file = tmp_path / "x.png"
    file.write_bytes(of({**PARAMETERS, "batch": None, "prompt": "ein Bär, 猫 \x9b"}))
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "fewstep", "inspect", str(file), *(["--json"] if as_json else [])],
        capture_output=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    if as_json:
        assert json.loads(done.stdout)["parameters"]["prompt"] == "ein Bär, 猫 \x9b"
    else:
        assert b"\\u732b" in done.stdout


def test_what_a_manifest_says_moves_no_cursor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fewstep.export.embedded import embedded_bundle

    source = embedded_bundle("student")[0].folder
    for path in source.iterdir():
        (tmp_path / path.name).symlink_to(path)
    data = json.loads((source / "bundle.json").read_text())
    (tmp_path / "bundle.json").unlink()
    for place, value in (("name", "\x1b]0;own\x07\x9b"), ("licence", "\u202e"), ("source", {"checkpoint": "\x1b[2J"})):
        (tmp_path / "bundle.json").write_text(json.dumps({**data, place: value}))
        for flags in ([], ["--json"]):
            _, out, err = call(capsys, "inspect", str(tmp_path), *flags)
            assert (out + err).replace("\n", "").isprintable()
