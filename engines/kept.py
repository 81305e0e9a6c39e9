"""Bundles that the user's cache keeps beside the engines: what was exported on the spot, found again by its name.

`pretrained/` holds checkpoints given where a bundle was expected, `swapped/` bundles with a component replaced, and
`embedded/` the models that travel with the package. Each folder's name holds a hash of all that it was made from, and
its manifest's time of change is when it was last asked for.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..bundle import MANIFEST, Bundle, read_bundle
from ..places import is_left, sweep_left
from .store import cache_root

KINDS = ("embedded", "pretrained", "swapped")
_LEFT = re.compile(r"\.(.+)\.[a-z0-9_]{8}\.part")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A bundle in the cache: its name (`swapped/...`), its bytes, when it was last used (seconds since 1970).

    reason: why nothing can use it any more, or "".
    """

    name: str
    length: int
    used: float
    reason: str = ""


def kept_folder(kind: str, name: str) -> Path:
    """Where a bundle of one of `KINDS` is kept."""
    return cache_root() / kind / name


@contextlib.contextmanager
def keeping(folder: Path) -> Iterator[None]:
    """Alone with a kept bundle's folder: who makes it, reads its manifest or deletes it waits for the others."""
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        yield


def find_kept(folder: Path) -> Bundle | None:
    """The bundle that is kept there, marked as used now; `None` where there is none."""
    if not (folder / MANIFEST).is_file():
        return None
    with contextlib.suppress(OSError):  # a cache that this user may only read
        os.utime(folder / MANIFEST)
    return read_bundle(folder)


def list_kept() -> list[Kept]:
    """Every bundle in the cache, those first that were not used for longest, and what killed exports left."""
    found = []
    for root in (cache_root() / kind for kind in KINDS):
        if not root.is_dir() or root.is_symlink():
            continue
        for folder in sorted(p for p in root.iterdir() if p.is_dir() and not p.is_symlink()):
            with contextlib.suppress(FileNotFoundError):  # deleted or finished meanwhile
                found += [_kept(root.name, folder)] if _is_ours(folder) else []
    return sorted(found, key=lambda k: (k.used, k.name))


def remove_kept(name: str) -> bool:
    """Delete a bundle of the cache, its manifest first; whether it is gone. One that is being made is left alone."""
    from filelock import FileLock, Timeout

    folder = cache_root() / name
    if (left := _LEFT.fullmatch(folder.name)) is not None:
        return folder.name in sweep_left(folder.with_name(left[1])) or not folder.exists()
    try:
        with FileLock(f"{folder}.lock", timeout=0):
            (folder / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(folder)
            Path(f"{folder}.lock").unlink(missing_ok=True)
    except Timeout:
        return False
    return True


def _is_ours(folder: Path) -> bool:
    return _LEFT.fullmatch(folder.name) is None or is_left(folder)


def _kept(kind: str, folder: Path) -> Kept:
    manifest = folder / MANIFEST
    reason = ""
    if _LEFT.fullmatch(folder.name):
        reason = "left by an export that did not end"
    elif not manifest.is_file():
        reason = "it has no manifest"
    return Kept(
        name=f"{kind}/{folder.name}",
        length=sum(p.lstat().st_size for p in folder.rglob("*") if not p.is_dir()),
        used=(folder if reason else manifest).stat().st_mtime,
        reason=reason,
    )
