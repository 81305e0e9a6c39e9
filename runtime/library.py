"""The seam to what knows diffusers' own objects: the room above registers it, and it is loaded when it is asked for.

The runtime needs neither torch nor diffusers. Where a caller hands over an object of theirs, or a checkpoint instead of
a bundle, `open_library` loads the room that reads them, by name, as the command line loads its verbs.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ..bundle import Bundle

ROOM = "export"


class Library(Protocol):
    """What diffusers' adapter asks of the room that knows that library; each raises `MissingExtraError` without it."""

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
