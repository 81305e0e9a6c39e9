"""Records by slot in one block of device memory, each beside its image on the host: many fields, one upload."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .memory import send

ALIGNMENT = 16
"""Bytes: of the beginning of a field, and so of a record's length."""
Fields = Mapping[str, tuple[Any, tuple[int, ...]]]
"""By name: a NumPy dtype, and the shape of one slot's."""


class Records:
    """S records of the same fields on a device, written on the host and sent as they lie in memory.

    on_device: tensors [S, *shape] by field, views of one block. on_host: NumPy arrays of the same shapes, in pinned
    memory on CUDA. What is written there reaches the device with `flush`, the records of neighbouring slots together.
    """

    def __init__(self, slots: int, fields: Fields, device: torch.device) -> None:
        places, length = {}, 0
        for name, (dtype, shape) in fields.items():
            size = np.dtype(dtype).itemsize * math.prod(shape)
            places[name] = slice(length, length + size)
            length += -(-size // ALIGNMENT) * ALIGNMENT
        self.block = torch.zeros((slots, length), dtype=torch.uint8, device=device)
        image = torch.zeros((slots, length), dtype=torch.uint8, device="cpu")
        self._image = image.pin_memory() if self.block.is_cuda else image
        self._sent = torch.cuda.Event() if self.block.is_cuda else None
        self._changed: set[int] = set()

        def fields_of(block: torch.Tensor) -> dict[str, torch.Tensor]:
            return {
                name: block[:, places[name]].view(getattr(torch, np.dtype(dtype).name)).view(slots, *shape)
                for name, (dtype, shape) in fields.items()
            }

        self.on_device = fields_of(self.block)
        self._on_host = {n: t.numpy() for n, t in fields_of(self._image).items()}

    @property
    def bytes(self) -> int:
        return int(self.block.numel())

    def of(self, slot: int) -> Mapping[str, npt.NDArray[Any]]:
        """One slot's fields on the host, to be written; what was sent before has left."""
        if self._sent is not None:
            self._sent.synchronize()
        self._changed.add(slot)
        return {n: a[slot, ...] for n, a in self._on_host.items()}  # views, of a number too

    def flush(self) -> None:
        """Send what was written, on the current stream; nobody waits."""
        for first, last in _runs(self._changed):
            send(self.block[first:last], self._image[first:last])
        if self._changed and self._sent is not None:
            self._sent.record()
        self._changed.clear()

    def forget(self, slot: int) -> None:
        """Zero a record on the device; what was written and not sent is not sent."""
        self._changed.discard(slot)
        self.block[slot].zero_()


def _runs(slots: Iterable[int]) -> list[tuple[int, int]]:
    """Numbers as ranges of neighbours, (first, behind the last)."""
    runs: list[tuple[int, int]] = []
    for slot in sorted(slots):
        if runs and runs[-1][1] == slot:
            runs[-1] = runs[-1][0], slot + 1
        else:
            runs.append((slot, slot + 1))
    return runs
