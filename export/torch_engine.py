"""The torch engine: a component's own modules, run eagerly on the CPU. A second opinion, never a fallback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from ..bundle import Bundle
from ..engines.base import TensorSpec
from ..engines.options import RunOptions
from ..errors import CorruptError
from .modules import Traceable, build_model, wrap

_TORCH = {"float32": torch.float32, "int64": torch.int64, "uint8": torch.uint8, "bool": torch.bool}


class TorchEngine:
    """A component as torch runs it in the bundle's precision; inputs and outputs are NumPy arrays."""

    backend = "torch"
    device = "cpu"
    capture = "none"

    def __init__(self, traceable: Traceable) -> None:
        self._module = traceable.module
        self.inputs: Mapping[str, TensorSpec] = {s.name: s for s in traceable.inputs}
        self.outputs: Mapping[str, TensorSpec] = {s.name: s for s in traceable.outputs}

    def bind(self, dims: Mapping[str, int]) -> TorchBinding:
        return TorchBinding(self, dims)


class TorchBinding:
    """Buffers of one set of shapes; torch and NumPy see the same memory."""

    def __init__(self, engine: TorchEngine, dims: Mapping[str, int]) -> None:
        self._module = engine._module
        self._given = {n: torch.zeros(s.resolve(dims), dtype=_TORCH[s.dtype]) for n, s in engine.inputs.items()}
        self._made = {n: torch.zeros(s.resolve(dims), dtype=_TORCH[s.dtype]) for n, s in engine.outputs.items()}
        self.inputs: Mapping[str, np.ndarray[Any, Any]] = {n: t.numpy() for n, t in self._given.items()}
        self.outputs: Mapping[str, np.ndarray[Any, Any]] = {n: t.numpy() for n, t in self._made.items()}

    def enqueue(self, stream: int | None = None) -> None:
        with torch.inference_mode():
            out = self._module(**self._given)
            for target, value in zip(self._made.values(), out if isinstance(out, tuple) else (out,), strict=True):
                target.copy_(value)


def open_torch_engine(bundle: Bundle, name: str, run: RunOptions) -> TorchEngine:
    """Build a component's modules from its configuration and load the bundle's weights into them."""
    component = bundle.component(name)
    if run.threads:
        torch.set_num_threads(run.threads)
    traceable = wrap(name, build_model(name, component.config, component.dtype), component.config, component.dtype)
    weights = load_file(bundle.path(component.weights))
    result = traceable.module.load_state_dict(weights, strict=False)
    if result.unexpected_keys:
        raise CorruptError(
            f"{component.weights} holds weights that {name} does not know: {', '.join(result.unexpected_keys[:3])}",
            remedy="Export the checkpoint again.",
        )
    return TorchEngine(traceable)
