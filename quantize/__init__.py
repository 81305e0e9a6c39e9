"""Fewer bits where the picture allows: which layers may be integers, under a budget on a bundle's own pictures."""

from .quantize import quantize_bundle

__all__ = ["quantize_bundle"]
