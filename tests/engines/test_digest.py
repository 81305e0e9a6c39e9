"""Hashes of chunks: the same as hashlib's, on files and bytes alike, and a name for the chunk that changed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from fewstep.engines.digest import FileDigest, compare_file, digest_bytes, digest_file, read_checked, sha256_file
from fewstep.errors import CorruptError, MissingError, UnsafeFileError

DATA = bytes(range(256)) * 40


@pytest.mark.parametrize("chunk", [1000, 256, 10240, 1 << 20])
def test_chunks_are_plain_sha256_of_their_bytes(tmp_path: Path, chunk: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    found = digest_file(path, chunk_bytes=chunk)
    assert found == digest_bytes(DATA, chunk_bytes=chunk)
    assert list(found.chunks) == [hashlib.sha256(DATA[i : i + chunk]).hexdigest() for i in range(0, len(DATA), chunk)]
    assert FileDigest.from_json(found.to_json()) == found
    if chunk >= len(DATA):
        assert found.sha256 == hashlib.sha256(DATA).hexdigest() == sha256_file(path)


def test_bytes_are_read_once_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    digest = digest_file(path, chunk_bytes=1000)
    assert bytes(read_checked(path, digest, what="it", remedy="")) == DATA
    compare_file(path, digest, what="it", remedy="")


@pytest.mark.parametrize("position", [0, 999, 1000, 5000, len(DATA) - 1])
def test_a_flipped_bit_names_its_chunk(tmp_path: Path, position: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    digest = digest_file(path, chunk_bytes=1000)
    changed = bytearray(DATA)
    changed[position] ^= 1
    path.write_bytes(changed)
    for check in (read_checked, compare_file):
        with pytest.raises(CorruptError, match=f"bytes from {position // 1000 * 1000} on"):
            check(path, digest, what="the engine", remedy="Rebuild it.")


@pytest.mark.parametrize("length", [0, 1, len(DATA) - 1])
def test_a_file_cut_short_states_both_lengths(tmp_path: Path, length: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    digest = digest_file(path)
    path.write_bytes(DATA[:length])
    with pytest.raises(CorruptError, match=f"has {length} bytes; expected {len(DATA)} bytes"):
        read_checked(path, digest, what="the engine", remedy="")


def test_links_pipes_and_absent_files_are_refused(tmp_path: Path) -> None:
    path, link, pipe = tmp_path / "file", tmp_path / "link", tmp_path / "folder"
    path.write_bytes(DATA)
    digest = digest_file(path)
    link.symlink_to(path)
    pipe.mkdir()
    with pytest.raises(UnsafeFileError, match="is a link"):
        read_checked(link, digest, what="the engine", remedy="")
    with pytest.raises(UnsafeFileError, match="not a regular file"):
        read_checked(pipe, digest, what="the engine", remedy="")
    with pytest.raises(MissingError, match="is not there"):
        read_checked(tmp_path / "none", digest, what="the engine", remedy="")


@pytest.mark.parametrize("fields", [(0, 0), (10, 2), (10, 0), (-1, 1)])
def test_a_digest_that_contradicts_itself_is_refused(fields: tuple[int, int]) -> None:
    length, count = fields
    with pytest.raises(CorruptError, match="a digest states"):
        FileDigest(length=length, chunks=("0" * 64,) * count)


def test_hashing_is_spread_over_threads(tmp_path: Path) -> None:
    """Not a timing: a file of many chunks gives the same digest whatever the number of cores."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1 << 20))
    assert digest_file(path, chunk_bytes=4096) == digest_bytes(path.read_bytes(), chunk_bytes=4096)
