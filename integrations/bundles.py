"""A bundle by the name that a person types: a folder, or an embedded model."""

from __future__ import annotations

from pathlib import Path

from ..bundle import Bundle, read_bundle
from ..engines.backends.registry import makes_in_memory

EMBEDDED = ("student", "base")


def bundle_of(name: str, backend: str = "auto") -> Bundle:
    """The bundle in a folder; `student` and `base` are the embedded models where no folder of that name lies here.

    backend: the one that will run it; what is made in memory is registered. Raises `MissingError`, `CorruptError`.
    """
    if makes_in_memory(backend):
        from .. import export  # noqa: F401
    if name in EMBEDDED and not Path(name).exists():
        from ..export.embedded import embedded_bundle

        return embedded_bundle(name)[0]
    return read_bundle(name)
