"""Weights of TensorRT's engines, set where they lie: which can be, from where, and who waits for it.

The ONNX parser gives a network's weights the names of the graph's initialisers (`INetworkDefinition.set_weights_name`),
and the engine asks for them by these. A refittable engine is built with `REFIT_INDIVIDUAL`, so that the weights of the
bundle's file can be replaced and the graph's own constants, on which kernels are chosen, cannot. One that is stripped
alone is built with `REFIT_IDENTICAL`: it takes the weights that it was built with, and no others.

Nothing is said in TensorRT's documentation of CUDA graphs that were captured before a refit: they are recorded anew.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...errors import FewstepError, MismatchError, UnsupportedError
from ...weights.stored import open_tensors
from ..graph.onnx_bytes import BFLOAT16, FLOAT, FLOAT16, OnnxGraph, read_graph
from ..options import BuildOptions
from ..streams import take_stream
from ..turns import Turns
from ..weights import check_weights, checked_graph
from .registry import OpenJob
from .tensorrt import TensorRTEngine, errors_said, logger

if TYPE_CHECKING:
    import tensorrt_rtx as trt

_TYPES = {FLOAT: ("FLOAT", "float32"), FLOAT16: ("HALF", "float16"), BFLOAT16: ("BF16", "uint16")}
"""By TensorProto.DataType: TensorRT's name, and NumPy's type (of bfloat16 its bits)."""
_REBUILD = "Rebuild it with: fewstep build BUNDLE --force"
_SHOWN = 8


def set_refit_flags(module: Any, config: trt.IBuilderConfig, options: BuildOptions) -> None:
    flags = module.BuilderFlag
    if options.stripped:
        config.set_flag(flags.STRIP_PLAN)
    if options.refittable:
        config.set_flag(flags.REFIT_INDIVIDUAL)
    elif options.stripped:
        config.set_flag(flags.REFIT_IDENTICAL)


def mark_refittable(network: trt.INetworkDefinition, graph: bytes, weights: Path) -> list[str]:
    """Make every weight of the file that the graph reads replaceable; returns their names.

    Raises `UnsupportedError` for those that the parser folded into others: they could never be replaced.
    """
    names = list(_weights_of(read_graph(graph), weights))
    lost = [n for n in names if not network.mark_weights_refittable(n)]
    if lost:
        raise UnsupportedError(
            f"the parser has no weights of the names {_some(lost)}",
            expected="every weight of the graph, by its name",
            remedy="Build it without --refittable.",
        )
    return names


def _weights_of(graph: OnnxGraph, weights: Path) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shape and element type of each floating initialiser whose values are in the weights file, by name."""
    stored = open_tensors([weights])
    return {n: (s, graph.types[n]) for n, s in graph.constants.items() if n in stored and graph.types[n] in _TYPES}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


class StrippedEngine(TensorRTEngine):
    """An engine whose file holds no weights: `fill` gives it those that it was built with."""

    def fill(self, job: OpenJob) -> None:
        """Have the library's own parser read the bundle's weights, and set what it made of them.

        Raises `CorruptError` for weights that are not the manifest's, `MismatchError` for those that are missing.
        """
        graph = checked_graph(job.bundle, job.component)
        weights = check_weights(job.bundle, job.component, job.store)
        refitter = self._refitter()
        parser: trt.OnnxParserRefitter = self._trt.OnnxParserRefitter(refitter, logger(self.backend))
        if not parser.refit_from_bytes(graph, str(weights.with_name(job.component.graph))):
            said = "; ".join(" ".join(parser.get_error(i).desc().split())[:300] for i in range(parser.num_errors))
            raise MismatchError(
                f"the graph does not fill the engine: {said or errors_said() or 'the library gave no reason'}",
                expected="every weight of the engine in its graph",
                remedy=_REBUILD,
            )
        self._check_complete(refitter)
        self._refit(refitter)

    def _refitter(self) -> trt.Refitter:
        try:
            refitter: trt.Refitter = self._trt.Refitter(self._engine, logger(self.backend))
        except TypeError as error:  # the binding's word for a null pointer
            raise MismatchError(
                f"the engine cannot be refitted: {errors_said() or 'the library gave no reason'}",
                expected="an engine that was built refittable or stripped, as its manifest says",
                remedy=_REBUILD,
            ) from error
        return refitter

    def _check_complete(self, refitter: trt.Refitter) -> None:
        missing = refitter.get_missing_weights()
        if missing:
            raise MismatchError(
                f"the engine lacks the weights {_some([n or 'one without a name' for n in missing])}",
                expected="every weight of its graph in the bundle's file",
                remedy=_REBUILD,
            )

    def _refit(self, refitter: trt.Refitter) -> None:
        """Put in place what was set, and wait until it is there."""
        device = self._run.device
        with self._torch.cuda.device(device):
            stream = take_stream(self._torch, device)
            done = refitter.refit_cuda_engine_async(stream.cuda_stream)
            stream.synchronize()
        if not done:
            raise FewstepError(f"TensorRT could not refit the engine: {errors_said() or 'it gave no reason'}")


class RefittableEngine(StrippedEngine):
    """An engine whose weights can be replaced (`Swappable`).

    A replacement waits until all work that its bindings enqueued is done, and work for the replacement. One that the
    library breaks off leaves an engine that computes nothing, and says so, until weights are loaded into it again.
    """

    def adopt(self, job: OpenJob, *, stripped: bool) -> None:
        """Learn the graph's weights, and fill a stripped engine with the bundle's own.

        Raises `MismatchError` when the engine's replaceable weights are not the graph's, `CorruptError` for weights
        that are not the manifest's.
        """
        graph = read_graph(checked_graph(job.bundle, job.component))
        path = check_weights(job.bundle, job.component, job.store)
        self._constants = {n: (s, graph.types[n]) for n, s in graph.constants.items()}
        self._own = _weights_of(graph, path)
        self._turns, self._broken, self._generation = Turns(), "", 0
        self._pending: dict[int, Any] = {}
        self._pending_lock, self._loading = threading.Lock(), threading.Lock()
        self._digest = job.component.weights_sha256
        found = set(self._refitter().get_all_weights())
        if found != set(self._own):
            fixed, unknown = sorted(set(self._own) - found), sorted(found - set(self._own))
            raise MismatchError(
                f"the engine's weights {_some(fixed or unknown)} {'cannot be replaced' if fixed else 'are unknown'}",
                expected="the weights of its graph, each by its name",
                remedy=_REBUILD,
            )
        if stripped:
            stored = open_tensors([path])
            self._replace(
                {n: stored[n].data.view(_TYPES[e][1]).reshape(s) for n, (s, e) in self._own.items()}, self._digest
            )

    @property
    def loaded(self) -> str:
        """Hex digest of the weights that it holds; `""` after a replacement that was broken off."""
        return self._digest

    @property
    def generation(self) -> int:
        return self._generation

    def load_weights(self, weights: Mapping[str, NDArray[Any]], digest: str) -> None:
        """See `Swappable`; weights of bfloat16 are their bits, uint16. All of them are in memory at once."""
        with self._loading:
            self._replace(self._checked(weights), digest)

    @contextmanager
    def using(self) -> Iterator[None]:
        with self._turns.using() as outermost:
            if self._broken:
                raise FewstepError(
                    f"the engine holds weights of two kinds: {self._broken}",
                    expected="a replacement of weights that succeeded",
                    remedy="Load its weights again, or open it anew.",
                )
            try:
                yield
            finally:
                if outermost:
                    self._note()

    def _note(self) -> None:
        """Keep the end of what this thread's stream was given, for a replacement to wait for; none in a capture."""
        cuda = self._torch.cuda
        if cuda.is_current_stream_capturing():
            return
        stream = cuda.current_stream(self._run.device)
        with self._pending_lock:
            event = self._pending.setdefault(int(stream.cuda_stream), cuda.Event())
            event.record(stream)

    def _checked(self, weights: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        unknown, absent = sorted(set(weights) - set(self._constants)), sorted(set(self._own) - set(weights))
        if unknown or absent:
            raise MismatchError(
                f"the weights {'lack' if absent else 'have'} {_some(absent or unknown)}",
                expected="the names of the component's own graph",
            )
        arrays = {}
        for name, (shape, element) in self._own.items():
            array = np.asarray(weights[name])
            if array.shape != shape or array.dtype != _TYPES[element][1]:
                raise MismatchError(
                    f"the weight {name!r} is {array.dtype} {list(array.shape)}",
                    expected=f"{_TYPES[element][1]} {list(shape)}",
                )
            arrays[name] = np.ascontiguousarray(array)
        return arrays

    def _replace(self, arrays: Mapping[str, NDArray[Any]], digest: str) -> None:
        """Put weights in place of the engine's; `arrays` are read until this returns."""
        refitter = self._refitter()
        for name, array in arrays.items():
            element = getattr(self._trt.DataType, _TYPES[self._own[name][1]][0])
            if not refitter.set_named_weights(name, self._trt.Weights(element, array.ctypes.data, array.size)):
                raise MismatchError(
                    f"TensorRT refuses the weight {name!r}: {errors_said() or 'it gave no reason'}",
                    expected=f"{refitter.get_weights_prototype(name).size} elements",
                    remedy=_REBUILD,
                )
        self._check_complete(refitter)
        with self._turns.changing():
            with self._pending_lock:
                pending = list(self._pending.values())
            for event in pending:
                event.synchronize()
            self._generation += 1
            self._digest, self._broken = "", "a replacement was broken off"
            self._refit(refitter)
            self._digest, self._broken = digest, ""
