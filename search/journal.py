"""What a search has done so far, in a folder: a killed one goes on where it was."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MismatchError
from ..places import write_whole
from ..runtime.arrays import Float32
from ..schedules.fitted import FittedRow
from ..values import read_json
from .problem import Knots

NAME = "search.json"


class Journal:
    """Results by key, and the seconds that were spent before; without a folder they are kept in memory alone.

    settings: what the results depend on. A folder of other settings is a `MismatchError`: nothing of it is used, and
    nothing is lost.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any]) -> None:
        self._folder = folder
        self._held: dict[str, Mapping[str, Float32]] = {}
        self._began = time.monotonic()
        text = json.dumps(settings, sort_keys=True)
        self._data: dict[str, Any] = {"settings": hashlib.sha256(text.encode()).hexdigest(), "spent": 0.0, "done": {}}
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / NAME).is_file():
            earlier = read_json(folder / NAME, str(folder / NAME), remedy=f"Delete {folder} to begin anew.")
            if not isinstance(earlier, dict) or earlier.get("settings") != self._data["settings"]:
                raise MismatchError(
                    f"{folder} holds another search, begun with other settings",
                    expected="the same settings as when it was begun",
                    remedy=f"Give them, write to another file, or delete {folder}.",
                )
            self._data = earlier

    @property
    def spent(self) -> float:
        """Seconds so far, those before a kill included."""
        return float(self._data["spent"]) + time.monotonic() - self._began

    @property
    def resumed(self) -> bool:
        return bool(self._data["spent"])

    def knots(self, key: str, find: Callable[[], Knots | None]) -> Knots | None:
        """What `find` found under this key, now or before."""
        done = self._data["done"]
        if key not in done:
            found = find()
            done[key] = None if found is None else knots_to_json(found)
            self._write()
        stored = done[key]
        return None if stored is None else knots_from_json(stored)

    def value(self, key: str, find: Callable[[], Any]) -> Any:
        """The same for plain JSON data."""
        done = self._data["done"]
        if key not in done:
            done[key] = find()
            self._write()
        return done[key]

    def values(self, keys: Sequence[str], find: Callable[[Sequence[int]], Sequence[Any]]) -> list[Any]:
        """The same for several at once; `find` is given the places of those that are not known yet, each key's once."""
        done = self._data["done"]
        lacking = {key: i for i, key in reversed(list(enumerate(keys))) if key not in done}
        if lacking:
            places = sorted(lacking.values())
            done.update(zip([keys[i] for i in places], find(places), strict=True))
            self._write()
        return [done[key] for key in keys]

    def arrays(self, key: str, find: Callable[[], Mapping[str, Float32]]) -> Mapping[str, Float32]:
        """The same for arrays, in a file of their own; in memory where there is no folder."""
        if self._folder is None:
            if key not in self._held:
                self._held[key] = find()
            return self._held[key]
        path = self._folder / f"{key}.npz"
        if path.is_file() and key in self._data["done"]:
            with np.load(path, allow_pickle=False) as stored:
                return {name: stored[name] for name in stored.files}
        found = find()
        part = path.with_suffix(".part.npz")
        np.savez(part, **found)  # type: ignore[arg-type]
        part.replace(path)
        self._data["done"][key] = True
        self._write()
        return found

    def _write(self) -> None:
        if self._folder is not None:
            write_whole(self._folder / NAME, json.dumps({**self._data, "spent": self.spent}))


def knots_to_json(knots: Knots) -> dict[str, Any]:
    """Plain JSON data, from which `knots_from_json` makes the same."""
    rows = None if knots.rows is None else [[r.a, *r.b] for r in knots.rows]
    parts = {k: getattr(knots, k) for k in ("name", "sigmas", "fed", "kept")}
    return {**parts, "options": dict(knots.options), "rows": rows}


def knots_from_json(data: Mapping[str, Any]) -> Knots:
    rows = data["rows"]
    return Knots(
        name=data["name"],
        sigmas=tuple(data["sigmas"]),
        fed=None if data["fed"] is None else tuple(data["fed"]),
        options=data["options"],
        kept=data["kept"],
        rows=None if rows is None else tuple(FittedRow(a, tuple(b)) for a, *b in rows),
    )
