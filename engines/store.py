"""The engine store: a folder of its owner alone, one sub-folder for each key, the manifest written last.

    <root>/<component>.<backend>.<key, 32 hex digits>/
        manifest.json             the key, the engine file's digest, how it was built, what the gate said
        <sha256, 16 hex>.<suffix> the engine
        <16 hex>.data             weights beside it, when a backend keeps them in a file of their own

An engine exists when its manifest does, and a manifest names the files that belong to it. So a builder killed at any
moment leaves the engine that was there before or none; what it left half-written is swept by the next one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import CorruptError, FewstepError, MismatchError, MissingError, UnsafeFileError
from ..places import writing
from ..values import Reader, parse_json
from .digest import FileDigest, digest_file, open_regular, read_checked
from .key import EngineKey
from .trust import check_own

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
MANIFEST_BYTES = 1 << 20
ENV_CACHE, ENV_DIGEST = "FEWSTEP_CACHE_DIR", "FEWSTEP_STORE_DIGEST"
ROOM_REMEDY = f"Free some with: fewstep engines prune, or keep engines elsewhere: set {ENV_CACHE}."
REBUILD = "Rebuild it with: fewstep build BUNDLE --force"
_ENTRY = re.compile(r"[a-z0-9_]+\.[a-z0-9-]+\.[0-9a-f]{32}")
_FILE = re.compile(r"[0-9a-f]{16}\.[a-z0-9]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """An engine in the store.

    `data` is the name and digest of a weights file beside the engine, if there is one. `built` says when and in how
    many seconds, `facts` what the backend reported, `gate` what the comparison with torch said (empty: not compared).
    """

    folder: Path
    key: EngineKey
    file: str
    digest: FileDigest
    built: Mapping[str, Any]
    facts: Mapping[str, Any]
    gate: Mapping[str, Any]
    data: tuple[str, FileDigest] | None = None

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def path(self) -> Path:
        return self.folder / self.file

    @property
    def length(self) -> int:
        """Bytes on the disk."""
        return self.digest.length + (self.data[1].length if self.data else 0)

    @property
    def failed(self) -> bool:
        return self.gate.get("passed") is False

    @property
    def files(self) -> Mapping[str, FileDigest]:
        return {self.file: self.digest} | (dict([self.data]) if self.data else {})

    @property
    def lost(self) -> str:
        """Which of its files is not there; empty where all are."""
        return next((n for n in self.files if not os.path.lexists(self.folder / n)), "")

    @property
    def damaged(self) -> str:
        """Which of its files is not there, or not as long as it was; empty where all are."""
        return next((n for n, d in self.files.items() if not _is_whole(self.folder / n, d.length)), "")

    def read(self) -> memoryview:
        """The engine's bytes, checked; `CorruptError` when they are not the ones that were built."""
        return read_checked(self.path, self.digest, what=f"the engine {self.name}", remedy=REBUILD)

    def mark_used(self) -> None:
        """Note that the engine was opened: its file's time of modification is the time of its last use."""
        with contextlib.suppress(OSError):
            os.utime(self.path)

    def to_json(self) -> dict[str, Any]:
        return {
            "format": MANIFEST_FORMAT,
            "key": self.key.to_json(),
            "file": self.file,
            "digest": self.digest.to_json(),
            "data": None if self.data is None else [self.data[0], self.data[1].to_json()],
            "built": dict(self.built),
            "facts": dict(self.facts),
            "gate": dict(self.gate),
        }


class Store:
    """Engines in a folder. A pinned store is read-only: its digest vouches for it, whoever owns it."""

    def __init__(self, root: Path, *, pinned: str | None = None) -> None:
        self.root, self.pinned = root, pinned
        self._manifests: dict[str, str] = {}
        if pinned is None:
            self.check()
        elif not root.is_dir():
            raise MissingError(f"no engine store in {str(root)!r}", expected="the store that the digest belongs to")
        else:
            self._check_pin(pinned)

    def check(self) -> None:
        """Raise `UnsafeFileError` unless the folder is its owner's alone; it is made where there is none.

        Every use of the store asks, so that the folder that is used is one that was checked. A pinned store is vouched
        for by its digest instead.
        """
        if self.pinned is None:
            _own(self.root)

    @property
    def read_only(self) -> bool:
        return self.pinned is not None

    def entry_folder(self, key: EngineKey) -> Path:
        name = f"{key.component}.{key.backend}.{key.digest[:32]}"
        if not _ENTRY.fullmatch(name):
            raise CorruptError(f"{name!r} cannot name an engine", expected="lower-case letters, digits, '_' and '-'")
        return self.root / name

    def find(self, key: EngineKey) -> Entry | None:
        """The engine with exactly this key, or `None`."""
        folder = self.entry_folder(key)
        return self.read_entry(folder) if (folder / MANIFEST).exists() else None

    def read_entry(self, folder: Path) -> Entry:
        """The entry in a folder, from its manifest. Raises `MissingError`, `CorruptError`, `UnsafeFileError`."""
        self.check()
        data = _manifest_bytes(folder)
        if self.read_only and hashlib.sha256(data).hexdigest() != self._manifests.get(folder.name):
            raise MismatchError(
                f"the manifest of {folder.name} changed after the store's digest was checked", expected="a still store"
            )
        return _parse(folder, _parse_json(folder, data))

    def folders(self, component: str = "*", backend: str = "*") -> list[Path]:
        """The folders of engines, whether their manifests can be read or not."""
        self.check()
        manifests = self.root.glob(f"{component}.{backend}.*/{MANIFEST}")
        return sorted(p.parent for p in manifests if _ENTRY.fullmatch(p.parent.name))

    def entries(self, component: str = "*", backend: str = "*") -> Iterator[Entry]:
        """The engines whose manifests can be read; `list_engines` reports the others too."""
        for folder in self.folders(component, backend):
            with contextlib.suppress(MissingError, CorruptError, UnsafeFileError):
                yield self.read_entry(folder)

    @contextlib.contextmanager
    def lock(self, key: EngineKey, *, timeout: float = -1) -> Iterator[None]:
        """Hold the lock of one key: one builder at a time, across processes; `filelock.Timeout` after `timeout` s."""
        self._check_writable()
        with self.lock_folder(self.entry_folder(key).name, timeout=timeout):
            yield

    @contextlib.contextmanager
    def lock_folder(self, name: str, *, timeout: float) -> Iterator[None]:
        """`lock`, by the name of an engine's folder."""
        from filelock import FileLock

        # The lock is the operating system's, so that it goes with the process that held it.
        lock = FileLock(self.root / f".{name}.lock", timeout=timeout, mode=0o600)
        with writing_engine(name.partition(".")[0], self.root):
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def part(self, key: EngineKey, suffix: str) -> Path:
        """A path to build into, under the key's lock; sweeps what a killed builder left."""
        self._check_writable()
        folder = self.entry_folder(key)
        with writing_engine(key.component, self.root):
            folder.mkdir(mode=0o700, exist_ok=True)
            sweep(folder)
        return folder / f"engine.{os.getpid()}.{suffix}.part"

    def commit(
        self,
        key: EngineKey,
        part: Path,
        *,
        built: Mapping[str, Any],
        facts: Mapping[str, Any],
        data: Path | None = None,
    ) -> Entry:
        """Make the built file the engine of this key: sync, digest, rename, manifest last, then drop the old files."""
        self._check_writable()
        if not part.is_file() or part.stat().st_size == 0:
            raise CorruptError(
                "the backend reported success and wrote no engine", remedy="Build again; report it if it recurs."
            )
        sync(part)
        part.chmod(0o600)
        digest = digest_file(part)
        name = f"{digest.sha256[:16]}.{part.name.split('.')[-2]}"
        beside = None
        if data is not None:
            sync(data)
            data.chmod(0o600)
            beside = (data.name, digest_file(data))
        part.replace(part.with_name(name))
        entry = Entry(
            folder=part.parent, key=key, file=name, digest=digest, built=built, facts=facts, gate={}, data=beside
        )
        self._write_manifest(entry)
        sweep(part.parent)
        return entry

    def record_gate(self, entry: Entry, gate: Mapping[str, Any]) -> Entry:
        """Write what the gate said into an engine's manifest."""
        self._check_writable()
        marked = replace(entry, gate=dict(gate))
        self._write_manifest(marked)
        return marked

    def digest(self) -> str:
        """SHA-256 over the names and manifests of all engines: what a read-only copy is pinned by."""
        self._manifests = {f.name: hashlib.sha256(_manifest_bytes(f)).hexdigest() for f in self.folders()}
        return hashlib.sha256("".join(f"{n} {h}\n" for n, h in self._manifests.items()).encode()).hexdigest()

    def _check_pin(self, pinned: str) -> None:
        digest = self.digest()
        if digest != pinned.removeprefix("sha256:").casefold():
            raise MismatchError(
                f"the engine store has the digest {digest[:16]}",
                expected=f"{pinned[:16]}, the one it is pinned by",
                remedy="Print a store's digest with: fewstep engines verify",
            )

    def _check_writable(self) -> None:
        if self.read_only:
            raise MissingError(
                "the engine store is read-only (pinned by its digest), and this would write to it",
                remedy=f"Build into another store: unset {ENV_DIGEST}, or set {ENV_CACHE}.",
            )
        self.check()

    def _write_manifest(self, entry: Entry) -> None:
        text = json.dumps(entry.to_json(), indent=1, ensure_ascii=False)
        part = entry.folder / f"{MANIFEST}.{os.getpid()}.part"
        with writing_engine(entry.key.component, entry.folder, needed=len(text)):
            with part.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            part.chmod(0o600)
            part.replace(entry.folder / MANIFEST)
            sync(entry.folder)


def default_store() -> Store:
    """This user's store: `engines` in the cache; pinned by `$FEWSTEP_STORE_DIGEST`."""
    return Store(cache_root() / "engines", pinned=os.environ.get(ENV_DIGEST) or None)


def cache_root() -> Path:
    """This user's cache: `$FEWSTEP_CACHE_DIR`, else the platform's folder for fewstep."""
    base = os.environ.get(ENV_CACHE)
    if not base:
        from platformdirs import user_cache_dir

        base = user_cache_dir("fewstep", appauthor=False)
    return Path(base)


def sync(path: Path) -> None:
    """Have the operating system write a file or a folder to the disk."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(folder: Path) -> int:
    """Delete what the manifest does not name; returns the bytes freed. Only under the key's lock."""
    keep = {MANIFEST}
    try:
        data = _parse_json(folder, _manifest_bytes(folder))
        keep |= {str(data["file"]), str((data["data"] or [""])[0])}
    except (ValueError, KeyError, TypeError, IndexError, FewstepError):
        keep = {MANIFEST}
    freed = 0
    for path in folder.iterdir():
        if path.name not in keep and not path.is_dir():
            freed += path.lstat().st_size
            path.unlink(missing_ok=True)
    return freed


def _own(root: Path) -> None:
    """Make the store's folder for its owner alone, or check that it is so, and that nobody can put another there."""
    if not os.path.lexists(root):
        with writing("the engine store", root.parent, remedy=f"Keep engines elsewhere: set {ENV_CACHE}."):
            root.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                root.mkdir(mode=0o700)
    check_own(
        root,
        what="the engine store",
        remedy=f"Set {ENV_CACHE} to a folder of your own, or pin the store by its digest with {ENV_DIGEST}.",
    )


def _manifest_bytes(folder: Path) -> bytes:
    """The manifest's bytes, of a regular file and no more than a mebibyte."""
    descriptor = open_regular(folder / MANIFEST, f"the manifest of the engine {folder.name}", remedy=REBUILD)
    with os.fdopen(descriptor, "rb") as file:
        data = file.read(MANIFEST_BYTES + 1)
    if len(data) > MANIFEST_BYTES:
        raise CorruptError(
            f"the manifest of the engine {folder.name} is too long", expected=f"at most {MANIFEST_BYTES} bytes"
        )
    return data


def _parse_json(folder: Path, text: bytes) -> dict[str, Any]:
    data = parse_json(text, f"the manifest of the engine {folder.name}", remedy=REBUILD, finite=True)
    if not isinstance(data, dict) or data.get("format") != MANIFEST_FORMAT:
        stated = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise CorruptError(
            f"the manifest of the engine {folder.name} has format {stated!r}",
            expected=str(MANIFEST_FORMAT),
            remedy=REBUILD,
        )
    return data


def _parse(folder: Path, data: Mapping[str, Any]) -> Entry:
    reading = Reader(place=f"the manifest of the engine {folder.name}", remedy=REBUILD)
    try:
        entry = Entry(
            folder=folder,
            key=EngineKey.from_json(data["key"]),
            file=reading.text("file", data["file"], most=255),
            digest=FileDigest.from_json(data["digest"]),
            built=reading.mapping("built", data["built"]),
            facts=reading.mapping("facts", data["facts"]),
            gate=reading.mapping("gate", data["gate"]),
            data=None if data["data"] is None else (str(data["data"][0]), FileDigest.from_json(data["data"][1])),
        )
    except (KeyError, TypeError, ValueError, IndexError, FewstepError) as error:
        raise CorruptError(
            f"the manifest of the engine {folder.name} lacks or misstates {error}", remedy=REBUILD
        ) from error
    for file in (entry.file, *(entry.data or ())[:1]):
        if not _FILE.fullmatch(str(file)):
            raise UnsafeFileError(
                f"the manifest of the engine {folder.name} names the file {file!r}",
                expected="16 hex digits and a suffix",
                remedy=REBUILD,
            )
    if folder.name != f"{entry.key.component}.{entry.key.backend}.{entry.key.digest[:32]}":
        raise CorruptError(
            f"the manifest in {folder.name} has a key with the digest {entry.key.digest[:32]}",
            expected="the engine that its folder names",
            remedy=REBUILD,
        )
    return entry


def _is_whole(path: Path, length: int) -> bool:
    return path.is_file() and path.stat().st_size == length


def writing_engine(name: str, where: Path, *, needed: int = 0) -> contextlib.AbstractContextManager[None]:
    """`places.writing` for the engine of a component in the store."""
    return writing(f"the engine of {name!r}", where, needed=needed, remedy=ROOM_REMEDY)


def now() -> str:
    """This moment, in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
