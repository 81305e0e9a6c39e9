"""Found schedules where a schedule is named: given as such, as a file's path, or as the bundle's own."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from ..bundle import Bundle
from ..errors import ArgumentError, MismatchError
from ..schedules import FoundSchedules, NoiseSchedule, Program, load_schedules, resolve_sampler
from ..schedules.names import SEARCHED, fold
from ..values import parse_json, shown

Named = str | os.PathLike[str] | FoundSchedules
"""What names a schedule. A text never opens a file: whoever asks over a network can write one."""
DIGITS = 12
"""Of a found schedule's digest, in what pictures record."""
_DIGEST = re.compile(r"[0-9a-f]{8,64}")


def find_schedules(
    bundle: Bundle, sampler: str | None, schedule: Named | None, digest: str | None = None
) -> FoundSchedules | None:
    """The found schedules that `schedule` names, `None` where it is the name of another schedule, or none.

    sampler: the one asked for, whose the bundle's own are; without it that of the bundle's defaults. digest: theirs, to
    be named where there are none. Raises `ArgumentError` for a file's name as a text and for a bundle without, and what
    `load_schedules` raises of a path.
    """
    if schedule is None or isinstance(schedule, FoundSchedules):
        return schedule
    if isinstance(schedule, os.PathLike):
        return load_schedules(os.fsdecode(schedule))
    if not isinstance(schedule, str):
        raise ArgumentError(
            f"schedule is {shown(schedule)}", expected="a name, found schedules, or the pathlib.Path of their file"
        )
    if fold(schedule).endswith(".json"):
        raise ArgumentError(
            f"schedule is the text {shown(schedule)}, and a text opens no file",
            expected="the name of a schedule",
            remedy="Pass it as a pathlib.Path, or to load_schedules; on the command line: --schedule FILE.json",
        )
    if fold(schedule) != SEARCHED:
        return None
    named = sampler or bundle.defaults.sampler or str(bundle.scheduler["_class_name"])
    try:
        held = bundle.searched(resolve_sampler(named).name)
    except ArgumentError as error:
        if digest is None:
            raise
        found = f"{error.found}, and the one of digest {digest} is asked for"
        raise ArgumentError(found, expected=error.expected, remedy=error.remedy) from error
    if held.model != bundle.unet_digest:
        raise ArgumentError(
            f"the searched schedule of {bundle.name!r} with other weights than it was found for",
            expected="the bundle's own",
            remedy="Load them again, or use another schedule.",
        )
    return held


def check_found(
    bundle: Bundle, found: FoundSchedules, *, sampler: str | None, options: Mapping[str, Any], **beside: Any
) -> None:
    """Raise `ArgumentError` for what cannot be asked for beside found schedules, `MismatchError` for another model or
    sampler than theirs.

    beside: such arguments by name, `None` where they are not asked for.
    """
    given = [name for name, value in beside.items() if value is not None]
    given += [f"the option {name}" for name in options]
    if given:
        raise ArgumentError(
            f"{', '.join(given)} beside a found schedule", expected="one of them", remedy="Leave the other out."
        )
    found.check(model=bundle.unet_digest, sampler=sampler)
    spelled = resolve_sampler(sampler or found.sampler)
    if spelled.schedule is not None or spelled.options:
        raise ArgumentError(
            f"sampler {sampler!r}, which carries a schedule or options, beside a found schedule",
            expected=found.sampler,
            remedy="Leave the sampler out.",
        )


def check_digest(found: FoundSchedules | None, digest: str) -> None:
    """Raise unless these are the found schedules of a digest, of which its beginning is given.

    `ArgumentError` where none are asked for or the digest is none, `MismatchError` for others.
    """
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise ArgumentError(f"schedule_digest is {shown(digest)}", expected="8 to 64 hexadecimal digits")
    if found is None:
        raise ArgumentError(
            f"the digest {digest} of a found schedule, and none is asked for",
            remedy="Pass its file, or leave schedule_digest out.",
        )
    if not found.digest.startswith(digest):
        raise MismatchError(
            f"a found schedule of digest {found.digest[:DIGITS]}",
            expected=f"the one of digest {digest}",
            remedy="Pass the file that it is in: --schedule FILE.json",
        )


def found_program(scheduler: str, found: FoundSchedules, *, steps: int, start: int) -> Program:
    """The program of so many steps, compiled once for all requests that ask for the same.

    scheduler: the configuration of the bundle's noise schedule, as JSON. Raises what `FoundSchedules.program` raises.
    """
    return _compiled(scheduler, _Key(found), steps, start)


class _Key:
    """Found schedules as a key: of all that decides whether they can be used, and to what pictures."""

    __slots__ = ("_of", "found")

    def __init__(self, found: FoundSchedules) -> None:
        self.found = found
        self._of = (found.digest, found.noise_digest, found.forced)

    def __hash__(self) -> int:
        return hash(self._of)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and other._of == self._of


@lru_cache(maxsize=256)
def _compiled(scheduler: str, key: _Key, steps: int, start: int) -> Program:
    noise = NoiseSchedule.from_diffusers(parse_json(scheduler, "the scheduler"))
    return key.found.program(steps, noise=noise, start=start)
