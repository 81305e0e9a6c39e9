"""The torch device: a GPU, or CPU tensors with the same code, there to be compared with the NumPy device.

It is run on CPU tensors in the tests, not on a GPU.
"""

from __future__ import annotations

import dataclasses
import threading
from contextlib import AbstractContextManager

import torch

from ...engines import Engine, RunOptions
from ...engines.machine import available_memory
from ...errors import ArgumentError, MissingError
from ..arrays import Shape
from .base import MOST_ROWS, Slots
from .cuda_graphs import CudaRecorder, GraphCache, TapeRecorder
from .host_engine import HostEngine, HostLane
from .memory import guard_memory
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
        self._lane: HostLane | None = None
        self._lock = threading.Lock()

    def run_options(self, run: RunOptions) -> RunOptions:
        return dataclasses.replace(run, device=self.place.index or 0, torch_device=self.place.type)

    def on_host(self, engine: Engine) -> Engine:
        if engine.device == "cpu":
            return engine
        with self._lock:
            if self._lane is None:
                self._lane = HostLane(self.place, records=self.records)
        return HostEngine(engine, self._lane)

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
            remedy="Use device='cpu' on this machine, or --backend ort-cpu." if not count else "Use a smaller index.",
        )
    return torch.device("cuda", int(index or 0))
