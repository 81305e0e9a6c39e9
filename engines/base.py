"""What every backend offers: an `Engine` with named tensors, and `Binding`s of it with buffers that never move.

An engine is shared by all threads of a process. A binding belongs to one thread at a time: it holds the buffers (and,
on a GPU, the execution context) for one set of shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from ..bundle import TensorSpec as TensorSpec


class Binding(Protocol):
    """Buffers for one set of shapes, and the call that fills the outputs from the inputs.

    `inputs` and `outputs` are NumPy arrays on a CPU backend and torch CUDA tensors on a GPU backend. They are
    allocated once; write into them, never replace them.
    """

    @property
    def inputs(self) -> Mapping[str, Any]: ...

    @property
    def outputs(self) -> Mapping[str, Any]: ...

    def enqueue(self, stream: int | None = None) -> None:
        """Evaluate once: synchronously on a CPU, on the CUDA stream with this handle on a GPU."""


@runtime_checkable
class Engine(Protocol):
    """An executable of one component, loaded."""

    @property
    def backend(self) -> str:
        """Its name, one of `backend_names()`."""

    @property
    def device(self) -> str:
        """`"cpu"` or `"cuda"`: where the buffers of its bindings lie."""

    @property
    def inputs(self) -> Mapping[str, TensorSpec]: ...

    @property
    def outputs(self) -> Mapping[str, TensorSpec]: ...

    @property
    def capture(self) -> str:
        """What CUDA graphs it admits: `"whole_request"`, `"own_graph"` or `"none"`."""

    def bind(self, dims: Mapping[str, int]) -> Binding:
        """A binding for these dimensions (`{"rows": 2, "height": 64, "width": 64, "tokens": 77}`).

        Raises `MismatchError` when the engine's profiles do not admit them.
        """
