"""Captured work: what a CUDA graph holds is recorded once and replayed, its numbers read from device memory each time.

Two recorders capture. `CudaRecorder` has the driver do it. `TapeRecorder` does the same on CPU tensors: it writes down
every tensor operation that runs, with the very tensors it ran on, and replays that list. Neither sees what Python does
between the operations, and both refuse work that reads a tensor's value on the host; so what replays rightly on the
tape needs nothing of the host on a GPU either. The tape is run in the tests; `CudaRecorder` is not run on a GPU.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ...engines.base import Moving
from ...errors import ArgumentError, FewstepError

Body = Callable[[], None]
_log = logging.getLogger("fewstep.runtime")


class CaptureError(FewstepError):
    """Work that cannot be captured: it reads a value on the host, or takes data from there, while it runs."""


class CapturedGraph(Protocol):
    """Captured work. `bytes` is the memory that it holds for its intermediate results."""

    bytes: int

    def replay(self) -> None:
        """Run it again on what its buffers hold now."""


class Recorder(Protocol):
    """Captures work. Running `body` for that may have side effects: the caller restores what it needs."""

    def capture(self, body: Body) -> CapturedGraph: ...


class TapeRecorder:
    """Records tensor operations on CPU tensors; raises `CaptureError` where a CUDA capture would fail."""

    def capture(self, body: Body) -> CapturedGraph:
        tape = _Tape()
        with torch.no_grad(), tape:
            body()
        return TapeGraph(tape.steps)


class TapeGraph:
    """A list of operations on tensors that stay where they are."""

    def __init__(self, steps: list[_Operation]) -> None:
        self._steps = steps
        storages = {s.data_ptr(): s.nbytes() for o in steps for t in o.outputs for s in [t.untyped_storage()]}
        self.bytes = sum(storages.values())

    def __len__(self) -> int:
        return len(self._steps)

    def replay(self) -> None:
        with torch.no_grad():
            for step in self._steps:
                results = step.function(*step.arguments, **step.options)
                for old, new in zip(step.outputs, _tensors(results), strict=True):
                    if old.data_ptr() != new.data_ptr():  # neither a view nor an operation in place
                        old.copy_(new)


@dataclass(frozen=True, slots=True)
class _Operation:
    function: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    outputs: tuple[torch.Tensor, ...]


class _Tape(TorchDispatchMode):  # type: ignore[misc]
    """Writes down each operation as it is run."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[_Operation] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        reads = torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags
        if func is torch.ops.aten.index.Tensor:  # by numbers its shape is known; by flags it is not
            reads = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if reads or func is torch.ops.aten.lift_fresh.default:
            raise CaptureError(
                f"{func} {'reads a tensor on the host' if reads else 'takes data from the host'} while it is captured",
                expected="operations on device memory alone",
            )
        out = func(*args, **(kwargs or {}))
        self.steps.append(_Operation(func, args, kwargs or {}, tuple(_tensors(out))))
        return out


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors(one)


class CudaRecorder:
    """Captures CUDA graphs on the current stream, after two runs in which libraries choose kernels.

    The graphs of one recorder share a pool of memory for as long as any of them is there. Captures of a device come one
    at a time in a process, and nothing of fewstep synchronises a whole device: another thread's doing so would end a
    capture in every mode (cudaStreamBeginCapture's documentation). A capture that fails is ended, its pool left, and
    the next one gets another.
    """

    WARM_UPS = 2

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: tuple[int, int] | None = None
        self._graphs: weakref.WeakSet[_CudaGraph] = weakref.WeakSet()

    def capture(self, body: Body) -> CapturedGraph:
        stream = torch.cuda.current_stream(self._device)
        if stream == torch.cuda.default_stream(self._device):
            raise CaptureError("the default stream cannot be captured", expected="a stream of one's own")
        with torch.no_grad(), _capturing[self._device.index or 0]:
            for _ in range(self.WARM_UPS):
                body()
            stream.synchronize()
            if self._pool is None or not self._graphs:  # torch gives no pool back to whom it was emptied for
                self._pool = torch.cuda.graph_pool_handle()
            before = torch.cuda.memory_reserved(self._device)
            graph = torch.cuda.CUDAGraph()
            try:
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                body()
                graph.capture_end()
            except BaseException:
                self._abandon(graph)
                raise
            captured = _CudaGraph(graph, max(0, torch.cuda.memory_reserved(self._device) - before))
        self._graphs.add(captured)
        return captured

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """End what is left of a capture: the stream's own, which may throw, and the allocator's, which that leaves."""
        with suppress(RuntimeError):
            graph.capture_end()
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self._device.index or 0, self._pool)
        self._pool = None


_capturing: defaultdict[int, threading.Lock] = defaultdict(threading.Lock)
"""By device: who captures."""


class _CudaGraph:
    def __init__(self, graph: torch.cuda.CUDAGraph, length: int) -> None:
        self._graph, self.bytes = graph, length

    def replay(self) -> None:
        self._graph.replay()


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphKey:
    """What captured work depends on besides the contents of its buffers.

    kind: `"request"` or `"tick"`. shape: (C, h, w). slots, rows, tokens: of one evaluation. evaluations: how many.
    engines: identities of the bindings. extras: what updates do beside the programs' rows. stepped: inputs that have
    factors by step.
    """

    kind: str
    shape: tuple[int, ...]
    slots: int
    rows: int
    tokens: int
    evaluations: int
    engines: tuple[int, ...]
    extras: tuple[bool, ...] = ()
    stepped: tuple[str, ...] = ()


@dataclass(slots=True)
class _Kept:
    graph: CapturedGraph
    owners: tuple[object, ...]
    addresses: tuple[int, ...]
    generations: tuple[int, ...]


class GraphCache:
    """The graphs of one set of slots: the least recently used go when there are more than `most`.

    Counters: `captures`, `replays`, `failures` (captures that failed: that work runs eagerly ever after), `evictions`,
    `invalidations`. Not thread-safe, as the slots are not.
    """

    def __init__(self, recorder: Recorder, *, most: int = 8) -> None:
        if most < 1:
            raise ArgumentError(f"most is {most}", expected="at least 1 graph")
        self._recorder, self._most = recorder, most
        self._kept: OrderedDict[GraphKey, _Kept] = OrderedDict()
        self._failed: dict[GraphKey, str] = {}
        self.captures = self.replays = self.failures = self.evictions = self.invalidations = 0

    @property
    def bytes(self) -> int:
        """Memory that the graphs hold, their buffers apart."""
        return sum(k.graph.bytes for k in self._kept.values())

    def __len__(self) -> int:
        return len(self._kept)

    def run(
        self,
        key: GraphKey,
        body: Body,
        *,
        owners: Sequence[object] = (),
        buffers: Sequence[torch.Tensor] = (),
        restore: Sequence[torch.Tensor] = (),
    ) -> None:
        """Do the work of `body`: by replay where it is captured, else it is captured first.

        owners: the objects whose identities stand in the key; they are kept alive with the graph, and if the weights of
        one were replaced since (`Moving`), it is dropped. buffers: tensors that the work reads or writes; if one has
        moved since, the graph is dropped. restore: tensors that hold state,
        put back to what they held before the capture. Where capture fails, the work is done eagerly, with a warning.
        """
        moving = {id(o): o for o in owners if isinstance(o, Moving)}
        with ExitStack() as uses:
            for _, owner in sorted(moving.items()):  # one order for all threads: see `Turns`
                uses.enter_context(owner.using())
            self._run(key, body, owners, buffers, restore, tuple(o.generation for o in moving.values()))

    def _run(
        self,
        key: GraphKey,
        body: Body,
        owners: Sequence[object],
        buffers: Sequence[torch.Tensor],
        restore: Sequence[torch.Tensor],
        generations: tuple[int, ...],
    ) -> None:
        if key in self._failed:
            body()
            return
        addresses = tuple(t.data_ptr() for t in buffers)
        kept = self._kept.get(key)
        if kept is not None and (kept.addresses, kept.generations) != (addresses, generations):
            self._drop([key])
            kept = None
        if kept is None:
            kept = self._capture(key, body, owners, addresses, generations, restore)
            if kept is None:
                body()
                return
        self._kept.move_to_end(key)
        kept.graph.replay()
        self.replays += 1

    def invalidate(self, owner: object) -> int:
        """Drop every graph that this object (an engine that was reloaded, a binding) is part of; returns how many."""
        gone = [k for k, v in self._kept.items() if any(o is owner for o in v.owners)]
        self._drop(gone)
        return len(gone)

    def clear(self) -> None:
        self._drop(list(self._kept))

    def _drop(self, keys: Sequence[GraphKey]) -> None:
        for key in keys:
            del self._kept[key]
        self.invalidations += len(keys)

    def _capture(
        self,
        key: GraphKey,
        body: Body,
        owners: Sequence[object],
        addresses: tuple[int, ...],
        generations: tuple[int, ...],
        restore: Sequence[torch.Tensor],
    ) -> _Kept | None:
        before = [t.clone() for t in restore]
        try:
            graph = self._recorder.capture(body)
        except (RuntimeError, CaptureError) as error:
            self.failures += 1
            self._failed[key] = str(error)
            _log.warning("a graph could not be captured, and its work runs without: %s", str(error)[:300])
            return None
        finally:
            for tensor, value in zip(restore, before, strict=True):
                tensor.copy_(value)
        self.captures += 1
        kept = self._kept[key] = _Kept(graph, tuple(owners), addresses, generations)
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)
            self.evictions += 1
        return kept
