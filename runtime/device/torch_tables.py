"""The tables of slots on a device: which row of an evaluation is whose, and what the UNet is told of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ...engines import Binding, TensorSpec
from ..conditioning import TOKENS, Conditioning, conditioning_inputs
from .base import Sampling
from .memory import as_tensor, upload

PARTS = 2
"""Rows a slot may take: the negative prompt's and the prompt's."""


class Batch:
    """One evaluation of `count` slots in `rows` rows: the engine's buffers, and index tables in memory that stays.

    slot_of_row, part_of_row: int64 [R]. slots: int64 [A]. rows_of: int64 [A, 2] and weights: float32 [A, 2] say
    from which rows, and with which factors, a slot's output is made. x0: float32 [A, *shape]; finite: bool [A]. told:
    whose conditionings the rows hold.
    """

    def __init__(
        self,
        binding: Binding,
        count: int,
        rows: int,
        tokens: int,
        shape: tuple[int, ...],
        device: torch.device,
    ) -> None:
        self.binding, self.count, self.rows, self.tokens = binding, count, rows, tokens
        self.inputs = {n: as_tensor(a) for n, a in binding.inputs.items()}
        self.sample, self.timestep = self.inputs["sample"], self.inputs["timestep"]
        self.out = as_tensor(binding.outputs["out"])
        index: dict[str, Any] = {"dtype": torch.int64, "device": device}
        self.slot_of_row = torch.zeros(rows, **index)
        self.part_of_row = torch.zeros(rows, **index)
        self.slots = torch.zeros(count, **index)
        self.rows_of = torch.zeros((count, PARTS), **index)
        self.weights = torch.zeros((count, PARTS), dtype=torch.float32, device=device)
        self.x0 = torch.zeros((count, *shape), dtype=torch.float32, device=device)
        self.finite = torch.ones(count, dtype=torch.bool, device=device)
        self._pointed: tuple[object, ...] = ()
        self.told: list[Conditioning] = []

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        tables = (self.slot_of_row, self.part_of_row, self.slots, self.rows_of, self.weights, self.x0, self.finite)
        return (*self.inputs.values(), self.out, *tables)

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors)

    def point(self, slots: Sequence[int], samplings: Sequence[Sampling], *, scrap: int) -> None:
        """Say which slots this evaluation is of. Rows left over belong to slot `scrap`, whose output nobody takes."""
        pointed = (tuple(slots), tuple((s.rows, s.guidance) for s in samplings))
        if pointed == self._pointed:
            return
        slot_of_row, part_of_row = np.full(self.rows, scrap, np.int64), np.full(self.rows, PARTS - 1, np.int64)
        rows_of, weights = np.zeros((self.count, PARTS), np.int64), np.zeros((self.count, PARTS), np.float32)
        row = 0
        for i, (slot, sampling) in enumerate(zip(slots, samplings, strict=True)):
            slot_of_row[row : row + sampling.rows] = slot
            part_of_row[row : row + sampling.rows] = range(PARTS - sampling.rows, PARTS)
            rows_of[i] = row, row + sampling.rows - 1
            weights[i] = (1.0 - sampling.guidance, sampling.guidance) if sampling.rows == PARTS else (0.0, 1.0)
            row += sampling.rows
        upload(self.slot_of_row, slot_of_row)
        upload(self.part_of_row, part_of_row)
        upload(self.slots, np.array(slots, np.int64))
        upload(self.rows_of, rows_of)
        upload(self.weights, weights)
        self._pointed = pointed
        self.told = []


class ConditioningTables:
    """What the UNet is told of each slot besides latent and timestep, for prompts made equally long.

    For each of its inputs one table float32 [S, 2, ...], by slot and part: the negative's row and the prompt's. Of a
    slot without a negative both hold the prompt's.
    """

    def __init__(
        self, inputs: Mapping[str, TensorSpec], slots: int, dims: Mapping[str, int], device: torch.device
    ) -> None:
        self._tokens, self._written = dims[TOKENS], dict[int, Conditioning]()
        self._tables = {
            name: torch.zeros((slots, PARTS, *spec.resolve({**dims, "rows": 1})[1:]), device=device)
            for name, spec in conditioning_inputs(inputs).items()
        }
        self._repeated = {n for n, s in inputs.items() if s.shape[1:2] == (TOKENS,)}

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(self._tables.values())

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors)

    def write(self, slot: int, conditioning: Conditioning) -> None:
        """Upload an image's arrays, once."""
        if self._written.get(slot) is conditioning:
            return
        for part, arrays in enumerate((conditioning.parts[0], conditioning.parts[-1])):
            for name, table in self._tables.items():
                array = arrays[name]
                if name in self._repeated:
                    array = np.tile(array, (self._tokens // len(array), *(1,) * (array.ndim - 1)))
                upload(table[slot, part], array)
        self._written[slot] = conditioning

    def forget(self, slot: int) -> None:
        self._written.pop(slot, None)

    def gather(self, batch: Batch, told: Sequence[Conditioning]) -> None:
        """Fill the engine's rows from the tables, where these are not the images that its rows were filled for last.

        What a UNet is told of an image stays as it is from one evaluation to the next, so no tick does this.
        """
        if len(told) == len(batch.told) and all(a is b for a, b in zip(told, batch.told, strict=True)):
            return
        batch.told = list(told)
        for name, table in self._tables.items():
            batch.inputs[name].copy_(table[batch.slot_of_row, batch.part_of_row])
