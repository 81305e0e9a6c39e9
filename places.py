"""Folders that appear whole or not at all, and what a system that refuses to write is told as.

A folder is written beside its place, as `.NAME.<8 letters>.part`, and changes places with the one that it replaces. Its
writer holds a lock on it that the operating system takes away with the process, so whatever can be locked was left by
one that was killed, and the next writer of the same name sweeps it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import FewstepError, MissingError, WriteError

log = logging.getLogger("fewstep.places")

REFUSALS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "this user's quota on the disk is used up",
    errno.EFBIG: "a file is larger than this process may write (ulimit -f)",
    errno.EROFS: "it is read-only",
    errno.EACCES: "this user may not write there",
    errno.EPERM: "this user may not write there",
}
"""What a system says that will not write, by error number; the first three are matters of room."""
ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OS_ERROR = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]")
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_FICLONE = 0x40049409


@contextlib.contextmanager
def writing(what: str, where: Path, *, needed: int = 0, remedy: str = "") -> Iterator[None]:
    """A system that refuses to write within is a `WriteError`: what was written, where, why, how much it takes.

    needed: bytes in all, as far as that is known. Libraries whose errors only quote the system's number are understood.
    """
    try:
        yield
    except FewstepError:
        raise
    except Exception as error:
        number = refusal(error, where)
        if number is None:
            raise
        at = where
        if isinstance(error, OSError) and isinstance(error.filename, (str, bytes)):
            at = Path(os.path.abspath(os.fsdecode(error.filename))).parent  # noqa: PTH100 links stay visible
        raise write_error(number, what, at, needed=needed, remedy=remedy) from error


@contextlib.contextmanager
def room_for(what: str, where: Path, needed: int) -> Iterator[None]:
    """`writing`, once there is seen to be room for so many bytes; `WriteError` before anything is written if not."""
    if free_bytes(where) < needed:
        raise write_error(errno.ENOSPC, what, where, needed=needed)
    with writing(what, where, needed=needed):
        yield


def refusal(error: BaseException | str, where: Path | None = None) -> int | None:
    """The system's error number, where it refused to write (below `where`, if it is a matter of permission)."""
    if isinstance(error, OSError) and error.errno is not None:
        number = error.errno
        if number in (errno.EACCES, errno.EPERM) and isinstance(error.filename, str) and where is not None:
            return number if Path(error.filename).absolute().is_relative_to(where.absolute()) else None
        return number if number in REFUSALS else None
    found = _OS_ERROR.search(str(error))
    number = int(found[1] or found[2]) if found else 0
    return number if number in ROOM else None


def write_error(number: int, what: str, where: Path, *, needed: int = 0, remedy: str = "") -> WriteError:
    """The error of a write that the system refused with this number."""
    found = f"{what} cannot be written to {str(where)!r}: {REFUSALS.get(number) or os.strerror(number)}"
    if number == errno.ENOSPC:
        found += f", {size_words(free_bytes(where))} are free"
    expected = f"room for about {size_words(needed)}" if needed and number in ROOM else ""
    return WriteError(found, expected=expected, remedy=remedy or "Free some room, or write to another disk.")


def why_not_written(folder: Path, count: int) -> int | None:
    """The error number that a write of so many bytes into a folder meets, for a library that kept it to itself.

    It is found by writing them; `None` where that goes well.
    """
    block = b"\0" * (1 << 20)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            for start in range(0, count, len(block)):
                file.write(block[: count - start])
            file.flush()
    except OSError as error:
        return error.errno
    return None


def copy_file(source: Path, target: Path) -> None:
    """A file's bytes under another name, its blocks shared where the file system shares blocks (Btrfs, XFS).

    Never a hard link: `onnx.load` and `onnx.checker` refuse weights whose file has a second name, and the bundle that
    the file came from would be refused with the new one. Raises `OSError`.
    """
    with source.open("rb") as read, target.open("wb") as written:
        if sys.platform == "linux":
            import fcntl

            with contextlib.suppress(OSError):
                fcntl.ioctl(written, _FICLONE, read.fileno())
                return
        shutil.copyfileobj(read, written, 1 << 24)


def write_whole(target: Path, data: str | bytes) -> Path:
    """Write a file that appears whole or not at all, with what was there before kept until then; `WriteError`."""
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with writing(target.name, target.parent):
            part.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
            part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return target


@contextlib.contextmanager
def alone_with(folder: Path) -> Iterator[None]:
    """Alone among those who change files of a folder, where the system has locks."""
    hold = _hold(folder, wait=True)
    try:
        yield
    finally:
        _let_go(hold)


def size_words(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def free_bytes(folder: Path) -> int:
    """Bytes that are free where a folder is or would be."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


@contextlib.contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` to write into, its owner's alone; deleted afterwards, unless it was put in place.

    First of all what killed writers of the same target left is swept, and an old folder put back (`put_back`).
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    put_back(target)
    sweep_left(target)
    folder, hold = _made(target)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _let_go(hold)


def _made(target: Path) -> tuple[Path, int | None]:
    """A new folder with a lock on it; another one where somebody swept it before it was locked."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
        hold = _hold(folder, wait=True)
        if hold is None or _is(folder, hold):
            return folder, hold
        _let_go(hold)


def put_in_place(folder: Path, target: Path) -> None:
    """Make a finished folder the one at `target`; what was there is at `folder` then, or gone.

    In one step where the system can exchange two folders. Elsewhere in two renames: killed in between, the old one is
    left as `.NAME.PID.old`, which `put_back` finds.
    """
    if not target.exists():
        folder.rename(target)
    elif not exchange(folder, target):
        _replace_in_two(folder, target)


def exchange(one: Path, other: Path) -> bool:
    """Have two folders of one file system change places in one step (Linux); whether that can be done here."""
    if sys.platform != "linux":
        return False
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    if not libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):  # an old kernel, or a file system without it
        return False
    raise OSError(number, os.strerror(number), str(other))


def _replace_in_two(folder: Path, target: Path) -> None:
    aside = target.with_name(f".{target.name}.{os.getpid()}.old")
    hold = _hold(target, wait=True)
    try:
        target.rename(aside)
        try:
            folder.rename(target)
        except BaseException:
            if not target.exists():
                aside.rename(target)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        _let_go(hold)


def put_back(target: Path) -> bool:
    """Where replacing `target` was killed between its two renames, give the old folder its place again; whether it was.

    Raises `MissingError` where this user may not do that.
    """
    if os.path.lexists(target):
        return False
    for aside in sorted(_left(target, r"\d+\.old"), key=lambda p: p.lstat().st_mtime, reverse=True):
        hold = _hold(aside, wait=True)  # whoever is between the renames now is through with them afterwards
        try:
            if os.path.lexists(target):
                return False
            aside.rename(target)
        except OSError as error:
            raise MissingError(
                f"there is no {str(target)!r}: an export that was killed while replacing it left it as {aside.name!r}, "
                f"and it cannot be put back ({error.strerror})",
                remedy=f"Put it back with: mv {aside} {target}",
            ) from error
        finally:
            _let_go(hold)
        log.warning("%s was not there: an export that was killed had put it aside; it is back", target)
        return True
    return False


def sweep_left(target: Path) -> list[str]:
    """Delete what killed writers of `target` left beside it; the names."""
    swept = []
    replaced = r"|\d+\.old" if target.exists() else ""
    for folder in _left(target, rf"[a-z0-9_]{{8}}\.part{replaced}"):
        hold = _hold(folder, wait=False)
        if hold is None:
            continue
        try:
            if _is(folder, hold):
                shutil.rmtree(folder, ignore_errors=True)
                swept.append(folder.name)
        finally:
            _let_go(hold)
    if swept:
        log.info("deleted %s, left by an export that was killed", ", ".join(swept))
    return swept


def is_left(folder: Path) -> bool:
    """Whether a folder that was being written has no writer any more."""
    hold = _hold(folder, wait=False)
    _let_go(hold)
    return hold is not None


def _left(target: Path, endings: str) -> list[Path]:
    """The folders beside `target` that are named for it, with one of these endings."""
    named = re.compile(rf"\.{re.escape(target.name)}\.(?:{endings})")
    with contextlib.suppress(OSError):
        return [p for p in target.parent.iterdir() if named.fullmatch(p.name) and p.is_dir() and not p.is_symlink()]
    return []


def _hold(folder: Path, *, wait: bool) -> int | None:
    """A lock on a folder, which goes with this process; `None` where somebody has it, or the system has no such."""
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _let_go(hold: int | None) -> None:
    if hold is not None:
        os.close(hold)


def _is(folder: Path, hold: int) -> bool:
    """Whether the path still leads to the folder that is held."""
    with contextlib.suppress(OSError):
        return os.path.samestat(folder.lstat(), os.fstat(hold))
    return False
