"""A stand-in for CUDA below torch, for tests: CPU tensors where the code asks for `"cuda"`, and the driver's refusals.

Work is done at once, so nothing of timing or of a missing wait is seen here. What is seen is everything that the driver
and torch's allocator refuse:

- 32 streams a device, handed out in turn, the 33rd being the first again (c10/cuda/CUDAStream.h);
- one capture at a time on a stream, and never on the default one; an event, a stream or the device that is synchronised
  during it ends it (cudaStreamBeginCapture), the device from whichever thread;
- `capture_end` of a capture that was ended so throws before the allocator stops recording to the pool
  (CUDAGraph.cpp, CUDACachingAllocator.cpp): the pool cannot be captured to until somebody ends that too;
- a pool whose last graph is gone is gone.

A captured graph replays the tensor operations that ran, on the tensors that they ran on.
"""

from __future__ import annotations

import importlib.util
import itertools
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fewstep.runtime.device.cuda_graphs import TapeGraph, _Tape
from torch.overrides import TorchFunctionMode

STREAMS = 32


class Driver:
    """What the device knows: captures in progress, pools being recorded to, and counts of what was called."""

    def __init__(self) -> None:
        self.captures: dict[int, StandInGraph] = {}
        self.recording: set[tuple[int, int]] = set()
        self.pools: dict[tuple[int, int], weakref.WeakSet[StandInGraph]] = {}
        self.spent_pools: set[tuple[int, int]] = set()
        self.handles = itertools.count(1)
        self.streams = itertools.count()
        self.device_synchronisations = self.stream_synchronisations = self.launches = self.captured = 0
        self.current = threading.local()
        self.default = StandInStream(self, 0)

    def stream(self) -> StandInStream:
        return getattr(self.current, "stream", self.default)

    def capturing(self) -> StandInGraph | None:
        """The capture in progress on this thread's stream."""
        return self.captures.get(self.stream().cuda_stream)

    def synchronise_device(self) -> None:
        self.device_synchronisations += 1
        if self.captures:
            for graph in self.captures.values():
                graph.invalid = True
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing (900)")

    def synchronise_stream(self, stream: StandInStream) -> None:
        self.stream_synchronisations += 1
        graph = self.captures.get(stream.cuda_stream)
        if graph is not None:
            graph.invalid = True
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing (900)")


class StandInStream:
    def __init__(self, driver: Driver, handle: int) -> None:
        self._driver, self.cuda_stream, self.device = driver, handle, torch.device("cpu")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StandInStream) and other.cuda_stream == self.cuda_stream

    def __hash__(self) -> int:
        return hash(self.cuda_stream)

    def synchronize(self) -> None:
        self._driver.synchronise_stream(self)

    def wait_stream(self, other: StandInStream) -> None: ...


class StandInEvent:
    def __init__(self, driver: Driver, *, enable_timing: bool = False, blocking: bool = False) -> None:
        self._driver, self._at = driver, 0.0

    def record(self, stream: StandInStream | None = None) -> None:
        self._stream, self._at = stream or self._driver.stream(), time.perf_counter()

    def synchronize(self) -> None:
        self._driver.synchronise_stream(self._stream)

    def elapsed_time(self, other: StandInEvent) -> float:
        return 1e3 * (other._at - self._at)


class StandInGraph:
    """`torch.cuda.CUDAGraph` by a list of tensor operations."""

    def __init__(self, driver: Driver) -> None:
        self._driver, self.invalid = driver, False
        self._graph: TapeGraph | None = None
        self._tape: _Tape | None = None
        self._handle = 0

    def capture_begin(self, pool: tuple[int, int] | None = None, capture_error_mode: str = "global") -> None:
        stream, driver = self._driver.stream(), self._driver
        if stream.cuda_stream == 0:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        if stream.cuda_stream in driver.captures:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing (900)")
        if pool in driver.recording:
            raise RuntimeError(f"beginAllocateToPool: already recording to mempool_id {pool}")
        if pool in driver.spent_pools:
            raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED at CUDACachingAllocator.cpp")
        assert pool is not None
        self._pool, self._handle = pool, stream.cuda_stream
        driver.recording.add(pool)
        driver.captures[stream.cuda_stream] = self
        self._tape = _Tape()
        self._tape.__enter__()

    def capture_end(self) -> None:
        driver = self._driver
        if driver.captures.pop(self._handle, None) is not self or self._tape is None:
            raise RuntimeError("CUDA error: the stream is not capturing (901)")
        self._tape.__exit__(None, None, None)
        steps, self._tape = self._tape.steps, None
        if self.invalid:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture (901)")
        self._graph = TapeGraph(steps)
        driver.recording.discard(self._pool)
        driver.captured += 1
        driver.pools.setdefault(self._pool, weakref.WeakSet()).add(self)
        weakref.finalize(self, _spend, driver, self._pool)

    def replay(self) -> None:
        if self._graph is None:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        if self._driver.capturing() is not None:
            raise RuntimeError("CUDA error: a graph is launched into a capture")
        self._driver.launches += 1
        self._graph.replay()


def _spend(driver: Driver, pool: tuple[int, int]) -> None:
    if not driver.pools[pool]:
        driver.spent_pools.add(pool)


class _OnCpu(TorchFunctionMode):
    """Puts on the CPU what is asked for on CUDA."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.device:
            return function(*args, **(kwargs or {}))
        given = {k: torch.device("cpu") if k == "device" and _is_cuda(v) else v for k, v in (kwargs or {}).items()}
        return function(*(torch.device("cpu") if _is_cuda(a) else a for a in args), **given)


def _is_cuda(value: object) -> bool:
    return (isinstance(value, torch.device) and value.type == "cuda") or (
        isinstance(value, str) and value.partition(":")[0] == "cuda"
    )


@contextmanager
def stand_in_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """`torch.cuda` as of a machine with one GPU, for as long as the block lasts."""
    driver = Driver()

    @contextmanager
    def on_stream(stream: StandInStream | None) -> Iterator[None]:
        before = driver.stream()
        driver.current.stream = stream or before
        try:
            yield
        finally:
            driver.current.stream = before

    @contextmanager
    def on_device(_: object) -> Iterator[None]:
        yield

    def end_allocate(_: int, pool: tuple[int, int]) -> None:
        if pool not in driver.recording:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        driver.recording.discard(pool)

    class Stream(StandInStream):
        def __init__(self, device: object = None) -> None:
            super().__init__(driver, 1000 + next(driver.streams) % STREAMS)

    class ExternalStream(StandInStream):
        def __init__(self, handle: int, device: object = None) -> None:
            super().__init__(driver, handle)

    class Event(StandInEvent):
        def __init__(self, **options: bool) -> None:
            super().__init__(driver, **options)

    class CUDAGraph(StandInGraph):
        def __init__(self) -> None:
            super().__init__(driver)

    replaced: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "Stream": Stream,
        "ExternalStream": ExternalStream,
        "current_stream": lambda device=None: driver.stream(),
        "default_stream": lambda device=None: driver.default,
        "stream": on_stream,
        "device": on_device,
        "Event": Event,
        "is_current_stream_capturing": lambda: driver.capturing() is not None,
        "synchronize": lambda device=None: driver.synchronise_device(),
        "CUDAGraph": CUDAGraph,
        "graph_pool_handle": lambda: (0, next(driver.handles)),
        "memory_reserved": lambda device=None: 0,
        "mem_get_info": lambda device=None: (8 << 30, 16 << 30),
    }
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end_allocate, raising=False)
    if importlib.util.find_spec("triton") is not None:
        from triton.runtime.interpreter import GridExecutor

        launch, interpreting = GridExecutor.__call__, threading.Lock()

        def launch_alone(executor: Any, *arguments: Any, **options: Any) -> None:
            with interpreting:  # the interpreter keeps the kernel in progress in a global
                launch(executor, *arguments, **options)

        monkeypatch.setattr(GridExecutor, "__call__", launch_alone)
    run = threading.Thread.run

    def run_here(thread: threading.Thread) -> None:
        with _OnCpu():
            run(thread)

    monkeypatch.setattr(threading.Thread, "run", run_here)  # a mode holds for the thread that enters it
    with _OnCpu():
        yield driver
