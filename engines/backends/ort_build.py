"""Engines of ONNX Runtime: the graph as optimised for this machine, saved once, so that loading it is fast.

The saved graph holds the weights that the optimiser changed (reordered convolutions, folded constants); the others
stay in the bundle's own safetensors, to which it points. Where the changed ones might outgrow a graph file, whose
format ends at 2 GB, all weights go into a file beside it, which ONNX Runtime maps into memory.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ...errors import CancelledError, CorruptError, FewstepError
from ...places import why_not_written, write_error
from ...weights.stored import as_array, open_tensors
from .. import machine
from ..base import Engine
from ..graph.accounting import Forms, check_fusion, count_operators
from ..graph.float16 import convert_saved
from ..graph.rewrite import SHARED_NORMS
from ..graph.weights_apart import take_weights_apart
from ..options import BuildOptions, RunOptions
from ..store import ROOM_REMEDY
from ..weights import check_data, check_weights, checked_graph, read_weights, source_bytes
from .ort import OrtEngine, Provider, import_onnxruntime, leave_pairs, open_session
from .registry import Backend, BuildJob, OpenJob

INLINE_BYTES = 1_500_000_000
LARGE_BYTES = 1 << 20
"""Tensors from this size on lie outside of the graph while weights are taken out of it."""


class OrtBackend(Backend):
    """Builds and loads engines of ONNX Runtime for one provider; what providers differ in, its subclasses say.

    rewriting: the number of our own rewriting of graphs, so that an engine of another is built anew.
    """

    suffix = "onnx"
    heeds: tuple[str, ...] = ("optimization", "float16")
    provider: Provider
    rewriting: int

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.provider.backend

    def version(self) -> str:
        """The library's, and after `+` that of the rewriting."""
        return f"{import_onnxruntime(self.provider).__version__}+{self.rewriting}"

    def available(self) -> bool:
        return self.provider.available

    def target(self, options: BuildOptions | None) -> tuple[str, str]:
        return machine.cpu_identity()

    def memory(self, job_bytes: int) -> int:
        return 3 * job_bytes + (256 << 20)

    def build(self, job: BuildJob) -> Mapping[str, Any]:
        """Have ONNX Runtime optimise the graph and save it. Raises `CancelledError`, `CorruptError`."""
        self.check(job)
        job.progress(job.name, "optimising", 0.0)
        source = checked_graph(job.bundle, job.component)
        check_weights(job.bundle, job.component, None)
        weights = job.bundle.path(job.component.weights)
        beside = job.options.float16 or weights.stat().st_size > INLINE_BYTES

        def configure(options: Any) -> None:
            options.optimized_model_filepath = str(job.target)
            if job.component.dtype == "fp8":
                leave_pairs(options)
            if beside:
                entry = "session.optimized_model_external_initializers_file_name"
                options.add_session_config_entry(entry, job.data.name)
                if job.options.refittable:  # what is small stays in the graph, constants among it
                    entry = "session.optimized_model_external_initializers_min_size_in_bytes"
                    options.add_session_config_entry(entry, str(LARGE_BYTES))
            watcher = threading.Thread(target=_cancel_load, args=(job.cancel, finished, options), daemon=True)
            watcher.start()

        graph, rewritten = self.rewrite(source, job)
        finished = threading.Event()
        try:
            session = open_session(
                graph,
                external_folder=weights.parent,
                provider=self.provider,
                run=RunOptions(threads=1, spinning="off"),
                optimization=job.options.optimization,
                configure=configure,
            )
        except Exception as error:
            if job.cancel.is_set():
                raise CancelledError(f"the build of {job.name!r} was cancelled") from error
            if isinstance(error, CorruptError) and self._loads(graph, weights.parent, job):
                self._blame_the_disk(job, error)
            raise
        finally:
            finished.set()
        if job.cancel.is_set():
            raise CancelledError(f"the build of {job.name!r} was cancelled")
        OrtEngine(session, inputs=job.component.inputs, outputs=job.component.outputs, provider=self.provider)
        providers = session.get_providers()
        job.progress(job.name, "optimising", 1.0)
        if job.options.float16:
            del session
            job.progress(job.name, "converting to half precision", 0.0)
            convert_saved(job.target, job.data)
        if job.options.refittable:
            job.progress(job.name, "taking weights apart", 0.0)
            self._take_weights_apart(job, graph)
        operators, (fused, strict) = count_operators(job.target.read_bytes()), self.fusion(job)
        stated = Counter(job.component.operators)
        stated["GroupNormalization"] -= rewritten.get(SHARED_NORMS, 0)
        return {
            "weights": "beside the graph" if job.data.exists() else "shared with the bundle",
            "providers": providers,
            "rewritten": rewritten,
            "operators": dict(sorted(operators.items())),
            "copies": sum(n for name, n in operators.items() if name.startswith("Memcpy")),
            "fused": check_fusion(job.name, stated, operators, strict=strict, fused=fused),
        }

    def _take_weights_apart(self, job: BuildJob, graph: bytes) -> None:
        """Leave in the engine's file no weights, but inputs for them."""
        place = job.bundle.path(job.component.weights)
        files = {job.component.weights: place, job.data.name: job.data}
        weights = {name: as_array(tensor) for name, tensor in open_tensors([place]).items() if tensor.dtype == "F32"}
        engine = take_weights_apart(job.target.read_bytes(), files, graph, weights)
        job.target.write_bytes(engine)
        job.data.unlink(missing_ok=True)

    def _loads(self, graph: bytes, folder: Path, job: BuildJob) -> bool:
        """Whether ONNX Runtime takes the graph where it is not to save it; its errors do not tell the two apart."""
        once, level = RunOptions(threads=1, spinning="off"), job.options.optimization
        try:
            open_session(graph, external_folder=folder, provider=self.provider, run=once, optimization=level)
        except FewstepError:
            return False
        return True

    def _blame_the_disk(self, job: BuildJob, error: CorruptError) -> None:
        """Raise `WriteError` where the system refuses to write what an engine takes."""
        folder, needed = job.target.parent, source_bytes(job.bundle, job.component)
        number = why_not_written(folder, 2 * needed)  # what was saved is folded and reordered too
        if number is not None:
            what = f"the engine of {job.name!r}"
            raise write_error(number, what, folder, needed=needed, remedy=ROOM_REMEDY) from error

    def open(self, job: OpenJob) -> Engine:
        """Load a saved graph with the weights it points to; nothing is optimised again."""
        external, folder = None, None
        if job.entry.data is not None:
            folder = check_data(job.entry, job.store).parent
        elif (weights := read_weights(job.bundle, job.component)) is not None:
            external = {job.component.weights: weights}
        else:
            folder = check_weights(job.bundle, job.component, job.store).parent
        load = partial(
            open_session,
            bytes(job.data),
            provider=self.provider,
            run=job.run,
            optimization="disabled",
            external=external,
            external_folder=folder,
        )
        return self.load(job, load)

    def check(self, job: BuildJob) -> None:
        """Refuse what this provider has no kernels for."""

    def rewrite(self, graph: bytes, job: BuildJob) -> tuple[bytes, dict[str, int]]:
        """The graph as ONNX Runtime is to optimise it, and how often each rewriting was done."""
        return graph, {}

    @abstractmethod
    def fusion(self, job: BuildJob) -> tuple[Forms, bool]:
        """The fused operators to look for, and whether a lost one is an error."""

    @abstractmethod
    def load(self, job: OpenJob, open_with: Callable[..., Any]) -> Engine:
        """The engine on a session that `open_with` opens, given further options of `open_session`."""


def _cancel_load(cancel: threading.Event, finished: threading.Event, options: Any) -> None:
    """Tell ONNX Runtime to give up when the caller cancels; ends with the build."""
    while not finished.wait(0.05):
        if cancel.is_set():
            options.set_load_cancellation_flag(True)
            return
