"""What the UNet is told of an image besides latent and timestep: arrays by the names of the graph's inputs.

Prompts, sizes, a guidance scale, a control picture: whoever has something to tell produces named arrays, and nothing
else in the runtime knows what they mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from ..engines import TensorSpec
from ..engines.graph.low_rank import Layer
from ..errors import ArgumentError, NonFiniteError
from .arrays import Float32

OWN_INPUTS = ("sample", "timestep")
"""Inputs of the UNet that a slot's state fills."""
TOKENS = "tokens"
"""The dimension along which an array may be repeated whole: attention to repeated keys is what it was."""
Arrays = Mapping[str, Float32]


class Change(Protocol):
    """A low-rank change of a network's weights (`loras.py`), as arrays for a row."""

    @property
    def rank(self) -> int: ...

    @property
    def kernels(self) -> bool:
        """Whether it changes convolutions of larger kernels, which not every graph admits."""

    def packed(self, layers: Sequence[Layer], rank: int) -> Arrays:
        """`lora_down` [I, rank] and `lora_up` [rank, O] for these layers: the same arrays each time."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Retold:
    """From evaluation `first` on, arrays in place of those told before: as `Conditioning`'s, of the same names."""

    first: int
    positive: Arrays
    negative: Arrays | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Conditioning:
    """One image's arrays, each of the shape that a row of the UNet's input has.

    positive: of the prompt's row. negative: of the row that guidance leads away from; `None` where there is none.
    tokens: the length that both rows' prompts have or divide; arrays along `tokens` are repeated to fill a longer one.
    change: of the network's weights for both rows, if there is one.
    steps: factors float32 [evaluations] of both rows' arrays by name, where they are not the same at every step.
    later: other arrays for later evaluations, in their order, where a prompt changes on the way.
    """

    positive: Arrays
    negative: Arrays | None
    tokens: int
    change: Change | None = None
    steps: Mapping[str, Float32] = field(default_factory=dict)
    later: tuple[Retold, ...] = ()

    def told(self, arrays: Arrays) -> Conditioning:
        """The same with more arrays, in both rows."""

        def more(of: Arrays | None) -> Arrays | None:
            return None if of is None else {**of, **arrays}

        later = (replace(r, positive={**r.positive, **arrays}, negative=more(r.negative)) for r in self.later)
        return replace(self, positive={**self.positive, **arrays}, negative=more(self.negative), later=tuple(later))

    def factors(self, position: int) -> Mapping[str, float]:
        """Those of an evaluation, by name."""
        return {name: float(table[position]) for name, table in self.steps.items()}

    @property
    def rows(self) -> int:
        """UNet rows that an evaluation takes."""
        return 1 if self.negative is None else 2

    def parts(self, position: int) -> tuple[Arrays, ...]:
        """The arrays of an evaluation by UNet row: the negative's before the prompt's."""
        told: Conditioning | Retold = self
        for retold in self.later:
            if retold.first <= position:
                told = retold
        return (told.positive,) if told.negative is None else (told.negative, told.positive)


def conditioning_inputs(inputs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """The inputs of a UNet that its conditioning fills."""
    return {n: s for n, s in inputs.items() if n not in OWN_INPUTS}


def check_conditioning(
    conditioning: Conditioning, inputs: Mapping[str, TensorSpec], dims: Mapping[str, int], *, values: bool = False
) -> None:
    """Raise `ArgumentError` unless the arrays are those that the UNet takes, by name and shape.

    dims: `height` and `width` of the latent. values: look at every number too; `NonFiniteError` for NaN or infinity.
    """
    expected = conditioning_inputs(inputs)
    for name in conditioning.steps.keys() - expected.keys():
        raise ArgumentError(f"the conditioning has factors by step of {name!r}", expected=", ".join(sorted(expected)))
    for arrays in (a for first in (0, *(r.first for r in conditioning.later)) for a in conditioning.parts(first)):
        unknown = sorted(arrays.keys() ^ expected.keys())
        if unknown:
            verb = "lacks" if unknown[0] in expected else "has"
            raise ArgumentError(
                f"the conditioning {verb} {unknown[0]!r}", expected=f"arrays for {', '.join(sorted(expected))}"
            )
        for name, spec in expected.items():
            _check_shape(arrays[name], spec, {**dims, TOKENS: conditioning.tokens})
            if values and not np.isfinite(arrays[name]).all():
                raise NonFiniteError(f"{name} holds NaN or infinity", remedy="Check what it was made from.")


def _check_shape(array: Float32, spec: TensorSpec, dims: Mapping[str, int]) -> None:
    row = TensorSpec(name=spec.name, dtype=spec.dtype, shape=spec.shape[1:]).resolve(dims)
    repeats = spec.shape[1:2] == (TOKENS,) and array.ndim and len(array) and row[0] % len(array) == 0
    shape = (row[0], *array.shape[1:]) if repeats else array.shape
    if shape != row:
        words = ["tokens" if d == TOKENS else str(n) for d, n in zip(spec.shape[1:], row, strict=True)]
        raise ArgumentError(f"{spec.name} has shape {list(array.shape)} for an image", expected=f"[{', '.join(words)}]")


def write_row(buffer: Float32, array: Float32) -> None:
    """Fill a row's buffer with its array, as often as it takes; where they are equally long, once."""
    times = len(buffer) // len(array) if buffer.ndim else 1
    np.copyto(buffer if times == 1 else buffer.reshape(times, *array.shape), array)
