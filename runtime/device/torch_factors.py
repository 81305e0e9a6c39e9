"""Factors by step of what a UNet is told, in tables on a torch device: a row takes its own by its slot's position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ..arrays import Float32
from .torch_records import Records
from .torch_tables import Batch


class StepFactors:
    """By slot, position and input: the factor of what that slot's rows are told. 1 wherever nothing else is said.

    names: the inputs, a column each. Nothing on the host is read when an evaluation takes its factors, so that it can
    be captured.
    """

    def __init__(self, names: Sequence[str], slots: int, longest_program: int, device: torch.device) -> None:
        self.names, self.longest_program = tuple(names), longest_program
        shape = (longest_program, max(1, len(self.names)))
        self._records = Records(slots, {"factors": (np.float32, shape)}, device)
        self._table = self._records.on_device["factors"]
        self._table.fill_(1.0)
        self._stepped: set[int] = set()

    @property
    def block(self) -> torch.Tensor:
        return self._records.block

    @property
    def bytes(self) -> int:
        return self._records.bytes

    def grown(self, longest_program: int) -> StepFactors:
        """A table with room for longer programs, which holds what this one does."""
        self.flush()
        table = StepFactors(self.names, len(self._table), longest_program, self._table.device)
        table._table[:, : self.longest_program] = self._table
        table._stepped = set(self._stepped)
        return table

    def load(self, slot: int, steps: Mapping[str, Float32]) -> None:
        """Write an image's factors, float32 [evaluations] by input, into a wiped slot's record; `flush` sends it."""
        if not steps:
            return
        table = self._records.of(slot)["factors"]
        table[...] = 1.0
        for name, factors in steps.items():
            table[: len(factors), self.names.index(name)] = factors
        self._stepped.add(slot)

    def flush(self) -> None:
        self._records.flush()

    def wipe(self, slot: int) -> None:
        if slot in self._stepped:
            self._records.forget(slot)
            self._table[slot].fill_(1.0)
            self._stepped.discard(slot)

    def apply(self, batch: Batch, position: torch.Tensor, stepped: Sequence[str]) -> None:
        """Write those inputs of an evaluation: what each row was told, times its factor at its slot's position."""
        if not stepped:
            return
        slots = batch.slot_of_row
        factors = self._table[slots, position[slots]]  # [R, names]
        for name in stepped:
            target, told = batch.inputs[name], batch.unscaled(name)
            column = factors[:, self.names.index(name)].reshape(-1, *(1,) * (target.ndim - 1))
            target.copy_(told * column)
