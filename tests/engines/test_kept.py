"""Bundles that the cache keeps beside the store: listed, marked when they are used, pruned by the store's rules."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from commandline import call
from fewstep.engines import default_store
from fewstep.engines.inventory import prune_engines
from fewstep.engines.kept import KINDS, find_kept, keeping, kept_folder, list_kept
from fewstep.errors import MissingError
from fewstep.places import staging_folder

DAY = 86_400


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEWSTEP_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def put(name: str, *, length: int = 1000, days: float = 0.0) -> Path:
    """A bundle's folder in the cache, with a manifest that was last used so many days ago."""
    folder = kept_folder(*name.split("/"))
    folder.mkdir(parents=True)
    (folder / "unet.safetensors").write_bytes(bytes(length))
    (folder / "bundle.json").write_text("{}")
    then = time.time() - days * DAY
    os.utime(folder / "bundle.json", (then, then))
    return folder


def pruned(**rules: Any) -> list[str]:
    names = rules.pop("names", ())
    return [p.name for p in prune_engines(default_store(), names, kept=list_kept(), **rules)]


def test_an_empty_cache_keeps_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert list_kept() == []
    assert json.loads(call(capsys, "engines", "list", "--json")[1]) == {"engines": [], "bundles": []}
    assert pruned(everything=True) == []


def test_prune_by_age_size_and_name(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ages = {"swapped/a-1": 40, "pretrained/b-2": 20, "embedded/c-3": 5, "swapped/d-4": 1}
    folders = {n: put(n, days=d) for n, d in ages.items()}
    assert [k.name for k in list_kept()] == list(ages)
    _, out, _ = call(capsys, "engines", "list", "swapped", "--json")
    assert [b["name"] for b in json.loads(out)["bundles"]] == ["swapped/a-1", "swapped/d-4"]
    assert pruned() == [], "nothing goes that no rule names"
    assert pruned(unused_days=30, dry_run=True) == ["swapped/a-1"]
    assert all(f.is_dir() for f in folders.values())
    assert pruned(unused_days=30) == ["swapped/a-1"]
    assert pruned(keep_bytes=2500) == ["pretrained/b-2"], "the longest unused, until the rest fits"
    assert call(capsys, "engines", "prune", "embedded/c")[0] == 0
    with pytest.raises(MissingError, match="engines list"):
        pruned(names=["embedded/c"])
    assert pruned(everything=True) == ["swapped/d-4"]
    assert [p for kind in KINDS for p in (cache / kind).iterdir()] == [], "no lock and no half is left"


def test_what_is_being_made_stays_and_what_a_killed_export_left_goes(cache: Path) -> None:
    folder = put("swapped/a-1", days=90)
    with keeping(folder):
        assert pruned(everything=True) == []
    with staging_folder(cache / "pretrained" / "b-2") as staging:
        (staging / "half").write_bytes(bytes(10))
        assert pruned(dry_run=True) == []
    dead = cache / "pretrained" / ".b-2.abcdefgh.part"
    dead.mkdir()
    (dead / "half").write_bytes(bytes(10))
    bare = cache / "swapped" / "no-manifest"
    bare.mkdir()
    assert sorted(pruned()) == ["pretrained/.b-2.abcdefgh.part", "swapped/no-manifest"]
    assert folder.is_dir()
    assert not dead.exists()


def test_links_are_neither_followed_nor_deleted(cache: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "bundle.json").write_text("{}")
    (cache / "swapped").mkdir(parents=True)
    (cache / "swapped" / "link").symlink_to(elsewhere)
    (cache / "pretrained").symlink_to(elsewhere)
    assert pruned(everything=True) == []
    assert (elsewhere / "bundle.json").is_file()


def test_what_is_found_is_marked_as_used(sd1_bundle: Any, cache: Path) -> None:
    kept = kept_folder("swapped", "real")
    assert find_kept(kept) is None
    kept.parent.mkdir(parents=True)
    kept.mkdir()
    (kept / "bundle.json").write_bytes((sd1_bundle.folder / "bundle.json").read_bytes())
    os.utime(kept / "bundle.json", (1.0, 1.0))
    found = find_kept(kept)
    assert found is not None
    assert found.family == "sd1"
    assert time.time() - list_kept()[0].used < DAY
