"""Engines on a device that code on the host feeds: text encoders, and a VAE beside whole requests.

What goes there and what comes back is part of the work, through pinned memory, so that it can be recorded: an encoder
of 44 layers is 600 launches, and one when it is replayed.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch

from ...engines import Binding, Engine, TensorSpec
from ...engines.streams import take_stream
from ...errors import ArgumentError
from .cuda_graphs import CudaRecorder, GraphCache, GraphKey, Recorder, TapeRecorder
from .memory import as_tensor, fetch, guard_memory, on_host, send


class HostLane:
    """The stream of a device on which the host's engines run, one at a time, and who records there (`None`: nobody)."""

    def __init__(self, place: torch.device, *, records: bool) -> None:
        self.place, self.lock = place, threading.Lock()
        self._stream = take_stream(torch, place.index or 0) if place.type == "cuda" else None
        self.recorder: Recorder | None = None
        if records:
            self.recorder = CudaRecorder(place) if place.type == "cuda" else TapeRecorder()

    def here(self) -> Any:
        """On the lane's stream."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()


class HostEngine:
    """An engine on a device whose bindings have NumPy buffers: copied there before a run, and back after it."""

    device, capture = "cpu", "none"

    def __init__(self, engine: Engine, lane: HostLane) -> None:
        self._engine, self._lane, self.backend = engine, lane, engine.backend
        self.inputs: Mapping[str, TensorSpec] = engine.inputs
        self.outputs: Mapping[str, TensorSpec] = engine.outputs
        self.profiles = getattr(engine, "profiles", ())

    def bind(self, dims: Mapping[str, int]) -> HostBinding:
        with self._lane.here():
            return HostBinding(self._engine, self._engine.bind(dims), self._lane)


class HostBinding:
    """NumPy buffers in front of a binding's own. `enqueue` returns when the outputs are there.

    Where the engine admits it, what is done a second time is recorded then, and replayed from there on.
    """

    def __init__(self, engine: Engine, binding: Binding, lane: HostLane) -> None:
        self._engine, self._binding, self._lane, self._runs = engine, binding, lane, 0
        recorder = lane.recorder if engine.capture == "whole_request" else None
        self._graphs = None if recorder is None else GraphCache(recorder, most=1)
        self._key = GraphKey(
            kind="host", shape=(), slots=0, rows=0, tokens=0, evaluations=1, engines=(id(engine), id(binding))
        )
        given = {n: as_tensor(b) for n, b in binding.inputs.items()}
        made = {n: as_tensor(b) for n, b in binding.outputs.items()}
        self._given = [(on_host(t), t) for t in given.values()]
        self._made = [(on_host(t), t) for t in made.values()]
        self.inputs: Mapping[str, Any] = {n: h.numpy() for n, (h, _) in zip(given, self._given, strict=True)}
        self.outputs: Mapping[str, Any] = {n: h.numpy() for n, (h, _) in zip(made, self._made, strict=True)}

    def enqueue(self, stream: int | None = None) -> None:
        if stream is not None:
            raise ArgumentError("a CUDA stream was given to an engine that the host feeds", expected="no stream")
        lane = self._lane
        with lane.lock, torch.no_grad(), lane.here(), guard_memory(lane.place, "an engine that the host feeds"):
            self._runs += 1
            if self._graphs is None or self._runs == 1:
                self._work()
            else:
                self._graphs.run(self._key, self._work, owners=(self._engine, self._binding))
            lane.wait()

    def _work(self) -> None:
        for host, device in self._given:
            send(device, host)
        self._binding.enqueue()
        for host, device in self._made:
            fetch(host, device)
