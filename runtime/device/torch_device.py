"""The torch device: a GPU, or CPU tensors with the same code, there to be compared with the NumPy device.

It is run on CPU tensors in the tests, not on a GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from ...engines import Binding, Engine, RunOptions, TensorSpec
from ...engines.machine import available_memory
from ...errors import ArgumentError, MissingError
from ..arrays import Shape
from .base import MOST_ROWS, Slots
from .cuda_graphs import CudaRecorder, GraphCache, TapeRecorder
from .memory import as_tensor, guard_memory
from .torch_slots import TorchSlots

CPU_TENSORS = "cpu:torch"


class TorchDevice:
    """A device of torch: `"cuda"`, `"cuda:1"`, or `"cpu:torch"` for CPU tensors.

    graphs: whether work is captured (`None`: on CUDA); graphs_kept: recordings a set of slots. most_rows: rows of one
    evaluation; requests of more are done in ticks of several. Raises `ArgumentError` for another name and
    `MissingError` for a device that is not there.
    """

    whole_requests = True

    def __init__(
        self, name: str, *, graphs: bool | None = None, graphs_kept: int = 8, most_rows: int = MOST_ROWS
    ) -> None:
        self.name, self.place = name, _find_device(name)
        self.engines = self.place.type
        self.records = self.place.type == "cuda" if graphs is None else graphs
        self._graphs_kept, self._most_rows = graphs_kept, most_rows

    def run_options(self, run: RunOptions) -> RunOptions:
        return dataclasses.replace(run, device=self.place.index or 0, torch_device=self.place.type)

    def on_host(self, engine: Engine) -> Engine:
        return engine if engine.device == "cpu" else HostEngine(engine)

    def make_slots(self, engine: Engine, shape: Shape, count: int) -> Slots:
        graphs = None
        if self.records and engine.capture == "whole_request":
            recorder = CudaRecorder(self.place) if self.place.type == "cuda" else TapeRecorder()
            graphs = GraphCache(recorder, most=self._graphs_kept)
        return TorchSlots(engine, slots=count, shape=shape, device=self.place, most_rows=self._most_rows, graphs=graphs)

    def guard_memory(self, doing: str) -> AbstractContextManager[None]:
        return guard_memory(self.place, doing)

    def free_bytes(self) -> int | None:
        return int(torch.cuda.mem_get_info(self.place)[0]) if self.place.type == "cuda" else available_memory()


def _find_device(name: str) -> torch.device:
    if name == CPU_TENSORS:
        return torch.device("cpu")
    kind, _, index = name.partition(":")
    if kind != "cuda" or (index and not index.isdigit()):
        raise ArgumentError(f"device is {name!r}", expected=f"cpu, cuda, cuda:<index> or {CPU_TENSORS}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= count:
        raise MissingError(
            f"torch sees {count or 'no'} CUDA device{'' if count == 1 else 's'}",
            expected=f"one for {name!r}",
            remedy="Use device='cpu' on this machine." if not count else "Use a smaller index.",
        )
    return torch.device("cuda", int(index or 0))


class HostEngine:
    """An engine on a device whose bindings have NumPy buffers: copied there before a run, and back after it."""

    device, capture = "cpu", "none"

    def __init__(self, engine: Engine) -> None:
        self._engine, self.backend = engine, engine.backend
        self.inputs: Mapping[str, TensorSpec] = engine.inputs
        self.outputs: Mapping[str, TensorSpec] = engine.outputs

    def bind(self, dims: Mapping[str, int]) -> HostBinding:
        return HostBinding(self._engine.bind(dims))


class HostBinding:
    """NumPy buffers in front of a binding's own. `enqueue` returns when the outputs are there."""

    def __init__(self, binding: Binding) -> None:
        self._binding = binding
        self._device_inputs = {n: as_tensor(b) for n, b in binding.inputs.items()}
        self._device_outputs = {n: as_tensor(b) for n, b in binding.outputs.items()}
        self.inputs: Mapping[str, Any] = {n: t.cpu().numpy().copy() for n, t in self._device_inputs.items()}
        self.outputs: Mapping[str, Any] = {n: t.cpu().numpy().copy() for n, t in self._device_outputs.items()}

    def enqueue(self, stream: int | None = None) -> None:
        for name, tensor in self._device_inputs.items():
            tensor.copy_(torch.from_numpy(self.inputs[name]))
        self._binding.enqueue(stream)
        for name, tensor in self._device_outputs.items():
            np.copyto(self.outputs[name], tensor.cpu().numpy())
