"""Inputs and outputs of networks: names, dtypes, and shapes in numbers and named dimensions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import ArgumentError
from .values import Reader

DTYPES = ("float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool")
MOST_AXES = 8
_DIMENSION = re.compile(r"[A-Za-z_]{1,64}(\*[1-9]\d{0,3})?", re.ASCII)


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
    def from_json(cls, data: object, reading: Reader) -> TensorSpec:
        """A tensor of a manifest; raises the reading's error for one that no graph has."""
        stated = reading.mapping("a tensor", data)
        name = reading.text("a tensor's name", stated.get("name"), most=256)
        dtype = reading.choice(f"the dtype of {name}", stated.get("dtype"), DTYPES)
        axes = reading.array(f"the shape of {name}", stated.get("shape"), 0, MOST_AXES)
        return cls(name=name, dtype=dtype, shape=tuple(_dimension(name, axis, reading) for axis in axes))


def _dimension(tensor: str, axis: object, reading: Reader) -> int | str:
    if isinstance(axis, str):
        return reading.text(f"a dimension of {tensor}", axis, _DIMENSION)
    return reading.integer(f"a dimension of {tensor}", axis, 1)


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
