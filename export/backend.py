"""The `torch` backend's factory, which loads torch only when an engine of it is asked for."""

from __future__ import annotations

import importlib.util

from ..bundle import Bundle
from ..engines.base import Engine
from ..engines.options import RunOptions
from ..errors import MissingExtraError


def open_torch(bundle: Bundle, name: str, run: RunOptions) -> Engine:
    """Open a component on the torch backend; `MissingExtraError` where torch or diffusers is not installed."""
    for module in ("torch", "diffusers", "transformers"):
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError(module, "export", purpose="The torch backend")
    from .torch_engine import open_torch_engine

    return open_torch_engine(bundle, name, run)
