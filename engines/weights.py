"""The bundle's weights, checked against the manifest: small ones each time, large ones once while they lie still."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from ..bundle import Bundle, Component
from ..errors import CorruptError, MissingError
from ..values import read_json
from .digest import compare_file, open_regular, sha256_file
from .graph.external import check_external
from .store import REBUILD, Entry, Store

_log = logging.getLogger("fewstep.engines")
SMALL_BYTES = 64 << 20
# A file changed this recently may change again without its time changing: it gets no record.
_SETTLED_NS = 2_000_000_000


def source_bytes(bundle: Bundle, component: Component) -> int:
    """Bytes of a component's graph and weights, which its engine takes about as much as."""
    return len(bundle.read_graph(component)) + bundle.path(component.weights).stat().st_size


def checked_graph(bundle: Bundle, component: Component) -> bytes:
    """A component's graph, after its bytes were checked, and where they say that its weights lie."""
    model = bundle.read_graph(component)
    _compare(component.graph, hashlib.sha256(model).hexdigest(), component.graph_sha256)
    check_external(model, weights=component.weights, length=bundle.path(component.weights).stat().st_size)
    return model


def check_graph(bundle: Bundle, component: Component) -> Path:
    """The path of a component's graph, checked as `checked_graph` does."""
    checked_graph(bundle, component)
    return bundle.path(component.graph)


def read_weights(bundle: Bundle, component: Component) -> bytes | None:
    """The bytes of a weights file of up to 64 MiB, checked; `None` when it is larger (see `check_weights`)."""
    path = bundle.path(component.weights)
    with os.fdopen(open_regular(path, component.weights), "rb") as file:
        if os.fstat(file.fileno()).st_size > SMALL_BYTES:
            return None
        data = file.read()
    _compare(component.weights, hashlib.sha256(data).hexdigest(), component.weights_sha256)
    return data


def check_weights(bundle: Bundle, component: Component, store: Store | None) -> Path:
    """The path of a weights file whose SHA-256 is the manifest's.

    A file that was hashed before and has since kept its size, times and inode is not hashed again: the record lies in
    the store, which is the user's alone. Raises `CorruptError`.
    """
    path = bundle.path(component.weights)

    def check() -> None:
        _compare(component.weights, sha256_file(path), component.weights_sha256)

    _check_once(path, component.weights_sha256, store, check)
    return path


def check_data(entry: Entry, store: Store) -> Path:
    """The path of the weights file beside an engine, checked like the bundle's own; `CorruptError`, `MissingError`."""
    if entry.data is None:
        raise MissingError(f"the engine {entry.name} has no weights file", remedy=REBUILD)
    name, digest = entry.data
    path = entry.folder / name
    os.close(open_regular(path, f"the weights of the engine {entry.name}", remedy=REBUILD))

    def check() -> None:
        compare_file(path, digest, what=f"the weights of the engine {entry.name}", remedy=REBUILD)

    _check_once(path, digest.sha256, store, check)
    return path


def _check_once(path: Path, sha256: str, store: Store | None, check: Callable[[], None]) -> None:
    """Run a check of a file unless it passed before and the file has lain still since."""
    state = _state(path)
    record = None
    if store is not None and not store.read_only:
        record = store.root / f".checked.{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]}.json"
        if _recorded(record) == {"state": state, "sha256": sha256}:
            return
    check()
    if record is not None and _state(path) == state and time.time_ns() - max(state[2:4]) > _SETTLED_NS:
        _record(record, {"state": state, "sha256": sha256})


def _state(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def _record(record: Path, passed: Mapping[str, object]) -> None:
    """Note a check that passed. Where that cannot be written the file is hashed again the next time."""
    part = record.with_name(f"{record.name}.{os.getpid()}.part")
    try:
        part.write_text(json.dumps(passed), encoding="utf-8")
        part.replace(record)
    except OSError as error:
        _log.info("no record was kept of a check that passed (%s)", error.strerror)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _recorded(record: Path) -> object:
    try:
        return read_json(record, record.name, finite=True) if record.is_file() else None
    except CorruptError:
        return None


def _compare(name: str, digest: str, expected: str) -> None:
    if digest != expected:
        raise CorruptError(
            f"{name} in the bundle has SHA-256 {digest[:16]}",
            expected=f"{expected[:16]}, as its manifest says",
            remedy="The bundle was changed or cut short: export the checkpoint again.",
        )
