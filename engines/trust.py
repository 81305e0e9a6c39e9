"""Who could put another file where engines lie: an engine is code, so nobody but its user and root may."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from ..errors import UnsafeFileError

MOST_LINKS = 40
_ALL_USERS = "4294967295"


def check_own(root: Path, *, what: str, remedy: str) -> None:
    """Raise `UnsafeFileError` unless a folder, and every folder and link that leads to it, is out of others' hands.

    The folder must be its user's and no link, of mode 0700. On the way to it, as sshd asks of its files, all must be
    root's or the user's, and what others may write to must have the sticky bit, as /tmp has: there they can make
    things, and not rename or delete what is somebody else's.
    """
    status = root.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise UnsafeFileError(f"{what} {str(root)!r} is not a folder", expected="a folder, and no link")
    if not hasattr(os, "geteuid"):
        return
    if status.st_uid != os.geteuid():
        raise UnsafeFileError(
            f"{what} {str(root)!r} belongs to user {status.st_uid}",
            expected=f"user {os.geteuid()}, who runs this: an engine is code",
            remedy=remedy,
        )
    if status.st_mode & 0o077:
        raise UnsafeFileError(
            f"{what} {str(root)!r} has mode {stat.S_IMODE(status.st_mode):04o}",
            expected="0700: whoever can write there can run code as you",
            remedy=f"Mend it with: chmod 700 {root}",
        )
    owners = {0, os.geteuid(), *_unmapped()}
    for path in ways(root.parent):
        status = path.lstat()
        if status.st_uid not in owners:
            raise UnsafeFileError(
                f"{str(path)!r}, on the way to {what}, belongs to user {status.st_uid}",
                expected=f"root or user {os.geteuid()}: an engine is code, and its owner can put another there",
                remedy=remedy,
            )
        if not stat.S_ISLNK(status.st_mode) and _others_may_replace(status):
            raise UnsafeFileError(
                f"{str(path)!r}, on the way to {what}, has mode {stat.S_IMODE(status.st_mode):04o}",
                expected="a folder that others cannot write to: they could put another store there",
                remedy=f"Mend it with: chmod go-w {path}. {remedy}",
            )


def ways(path: Path) -> Iterator[Path]:
    """Every folder and every link that the system passes on the way to a folder, from the root to itself."""
    path = path.absolute()
    here, left, links = Path(path.anchor), list(path.parts[1:]), 0
    yield here
    while left:
        name = left.pop(0)
        if name == "..":
            here = here.parent
            continue
        step = here / name
        yield step
        if not step.is_symlink():
            here = step
            continue
        links += 1
        if links > MOST_LINKS:
            raise UnsafeFileError(f"{str(path)!r} has more than {MOST_LINKS} links on its way", expected="a folder")
        target = step.readlink()
        here = Path(target.anchor) if target.is_absolute() else here
        left = [*target.parts[1 if target.is_absolute() else 0 :], *left]


def _others_may_replace(status: os.stat_result) -> bool:
    """Whether somebody else may rename or delete what is in a folder."""
    if status.st_mode & stat.S_ISVTX:
        return False
    group = status.st_mode & stat.S_IWGRP and not _is_private(status.st_gid)
    return bool(status.st_mode & stat.S_IWOTH or group)


def _is_private(group: int) -> bool:
    """Whether a group is the user's alone, as systems make one for each user: named like the user, with no other in it.

    Root's own group counts as one: who is in it is root's choice.
    """
    if group == 0:
        return True
    import grp
    import pwd

    try:
        user, found = pwd.getpwuid(os.geteuid()), grp.getgrgid(group)
    except KeyError:
        return False
    return found.gr_name == user.pw_name and set(found.gr_mem) <= {user.pw_name}


def _unmapped() -> set[int]:
    """The user that owns everything of users outside of this user namespace; none outside of one.

    Inside of a sandbox, root's own folders are that user's; nobody inside can be it.
    """
    try:
        inside, _, count = Path("/proc/self/uid_map").read_text(encoding="ascii").split()[:3]
        if (inside, count) == ("0", _ALL_USERS):
            return set()
        return {int(Path("/proc/sys/kernel/overflowuid").read_text(encoding="ascii"))}
    except (OSError, ValueError):
        return set()
