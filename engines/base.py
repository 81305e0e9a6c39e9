"""What every backend offers: an `Engine` with named tensors, and `Binding`s of it with buffers that never move.

An engine is shared by all threads of a process. A binding belongs to one thread at a time: it holds the buffers (and,
on a GPU, the execution context) for one set of shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from ..errors import ArgumentError

DTYPES = ("float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One input or output: its name, its dtype, and its shape.

    A dimension is a number, a name (`"rows"`), or a multiple of a name (`"height*8"`).
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ArgumentError(
                f"tensor {self.name!r} has dtype {self.dtype!r}", expected=f"one of {', '.join(DTYPES)}"
            )

    def resolve(self, dims: Mapping[str, int]) -> tuple[int, ...]:
        """The shape in numbers, given a number for each named dimension; `ArgumentError` if one is missing."""
        return tuple(resolve_dimension(d, dims, self.name) for d in self.shape)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TensorSpec:
        return cls(name=str(data["name"]), dtype=str(data["dtype"]), shape=tuple(data["shape"]))


def resolve_dimension(dimension: int | str, dims: Mapping[str, int], tensor: str) -> int:
    """A dimension in numbers: `3`, `"rows"` or `"height*8"`."""
    if isinstance(dimension, int):
        return dimension
    name, _, factor = dimension.partition("*")
    if name not in dims:
        raise ArgumentError(
            f"no size is given for dimension {name!r} of tensor {tensor!r}", expected=f"{name}=<integer>"
        )
    return dims[name] * (int(factor) if factor else 1)


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
        """One of `registry.BACKENDS`: `"ort-cpu"`, `"tensorrt"`, ..."""

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
