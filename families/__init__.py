"""Families of checkpoints, a file each: what their parts are, how they fit together, and what a request may tell them.

A new family is its file, and its import here.
"""

from .base import (
    Condition,
    Family,
    Part,
    TextEncoder,
    all_families,
    find_family,
    register_family,
    unregister_family,
    vae_factor,
)
from .sd import SD1, SD2
from .sdxl import SDXL

for _family in (SD1, SD2, SDXL):
    register_family(_family)

__all__ = [
    "Condition",
    "Family",
    "Part",
    "TextEncoder",
    "all_families",
    "find_family",
    "register_family",
    "unregister_family",
    "vae_factor",
]
