"""Checkpoint in, bundle out: the only room that knows torch modules, diffusers and transformers, all loaded late.

Importing it registers the `torch` backend, which runs the exported modules themselves.
"""

from ..engines import register_in_memory as _register_in_memory
from .backend import open_torch
from .checkpoint.folder import Checkpoint, open_checkpoint
from .export import Progress, describe, export_bundle

_register_in_memory("torch", open_torch)

__all__ = ["Checkpoint", "Progress", "describe", "export_bundle", "open_checkpoint"]
