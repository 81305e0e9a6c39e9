"""The seam to what knows diffusers' own objects: the room above registers it, and it is loaded when it is asked for.

The runtime needs neither torch nor diffusers. Where a caller hands over an object of theirs, or a checkpoint instead of
a bundle, `open_library` loads the room that reads them, by name, as the command line loads its verbs.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..bundle import Bundle, read_bundle
from ..engines.backends.registry import makes_in_memory

ROOM = "export"
EMBEDDED = ("student", "base")
"""Names of the models that travel with the package, wherever a bundle's folder is taken."""


class Library(Protocol):
    """What the runtime asks of that room. Where it takes diffusers, `MissingExtraError` without it."""

    def embedded(self, name: str) -> Bundle:
        """The bundle of a model that travels with the package; kept in the cache. Takes neither torch nor diffusers."""

    def named(self, name: str) -> Any:
        """What diffusers calls so, such as a scheduler's class; `AttributeError` where it has no such name."""

    def make_scheduler(self, config: Mapping[str, Any]) -> Any:
        """diffusers' scheduler of a configuration, `_class_name` included."""

    def export_checkpoint(
        self,
        source: str,
        *,
        dtype: str,
        variant: str | None,
        revision: str | None,
        offline: bool,
        controlnets: Sequence[Any] = (),
    ) -> Bundle:
        """The bundle of a diffusers folder or hub id, with ControlNets (modules or folders); kept in the cache."""

    def export_parts(self, bundle: Bundle, parts: Mapping[str, Any]) -> Bundle:
        """A bundle with parts replaced: by modules and tokenizers, or by those of another bundle; kept in the cache."""


_registered: list[Library] = []


def register_library(library: Library) -> None:
    _registered[:] = [library]


def open_library() -> Library:
    """The library, whose room is loaded now unless it was before."""
    if not _registered:
        importlib.import_module(f"{__package__.rpartition('.')[0]}.{ROOM}")
    return _registered[0]


def offer_backend(name: str) -> None:
    """Have the room above offer its backend in memory, where that is the one that is named."""
    if makes_in_memory(name):
        open_library()


def open_bundle(source: Bundle | str | os.PathLike[str]) -> Bundle:
    """A bundle, that in a folder, or by its name an embedded one where no folder of that name lies here.

    Errors as `read_bundle`'s.
    """
    if isinstance(source, Bundle):
        return source
    return open_library().embedded(str(source)) if is_embedded(source) else read_bundle(source)


def is_embedded(source: object) -> bool:
    """Whether this names an embedded model: not where a folder of that name lies here."""
    return isinstance(source, (str, os.PathLike)) and str(source) in EMBEDDED and not Path(source).exists()
