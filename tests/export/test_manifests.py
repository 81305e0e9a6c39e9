"""Manifests are checked when they are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fewstep.bundle import read_bundle
from fewstep.errors import (
    CorruptError,
    FewstepError,
    UnsafeFileError,
)


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


def test_deep_manifests_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bundle.json").write_text("[" * 100_000)
    with pytest.raises(CorruptError, match=r"bundle\.json"):
        read_bundle(tmp_path)


@pytest.mark.parametrize("name", ["../weights", "/etc/passwd", "a/b", "..", "unet.onnx\0"])
def test_manifests_name_plain_files(sd1_bundle: Any, name: str) -> None:
    with pytest.raises(UnsafeFileError):
        sd1_bundle.path(name)
