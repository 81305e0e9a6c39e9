"""Checkpoint in, bundle out: the only room that knows torch modules, diffusers and transformers, all loaded late.

Importing it registers the `torch` backend, which runs the exported modules themselves.
"""

from ..engines import register_backend as _register_backend
from .backend import open_torch
from .checkpoint.folder import Checkpoint, open_checkpoint
from .export import Progress, describe, export_bundle

_register_backend("torch", open_torch)

__all__ = ["Checkpoint", "Progress", "describe", "export_bundle", "open_checkpoint"]
