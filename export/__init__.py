"""Checkpoint in, bundle out: the only room that knows torch modules, diffusers and transformers, all loaded late.

Importing it registers the `torch` backend, which runs the exported modules themselves, and what diffusers' adapter asks
of that library.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

from ..engines import register_in_memory as _register_in_memory
from ..runtime.library import register_library as _register_library
from .backend import open_torch as _open_torch
from .library import DiffusersLibrary as _DiffusersLibrary

if TYPE_CHECKING:
    from .checkpoint.folder import Checkpoint, open_checkpoint
    from .export import Progress, describe, export_bundle

_register_in_memory("torch", _open_torch)
_register_library(_DiffusersLibrary())

__all__ = ["Checkpoint", "Progress", "describe", "export_bundle", "open_checkpoint"]


def __getattr__(name: str) -> object:
    """Load what reads and traces checkpoints when it is asked for: whoever runs a bundle asks for none of it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    file = ".checkpoint.folder" if name in ("Checkpoint", "open_checkpoint") else ".export"
    return getattr(_import_module(file, __name__), name)
