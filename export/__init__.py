"""Checkpoint in, bundle out. The only room that knows torch modules, diffusers and transformers; all of them are loaded late."""

from .checkpoint import Checkpoint, open_checkpoint
from .export import Progress, describe, export_bundle

__all__ = ["Checkpoint", "Progress", "describe", "export_bundle", "open_checkpoint"]
