"""A real disk of a few KiB, whose writes really fail."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PAGE = 4096


class SmallDisk:
    """A file system in memory, mounted at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def resize(self, size: int, *options: str) -> None:
        """Make it this many bytes, in whole pages; it cannot be less than what lies on it."""
        self._mount("remount", f"size={max(1, -(-size // PAGE)) * PAGE}", *options)

    def _mount(self, *options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(self.path)]
        subprocess.run(command, check=True, capture_output=True, text=True)


@contextmanager
def small_disk(path: Path) -> Iterator[SmallDisk]:
    """Mount one; the test is skipped where this process may not."""
    path.mkdir()
    disk = SmallDisk(path)
    try:
        disk._mount("size=64k", "mode=700")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here ({getattr(error, 'stderr', None) or error})")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)  # noqa: S607 the mount of the system that the tests run on
