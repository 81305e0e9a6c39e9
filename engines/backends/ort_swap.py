"""Weights of ONNX Runtime's engines on the CPU, bound as inputs: to swap them is to bind other arrays.

The session's graph has been optimised before (`engines/graph/weights_apart.py`). Most weights are bound where the
bundle's file is mapped into memory, and are read by all processes from the same pages; those of convolutions are laid
out anew. What an evaluation began with it ends with: the next one takes what was loaded meanwhile.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import MismatchError
from ..base import Binding, TensorSpec
from ..graph.weights_apart import read_fed
from ..profile import check_dims
from .ort import OrtBinding, OrtEngine, check_tensors

Weights = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """What an engine holds: the digest, each weight as it was given, and by input the value and the array it shows."""

    digest: str
    weights: Weights
    values: Mapping[str, Any]
    arrays: Mapping[str, NDArray[Any]]


class SwappableOrtEngine(OrtEngine):
    """An engine of ONNX Runtime whose weights can be replaced between two evaluations; `Swappable`."""

    __slots__ = ("_fed", "_lock", "_shapes", "held")

    def __init__(
        self,
        session: Any,
        *,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        weights: Weights,
        digest: str,
    ) -> None:
        self._fed = read_fed(session.get_modelmeta().custom_metadata_map)
        super().__init__(session, inputs=inputs, outputs=outputs)
        self._shapes = {f.source: weights[f.source].shape for f in self._fed}
        self._lock = threading.Lock()
        self.held = self._hold(weights, digest, None)

    def _check(self, session: Any) -> None:
        own = {f.name for f in self._fed}
        check_tensors("input", self.inputs, [i for i in session.get_inputs() if i.name not in own])
        check_tensors("output", self.outputs, session.get_outputs())

    @property
    def loaded(self) -> str:
        return self.held.digest

    def load_weights(self, weights: Weights, digest: str) -> None:
        """See `Swappable`. What has the same array as before is left as it is."""
        with self._lock:
            self.held = self._hold(weights, digest, self.held)

    def _hold(self, weights: Weights, digest: str, before: _Held | None) -> _Held:
        """Everything new beside what there is, so that a failure changes nothing."""
        missing = sorted(self._shapes.keys() - weights.keys())
        if missing:
            raise MismatchError(
                f"the weights have no {', '.join(missing[:8])}", expected="every weight of the engine's graph"
            )
        taken = {name: weights[name] for name in self._shapes}
        for name, weight in taken.items():
            if weight.shape != self._shapes[name] or weight.dtype != np.float32:
                raise MismatchError(
                    f"{name} is {weight.dtype} {list(weight.shape)}",
                    expected=f"float32 {list(self._shapes[name])}",
                    remedy="Take weights of the same architecture and precision.",
                )
        kept = {} if before is None else {n for n, w in taken.items() if before.weights[n] is w}
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            fresh = [f for f in self._fed if f.source not in kept]
            arrays = dict(
                zip([f.name for f in fresh], pool.map(lambda f: f.laid_out(taken[f.source]), fresh), strict=True)
            )
        values = {name: _value(array) for name, array in arrays.items()}
        if before is not None:
            same = {f.name for f in self._fed if f.source in kept}
            arrays |= {n: before.arrays[n] for n in same}
            values |= {n: before.values[n] for n in same}
        return _Held(digest=digest, weights=taken, values=values, arrays=arrays)

    def bind(self, dims: Mapping[str, int]) -> Binding:
        """NumPy buffers for these dimensions."""
        check_dims((*self.inputs.values(), *self.outputs.values()), dims)
        return _SwappableBinding(self, self._session, dims)


class _SwappableBinding(OrtBinding):
    """Binds what its engine holds before it evaluates, where that has changed."""

    __slots__ = ("_bound", "_engine")

    def __init__(self, engine: SwappableOrtEngine, session: Any, dims: Mapping[str, int]) -> None:
        super().__init__(session, engine.inputs, engine.outputs, dims)
        self._engine: SwappableOrtEngine = engine
        self._bound: _Held | None = None

    def _prepare(self) -> None:
        held, bound = self._engine.held, self._bound
        if held is bound:
            return
        for name, value in held.values.items():
            if bound is None or bound.values[name] is not value:
                self._io.bind_ortvalue_input(name, value)
        self._bound = held  # keeps the arrays as long as they are bound


def _value(array: NDArray[Any]) -> Any:
    from onnxruntime import OrtValue

    return OrtValue.ortvalue_from_numpy(array)
