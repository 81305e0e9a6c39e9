"""Every sampler by name. A module of solvers registers its own when it is imported, and has its name here."""

from __future__ import annotations

from ...errors import UnknownNameError
from . import consistency, ddim, dpmpp, euler, multistep, twostage, unipc  # noqa: F401 - in the order of the listings
from .sampler import SAMPLERS, Sampler, sampler

__all__ = ["SAMPLERS", "Sampler", "find_sampler", "sampler"]


def find_sampler(name: str) -> Sampler:
    """The sampler of a canonical name; raises UnknownNameError with the nearest."""
    if name not in SAMPLERS:
        raise UnknownNameError("sampler", name, SAMPLERS)
    return SAMPLERS[name]
