"""Published schedules, read from the data files in `tables/`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..errors import UnknownNameError

FOLDER = Path(__file__).parent / "tables"


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """One published schedule of len(sigmas) - 1 steps.

    sigmas: falling noise levels, the last one being where the published list ends.
    published_sigmas: the same as printed in the source. timesteps: the published integer timesteps, if any.
    """

    name: str
    title: str
    source: str
    note: str
    published_sigmas: tuple[float, ...]
    sigmas: tuple[float, ...]
    timesteps: tuple[int, ...] | None


def table_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.json"))


@cache
def load_table(name: str) -> Table:
    """Read one table; raises UnknownNameError for a name without a file."""
    if name not in table_names():
        raise UnknownNameError("published schedule", name, table_names())
    data = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return Table(
        name=name,
        title=data["title"],
        source=data["source"],
        note=data["note"],
        published_sigmas=tuple(map(float, data["published_sigmas"])),
        sigmas=tuple(map(float, data["sigmas"])),
        timesteps=None if data["timesteps"] is None else tuple(data["timesteps"]),
    )
