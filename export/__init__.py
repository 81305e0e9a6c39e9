"""Checkpoint in, bundle out: the only room that knows torch modules, diffusers and transformers, all loaded late."""

from .checkpoint import Checkpoint, open_checkpoint
from .export import Progress, describe, export_bundle

__all__ = ["Checkpoint", "Progress", "describe", "export_bundle", "open_checkpoint"]
