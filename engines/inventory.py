"""The store's verbs: list, verify and prune its engines, and prune the bundles beside it. They return data."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ArgumentError, FewstepError, MissingError
from . import machine
from .backends.registry import load_backend
from .digest import compare_file
from .kept import Kept, remove_kept
from .key import ANY_DEVICE
from .store import MANIFEST, REBUILD, Entry, Store, sweep


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """An engine as it lies in the store, and when it was last opened (seconds since 1970).

    `state` is `"ready"`, `"other machine or version"`, `"failed"` or `"damaged"`; `reason` says more if not ready.
    """

    name: str
    entry: Entry | None
    length: int
    used: float
    state: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """One thing that `prune_engines` deleted or would delete, its bytes, and why."""

    name: str
    length: int
    reason: str


def list_engines(store: Store, names: Sequence[str] = ()) -> list[Listed]:
    """Every engine in the store (or those whose names begin so), and what can be said of it without reading it.

    Raises `MissingError` for a name that none has.
    """
    return [_listed(store, folder) for folder in _named(store, names)]


def _named(store: Store, names: Sequence[str]) -> list[Path]:
    """The folders of the engines whose names begin with one of these; all of them when there are none."""
    folders = list(store.folders())
    for name in names:
        if not any(f.name.startswith(name) for f in folders):
            raise MissingError(f"no engine {name!r} in the store", remedy="List them with: fewstep engines list")
    return [f for f in folders if not names or f.name.startswith(tuple(names))]


def show_engine(store: Store, name: str) -> Entry:
    """The engine with this name, or with the only name that starts so. Raises `MissingError`, `ArgumentError`."""
    folders = _named(store, [name])
    if len(folders) > 1:
        raise ArgumentError(
            f"{len(folders)} engines are called {name!r}...", expected=f"one of {', '.join(f.name for f in folders)}"
        )
    return store.read_entry(folders[0])


def verify_engines(store: Store, names: Sequence[str] = ()) -> dict[str, FewstepError | None]:
    """Hash every byte of the engines and compare with their manifests: for each its error, or `None`.

    names: what the names of those that are wanted begin with; `MissingError` for one that none has.
    """
    result: dict[str, FewstepError | None] = {}
    for folder in _named(store, names):
        try:
            entry = store.read_entry(folder)
            entry.read()
            if entry.data is not None:
                compare_file(folder / entry.data[0], entry.data[1], what=f"the weights of {entry.name}", remedy=REBUILD)
            result[folder.name] = None
        except FewstepError as error:
            result[folder.name] = error
        except OSError as error:
            result[folder.name] = MissingError(
                f"the engine {folder.name} cannot be read: {error.strerror}", remedy=REBUILD
            )
    return result


def prune_engines(
    store: Store,
    names: Sequence[str] = (),
    *,
    stale: bool = True,
    unused_days: float | None = None,
    keep_bytes: int | None = None,
    everything: bool = False,
    dry_run: bool = False,
    kept: Sequence[Kept] = (),
) -> list[Pruned]:
    """Delete engines: damaged and failed ones and leftovers always; `stale` those of other machines or versions;
    those unused for so many days; the longest unused until the rest takes at most `keep_bytes`.

    kept: bundles beside the store (`list_kept`), to which the same rules apply. names: delete what is called so, or
    begins so, and nothing else. What is being built is left alone. Raises `ArgumentError` for a pinned store and for
    numbers below zero, `MissingError` for a name that none has.
    """
    for what, value in (("unused_days", unused_days), ("keep_bytes", keep_bytes)):
        if value is not None and not value >= 0:  # NaN is not either
            raise ArgumentError(f"{what} is {value}", expected="a number, 0 or more")
    if store.read_only:
        raise ArgumentError(
            "a pinned store is read-only", expected="a store of your own", remedy="Unset FEWSTEP_STORE_DIGEST."
        )
    if names:
        bundles = [k for k in kept if k.name.startswith(tuple(names))]
        of_engines = [n for n in names if not any(k.name.startswith(n) for k in bundles)]
        chosen: list[Listed | Kept] = [*(list_engines(store, of_engines) if of_engines else ()), *bundles]
        return [gone for one in chosen for gone in _remove(store, one, "asked for by name", dry_run=dry_run)]
    result: list[Pruned] = []
    stay: list[Listed | Kept] = []
    there: list[Listed | Kept] = [*list_engines(store), *kept]
    for one in there:
        reason = _why(one, stale=stale, unused_days=unused_days, everything=everything)
        if reason:
            result += _remove(store, one, reason, dry_run=dry_run)
        else:
            stay.append(one)
    total = sum(k.length for k in stay)
    for one in sorted(stay, key=lambda k: k.used):
        if keep_bytes is None or total <= keep_bytes:
            break
        removed = _remove(store, one, f"the cache is above {keep_bytes} bytes", dry_run=dry_run)
        result += removed
        total -= sum(r.length for r in removed)
    return result + _leftovers(store, dry_run=dry_run)


def _listed(store: Store, folder: Path) -> Listed:
    used = (folder / MANIFEST).stat().st_mtime
    length = sum(p.lstat().st_size for p in folder.iterdir())
    try:
        entry = store.read_entry(folder)
    except FewstepError as error:
        return Listed(name=folder.name, entry=None, length=length, used=used, state="damaged", reason=str(error))
    state, reason = _state(entry)
    used = entry.path.stat().st_mtime if entry.path.exists() else used
    return Listed(name=folder.name, entry=entry, length=length, used=used, state=state, reason=reason)


def _state(entry: Entry) -> tuple[str, str]:
    if entry.failed:
        return "failed", str(entry.gate.get("reason", ""))
    if not entry.path.is_file() or entry.path.stat().st_size != entry.digest.length:
        return "damaged", "its file is missing or has another length"
    try:
        kind = load_backend(entry.key.backend)
        here = {"backend_version": kind.version(), "system": machine.os_identity()}
        here["device"], here["capability"] = kind.target(None)
    except FewstepError as error:
        return "other machine or version", str(error)
    for field, value in here.items():
        own = str(getattr(entry.key, field))
        portable = field == "capability" and entry.key.device == ANY_DEVICE
        if own != value and not (portable and set(value.split()) <= set(own.split())):
            return "other machine or version", f"{field.replace('_', ' ')} {own}, here {value}"
    return "ready", ""


def _why(one: Listed | Kept, *, stale: bool, unused_days: float | None, everything: bool) -> str:
    if everything:
        return "all were asked for"
    if isinstance(one, Kept):
        if one.reason:
            return one.reason
    elif one.state in {"damaged", "failed"} or (stale and one.state != "ready"):
        return f"{one.state}: {one.reason}"
    days = (time.time() - one.used) / 86400
    if unused_days is not None and days > unused_days:
        return f"unused for {days:.0f} days"
    return ""


def _remove(store: Store, one: Listed | Kept, reason: str, *, dry_run: bool) -> list[Pruned]:
    """Delete one engine or bundle, its manifest first, unless whoever makes it holds its lock."""
    from filelock import Timeout

    if isinstance(one, Kept):
        return [Pruned(name=one.name, length=one.length, reason=reason)] if dry_run or remove_kept(one.name) else []
    name, folder = one.name, store.root / one.name
    length = sum(p.lstat().st_size for p in folder.iterdir())
    if dry_run:
        return [Pruned(name=name, length=length, reason=reason)]
    try:
        with store.lock_folder(name, timeout=0):
            (folder / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(folder)
    except Timeout:
        return []
    return [Pruned(name=name, length=length, reason=reason)]


def _leftovers(store: Store, *, dry_run: bool) -> list[Pruned]:
    """Folders without a manifest, and files that no manifest names: what killed builders left."""
    from filelock import Timeout

    result = []
    for folder in sorted(p for p in store.root.iterdir() if p.is_dir() and not p.is_symlink()):
        try:
            with store.lock_folder(folder.name, timeout=0):
                if (folder / MANIFEST).exists():
                    freed = 0 if dry_run else sweep(folder)
                else:
                    freed = sum(p.lstat().st_size for p in folder.iterdir())
                    if not dry_run:
                        shutil.rmtree(folder)
                    result.append(Pruned(name=folder.name, length=freed, reason="left by a build that did not end"))
                    continue
        except Timeout:
            continue
        if freed:
            result.append(Pruned(name=folder.name, length=freed, reason="files that no manifest names"))
    return result
