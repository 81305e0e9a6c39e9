"""A bundle as a model of Triton Inference Server's Python backend."""

from .repository import write_repository as write_repository

__all__ = ["write_repository"]
