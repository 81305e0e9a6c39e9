"""What an evaluation on a device is of: which row is whose, and what the UNet is told of each."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ...engines import Binding
from ..conditioning import OWN_INPUTS
from .base import VARIANCE, Evaluator, Sampling
from .memory import as_tensor, upload
from .torch_records import Records

PARTS = 2
"""Rows a slot may take: the negative prompt's and the prompt's."""
SMALL = 1024
"""Bytes up to which arrays are known by what they hold: a size, a guidance scale."""
MOST_SMALL = 256


class Batch:
    """One evaluation of `count` slots in `rows` rows: the engine's buffers, and index tables in memory that stays.

    slot_of_row: int64 [R]. slots: int64 [A]. rows_of: int64 [A, 2] and weights: float32 [A, 2] say from which rows, and
    with which factors, a slot's output is made; of clips, [A, 2, F], by frame. x0: float32 [A, *shape].
    """

    def __init__(
        self,
        evaluator: Evaluator,
        binding: Binding,
        count: int,
        rows: int,
        tokens: int,
        shape: tuple[int, ...],
        device: torch.device,
        *,
        lead: tuple[int, ...] = (),
    ) -> None:
        self.evaluator, self.binding = evaluator, binding
        self.count, self.rows, self.tokens = count, rows, tokens
        self.inputs = {n: as_tensor(a) for n, a in binding.inputs.items()}
        self.sample, self.timestep = self.inputs["sample"], self.inputs["timestep"]
        self.out = as_tensor(binding.outputs["out"])
        self.variance = as_tensor(binding.outputs[VARIANCE]) if VARIANCE in binding.outputs else None
        fields = {
            "slot_of_row": (np.int64, (rows,)),
            "slots": (np.int64, (count,)),
            "rows_of": (np.int64, (count, PARTS)),
            "weights": (np.float32, (count, PARTS, *lead)),
        }
        self._tables = Records(1, fields, device)
        self.slot_of_row, self.slots, self.rows_of, self.weights = (
            t[0] for t in (self._tables.on_device[n] for n in fields)
        )
        self.x0 = torch.zeros((count, *shape), dtype=torch.float32, device=device)
        self._conditioned = [n for n in self.inputs if n not in OWN_INPUTS]
        self._pointed: tuple[object, ...] = ()
        self._told: dict[str, list[torch.Tensor]] = {}
        self._unscaled: dict[str, torch.Tensor] = {}

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        said = () if self.variance is None else (self.variance,)
        return (*self.inputs.values(), self.out, *said, self._tables.block, self.x0)

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.tensors, *self._unscaled.values()))

    def unscaled(self, name: str) -> torch.Tensor:
        """What the rows of an input are told before its factors by step, in memory that stays."""
        if name not in self._unscaled:
            self._unscaled[name] = torch.zeros_like(self.inputs[name])
        return self._unscaled[name]

    def point(self, slots: Sequence[int], samplings: Sequence[Sampling], *, scrap: int) -> None:
        """Say which slots this evaluation is of. Rows left over belong to slot `scrap`, whose output nobody takes."""
        pointed = (tuple(slots), tuple((s.rows, s.guidance) for s in samplings))
        if pointed == self._pointed:
            return
        tables = self._tables.of(0)
        tables["slot_of_row"][...] = scrap
        row = 0
        for i, (slot, sampling) in enumerate(zip(slots, samplings, strict=True)):
            tables["slot_of_row"][row : row + sampling.rows] = slot
            tables["rows_of"][i] = row, row + sampling.rows - 1
            guidance = np.asarray(sampling.guidance if sampling.rows == PARTS else 1.0)  # a number, or one a frame
            tables["weights"][i, 0], tables["weights"][i, 1] = 1.0 - guidance, guidance
            row += sampling.rows
        tables["slots"][...] = slots
        self._tables.flush()
        self._pointed = pointed

    def tell(self, samplings: Sequence[Sampling], copies: DeviceCopies, stepped: Sequence[str] = ()) -> None:
        """Fill the engine's rows with what the UNet is told of these images, where they hold something else.

        Shorter prompts are repeated whole to fill a longer one. What is left over is told what the last row is. No tick
        does this: what a UNet is told of an image stays as it is from one evaluation to the next, but for factors by
        step. What has some (`stepped`) is told beside the engine's rows, which each tick then fills from there.
        """
        parts = [p for s in samplings for p in self.evaluator.parts(s)]
        parts += [parts[-1]] * (self.rows - len(parts))
        for name in self._conditioned:
            told = [copies.of(p[name]) for p in parts]
            scaled = name in stepped
            if scaled:
                self._told.pop(name, None)  # a tick overwrites the engine's rows
            place = f"{name}/unscaled" if scaled else name
            known = self._told.get(place, [])
            if len(known) == len(told) and all(a is b for a, b in zip(known, told, strict=True)):
                continue
            self._told[place] = told
            target = self.unscaled(name) if scaled else self.inputs[name]
            if any(len(t) != target.shape[1] for t in told if t.ndim):
                told = [t.repeat(target.shape[1] // len(t), *(1,) * (t.ndim - 1)) for t in told]
            target.copy_(torch.stack(told))


class DeviceCopies:
    """Arrays of the host on a device, uploaded once: an embedding that is kept on the host is kept there too.

    Small arrays are known by what they hold, others by who they are; the copy of one goes with it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._large: dict[int, tuple[weakref.ref[npt.NDArray[Any]], torch.Tensor]] = {}
        self._small: OrderedDict[tuple[object, ...], torch.Tensor] = OrderedDict()

    @property
    def bytes(self) -> int:
        tensors = [*(t for _, t in self._large.values()), *self._small.values()]
        return sum(t.numel() * t.element_size() for t in tensors)

    def of(self, array: npt.NDArray[Any]) -> torch.Tensor:
        """The copy of an array that nobody changes, of its shape, in float32."""
        if array.nbytes <= SMALL:
            return self._of_value(array)
        key = id(array)
        known = self._large.get(key)
        if known is not None and known[0]() is array:
            return known[1]
        copy = self._uploaded(array)
        self._large[key] = weakref.ref(array, lambda _: self._large.pop(key, None)), copy
        return copy

    def _of_value(self, array: npt.NDArray[Any]) -> torch.Tensor:
        key = array.shape, array.dtype.str, array.tobytes()
        copy = self._small.get(key)
        if copy is None:
            copy = self._small[key] = self._uploaded(array)
            if len(self._small) > MOST_SMALL:
                self._small.popitem(last=False)
        self._small.move_to_end(key)
        return copy

    def _uploaded(self, array: npt.NDArray[Any]) -> torch.Tensor:
        copy = torch.empty(array.shape, dtype=torch.float32, device=self._device)
        upload(copy, array)
        return copy
