"""SHA-256 of files of many gigabytes: hashed in chunks on all cores, and of the very bytes that are then used."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CorruptError, MissingError, UnsafeFileError
from ..values import Reader

CHUNK_BYTES = 32 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileDigest:
    """A file's length and the SHA-256 of each of its chunks; a file of one chunk has its plain SHA-256."""

    length: int
    chunks: tuple[str, ...]
    chunk_bytes: int = CHUNK_BYTES

    def __post_init__(self) -> None:
        count = -(-self.length // self.chunk_bytes) if self.chunk_bytes > 0 else -1
        if self.length < 1 or count != len(self.chunks):
            raise CorruptError(
                f"a digest states {self.length} bytes in {len(self.chunks)} chunks", expected=f"{count} chunks"
            )

    @property
    def sha256(self) -> str:
        """One name for the whole: the only chunk's hash, or the hash of the chunks' hashes."""
        if len(self.chunks) == 1:
            return self.chunks[0]
        return hashlib.sha256("".join(self.chunks).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        return {"bytes": self.length, "chunk_bytes": self.chunk_bytes, "sha256": list(self.chunks)}

    @classmethod
    def from_json(cls, data: object) -> FileDigest:
        reading = Reader(place="a digest")
        stated = reading.mapping("itself", data)
        return cls(
            length=reading.integer("bytes", stated.get("bytes"), 1, 2**62),
            chunk_bytes=reading.integer("chunk_bytes", stated.get("chunk_bytes"), 1, 2**62),
            chunks=tuple(reading.text("sha256", c, _SHA256) for c in reading.array("sha256", stated.get("sha256"))),
        )


def digest_bytes(data: bytes | bytearray | memoryview, *, chunk_bytes: int = CHUNK_BYTES) -> FileDigest:
    """Hash bytes in memory, chunk by chunk and side by side."""
    view = memoryview(data)
    starts = range(0, len(view), chunk_bytes)

    def one(start: int) -> str:
        return hashlib.sha256(view[start : start + chunk_bytes]).hexdigest()

    return FileDigest(length=len(view), chunks=_map(one, starts), chunk_bytes=chunk_bytes)


def digest_file(path: Path, *, chunk_bytes: int = CHUNK_BYTES) -> FileDigest:
    """Hash a file, chunk by chunk and side by side, without holding more than the chunks in flight."""
    length = path.stat().st_size

    def one(start: int) -> str:
        with path.open("rb") as file:
            file.seek(start)
            return hashlib.sha256(file.read(chunk_bytes)).hexdigest()

    return FileDigest(length=length, chunks=_map(one, range(0, length, chunk_bytes)), chunk_bytes=chunk_bytes)


def _map(function: Any, starts: range) -> tuple[str, ...]:
    if len(starts) <= 1:
        return tuple(function(s) for s in starts)
    with ThreadPoolExecutor(max_workers=min(len(starts), os.cpu_count() or 1)) as pool:
        return tuple(pool.map(function, starts))


def sha256_file(path: Path) -> str:
    """The plain SHA-256 of a whole file, as `sha256sum` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_regular(path: Path, what: str, *, remedy: str = "") -> int:
    """A descriptor of a regular file. Raises `MissingError`, or `UnsafeFileError` for a link or anything else."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError as error:
        raise MissingError(f"{what} is not there: {path.name}", remedy=remedy) from error
    except OSError as error:
        if path.is_symlink():
            raise UnsafeFileError(f"{what} is a link", expected="a regular file") from error
        raise MissingError(f"{what} cannot be read: {error.strerror}", remedy=remedy) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UnsafeFileError(f"{what} is not a regular file", expected="a regular file")
    return descriptor


def read_checked(path: Path, expected: FileDigest, *, what: str, remedy: str) -> memoryview:
    """Read a file whole and check the bytes that were read; the caller uses these bytes and no others.

    Raises `CorruptError` when the length or any chunk is not the expected one, `MissingError`, `UnsafeFileError`.
    """
    descriptor = open_regular(path, what, remedy=remedy)
    with os.fdopen(descriptor, "rb") as file:
        length = os.fstat(file.fileno()).st_size
        if length != expected.length:
            raise CorruptError(
                f"{what} has {length} bytes", expected=f"{expected.length} bytes, as when it was built", remedy=remedy
            )
        data = bytearray(length)
        got = file.readinto(data)
    if got != length:
        raise CorruptError(f"{what} gave {got} bytes", expected=f"{length} bytes", remedy=remedy)
    _compare(digest_bytes(data, chunk_bytes=expected.chunk_bytes), expected, what=what, remedy=remedy)
    return memoryview(data).toreadonly()


def compare_file(path: Path, expected: FileDigest, *, what: str, remedy: str) -> None:
    """Raise `CorruptError` unless a file has this digest; it is not held in memory."""
    _compare(digest_file(path, chunk_bytes=expected.chunk_bytes), expected, what=what, remedy=remedy)


def _compare(digest: FileDigest, expected: FileDigest, *, what: str, remedy: str) -> None:
    if digest.length != expected.length:
        raise CorruptError(
            f"{what} has {digest.length} bytes",
            expected=f"{expected.length} bytes, as when it was built",
            remedy=remedy,
        )
    for number, (one, other) in enumerate(zip(digest.chunks, expected.chunks, strict=True)):
        if one != other:
            raise CorruptError(
                f"{what} was changed: its bytes from {number * expected.chunk_bytes} on have SHA-256 {one[:16]}",
                expected=f"{other[:16]}, as when it was built",
                remedy=remedy,
            )
