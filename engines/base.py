"""What every backend offers: an `Engine` with named tensors, and `Binding`s of it with buffers that never move.

An engine is shared by all threads of a process. A binding belongs to one thread at a time: it holds the buffers (and,
on a GPU, the execution context) for one set of shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

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


@runtime_checkable
class Swappable(Protocol):
    """An engine whose weights can be replaced where they lie."""

    @property
    def loaded(self) -> str:
        """Hex digest of the weights that it holds now; for a bundle's own weights the manifest's `weights_sha256`."""

    def load_weights(self, weights: Mapping[str, NDArray[Any]], digest: str) -> None:
        """Hold these weights from now on.

        weights: every initialiser's name in the component's own graph -> array of its dtype and shape, which may be
        computed when it is asked for; always of the base's weights, never of what is loaded. Raises `MismatchError`
        before anything is changed where names, shapes or dtypes are others.
        """


@runtime_checkable
class Moving(Protocol):
    """An engine or a binding of one whose weights are replaced by a library that does not say where they lie then.

    What was recorded with another `generation` may read memory that is somebody else's, and is recorded anew.
    """

    @property
    def generation(self) -> int:
        """How often the weights were replaced."""

    def using(self) -> AbstractContextManager[object]:
        """For as long as work on the current stream is being enqueued: nothing is replaced meanwhile."""
