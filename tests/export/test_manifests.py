"""Manifests are checked when they are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import fewstep
import pytest
from counts import count
from fewstep.bundle import read_bundle
from fewstep.cli import main
from fewstep.errors import (
    CorruptError,
    FewstepError,
    UnsafeFileError,
)
from hostile import edits


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ("", CorruptError),
        ("{}", CorruptError),
        ('{"format": 99}', CorruptError),
        ('{"format": 1}', CorruptError),
        ("\xff", CorruptError),
    ],
)
def test_a_manifest_that_is_none(tmp_path: Path, content: str, kind: type[FewstepError]) -> None:
    (tmp_path / "bundle.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(kind, match=r"bundle\.json"):
        read_bundle(tmp_path)


WRONG: list[tuple[tuple[Any, ...], Any]] = [
    (("latent", "factor"), 0),
    (("latent", "factor"), "x"),
    (("scheduler",), []),
    (("scheduler",), {}),
    (("defaults", "guidance"), "x"),
    (("defaults", "width"), True),
    (("tokenizers",), []),
    (("tokenizers", 0, "length"), None),
    (("tokenizers", 0, "length"), 5),
    (("tokenizers", 0, "pad_id"), "x"),
    (("tokenizers", 0, "file"), 7),
    (("components", "unet", "weights"), None),
    (("components", "unet", "weights_sha256"), "abc"),
    (("components", "unet", "inputs"), 3),
    (("components", "unet", "inputs", 0, "dtype"), "float8"),
    (("components",), {}),
    (("family",), "sd9"),
    (("defaults", "guidance"), 10**400),
    (("defaults", "timesteps"), ["x"]),
    (("guidance_embedding",), 256),
    (("guidance_embedding",), True),
    (("force_zeros",), "no"),
    (("latent", "factor"), 4),
    (("latent", "channels"), 3),
    (("tokenizers", 0, "pad_id"), 10**6),
    (("components", "unet", "inputs", 0, "shape"), None),
    (("components", "unet", "inputs", 0, "shape"), ["rows", 4, "height*x", "width"]),
    (("components", "unet", "inputs", 0, "shape"), ["rows", 4, "height*99999999", "width"]),
    (("components", "unet", "inputs", 0, "shape"), ["rows", 4, "width", "height"]),
    (("components", "unet", "outputs", 0, "name"), "nope"),
    (("components", "unet", "config", "block_out_channels"), [10**9]),
    (("components", "text_encoder", "inputs", 0, "shape"), []),
    (("components", "text_encoder", "inputs", 1, "shape"), [3]),
    (("components", "text_encoder", "inputs", 1, "shape"), ["prompts"]),
    (("scheduler", "beta_start"), None),
    (("scheduler", "beta_end"), 2.0),
    (("scheduler", "trained_betas"), 5),
    (("scheduler", "steps_offset"), "x"),
    (("scheduler", "beta_schedule"), None),
    (("scheduler", "prediction_type"), []),
    (("scheduler", "set_alpha_to_one"), "x"),
    (("source",), 5),
    (("gate",), []),
]


@pytest.mark.parametrize(("place", "value"), WRONG, ids=[".".join(map(str, p)) + f"={v!r}" for p, v in WRONG])
def test_manifests_are_checked_when_read(sd1_bundle: Any, tmp_path: Path, place: tuple[Any, ...], value: Any) -> None:
    data = json.loads((sd1_bundle.folder / "bundle.json").read_text())
    at = data
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    (tmp_path / "bundle.json").write_text(json.dumps(data))
    with pytest.raises(CorruptError, match=r"bundle\.json"):
        read_bundle(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        '{"format": 1, "format": 1}',
        '{"format": 1e999}',
        '{"format": NaN}',
        '{"format": 1' + "0" * 5000 + "}",
        "\ufeff{}",
    ],
    ids=["twice", "1e999", "nan", "digits", "bom"],
)
def test_json_that_no_manifest_is(tmp_path: Path, text: str) -> None:
    (tmp_path / "bundle.json").write_text(text, encoding="utf-8")
    with pytest.raises(CorruptError, match=r"bundle\.json is not JSON"):
        read_bundle(tmp_path)


def test_no_edit_of_a_manifest_surprises(sd1_bundle: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """600 edits or 2,000: refused by type, or read, shown and run with an image or a typed error; nothing else."""
    tried = count(600, 2000)
    folder = shutil.copytree(sd1_bundle.folder, tmp_path / "bundle")
    data = json.loads((folder / "bundle.json").read_text())
    refused: list[str] = []
    untyped: list[str] = []
    for index, (name, changed) in enumerate(edits(data, tried, seed=15)):
        (folder / "bundle.json").write_text(json.dumps(changed))
        try:
            read_bundle(folder)
            main(["inspect", str(folder)])
            if index % 6 == 0:
                fewstep.load(folder, threads=1)("a", steps=1, seed=1)
        except FewstepError:
            refused.append(name)
        except Exception as error:
            untyped.append(f"{name}: {error!r}")
    assert not untyped, "\n".join(untyped)
    print(f"{tried} edited manifests: {len(refused)} refused")
    assert 0.4 * tried < len(refused) < tried
    assert "\x1b" not in "".join(capsys.readouterr())


def test_deep_manifests_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bundle.json").write_text("[" * 100_000)
    with pytest.raises(CorruptError, match=r"bundle\.json"):
        read_bundle(tmp_path)


@pytest.mark.parametrize("name", ["../weights", "/etc/passwd", "a/b", "..", "unet.onnx\0"])
def test_manifests_name_plain_files(sd1_bundle: Any, name: str) -> None:
    with pytest.raises(UnsafeFileError):
        sd1_bundle.path(name)
