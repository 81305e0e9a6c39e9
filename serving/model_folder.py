"""A folder of bundles from which models are loaded while a process serves, by the names of their folders."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from ..bundle import MANIFEST, Bundle, read_bundle
from ..errors import MissingError, UnsafeFileError
from .resident import ServedModel

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Of a model."""


class ModelFolder:
    """The bundles that lie in a folder. `make` says of a bundle, and its name, what serving it takes.

    A name is that of a folder in this one, and never a path; nothing in it may be a link.
    """

    def __init__(self, folder: str | os.PathLike[str], make: Callable[[str, Bundle], ServedModel]) -> None:
        self._folder, self._make = Path(folder), make
        if not self._folder.is_dir():
            raise MissingError(f"no folder {str(folder)!r}", expected="a folder of bundles, for --models-folder")

    @property
    def names(self) -> tuple[str, ...]:
        """Of the bundles that lie there now."""
        return tuple(sorted(p.name for p in self._folder.iterdir() if NAME.fullmatch(p.name) and _is_bundle(p)))

    def open(self, name: str) -> ServedModel:
        """The model of a name; `MissingError` without one, `UnsafeFileError` for links, and `read_bundle`'s errors."""
        place = self._folder / name
        if not NAME.fullmatch(name) or not _is_bundle(place):
            raise MissingError("no bundle of that name lies in the folder of models")
        if any(path.is_symlink() for path in place.rglob("*")):
            raise UnsafeFileError(
                f"the bundle {name!r} holds a link", expected="regular files", remedy="Copy the files there."
            )
        return self._make(name, read_bundle(place))


def _is_bundle(place: Path) -> bool:
    return place.is_dir() and not place.is_symlink() and (place / MANIFEST).is_file()
