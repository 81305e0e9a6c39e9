"""Families of checkpoints, a file each: what their parts are, how they fit together, and what a request may tell them.

A new family is its file, and an import here.
"""

from . import deepfloyd, sd, sdxl, svd  # noqa: F401
from .base import Condition, Family, all_families, find_family, known_models

__all__ = ["Condition", "Family", "all_families", "find_family", "known_models"]
