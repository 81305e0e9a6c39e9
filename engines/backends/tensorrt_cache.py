"""Caches that TensorRT and TensorRT-RTX keep between runs, behind their SHA-256."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

from ...errors import CorruptError

_log = logging.getLogger("fewstep.engines.tensorrt")


def read_cache(path: Path) -> bytes | None:
    """A timing or runtime cache: its bytes behind their SHA-256; `None` when there is none or it is damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if hashlib.sha256(data[32:]).digest() != data[:32]:
        _log.warning("the cache %s is damaged: it is made anew", path.name)
        return None
    return data[32:]


def write_cache(path: Path, data: bytes) -> None:
    """Replace a cache, whole or not at all, under its lock; `CorruptError` when there is nothing to write."""
    from filelock import FileLock

    if not data:
        raise CorruptError("the backend gave an empty cache")
    content = hashlib.sha256(data).digest() + data
    with FileLock(f"{path}.lock", mode=0o600):
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
