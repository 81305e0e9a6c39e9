"""Engines of ONNX Runtime: the graph as optimised for this machine, saved once, so that loading it is fast.

The saved graph holds the weights that the optimiser changed (reordered convolutions, folded constants); the others
stay in the bundle's own safetensors, to which it points. Where the changed ones might outgrow a graph file, whose
format ends at 2 GB, all weights go into a file beside it, which ONNX Runtime maps into memory.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ...errors import CancelledError, UnsupportedError
from .. import machine
from ..base import Engine
from ..graph.accounting import FUSED, FUSED_ON_CPU, check_fusion, count_operators
from ..graph.float16 import convert_saved
from ..graph.rewrite import rewrite_for_cpu
from ..options import BuildOptions, RunOptions
from ..profile import profiles_for
from ..registry import BuildJob, OpenJob
from ..weights import check_data, check_graph, check_weights, read_weights
from .openvino import PRECISION_HINTS, OpenVinoEngine, rewrite_for_openvino
from .ort import OrtEngine, engine_stream, import_onnxruntime, open_session

INLINE_BYTES = 1_500_000_000
FUSING = ("extended", "all")
REWRITING = {"ort-cpu": 4, "ort-openvino": 3, "ort-openvino-bf16": 4, "ort-cuda": 1}


class OrtBackend:
    """Builds and loads engines of ONNX Runtime for one provider."""

    suffix = "onnx"
    uses_profiles = False

    def __init__(self, name: str) -> None:
        self.name = name
        self.heeds = () if name in PRECISION_HINTS else ("optimization", "float16")

    def version(self) -> str:
        """The library's, and after `+` the number of our own rewriting, so that an engine of another is built anew."""
        return f"{import_onnxruntime(self.name).__version__}+{REWRITING[self.name]}"

    def target(self, options: BuildOptions | None) -> tuple[str, str]:
        if self.name != "ort-cuda":
            return machine.cpu_identity()
        gpu = machine.gpu()
        return gpu.name, gpu.compute_capability

    def memory(self, job_bytes: int) -> int:
        return 3 * job_bytes + (256 << 20)

    def build(self, job: BuildJob) -> Mapping[str, Any]:
        """Have ONNX Runtime optimise the graph and save it. Raises `CancelledError`, `CorruptError`."""
        if job.options.float16 and self.name != "ort-cuda":
            raise UnsupportedError(
                "half precision on the CPU, where it is slower", remedy="Leave it out, or name --backend ort-cuda."
            )
        if self.name == "ort-cpu" and job.component.dtype == "bfloat16":
            raise UnsupportedError(
                f"{job.name!r} is in bfloat16, for which ONNX Runtime has no kernels on the CPU",
                expected="float32 or float16",
                remedy="Name --backend torch, or export with --dtype fp32: ort-openvino-bf16 computes it in bfloat16.",
            )
        job.progress(job.name, "optimising", 0.0)
        source = check_graph(job.bundle, job.component)
        check_weights(job.bundle, job.component, None)
        if self.name in PRECISION_HINTS:
            return self._write_plain(job, source)
        weights = job.bundle.path(job.component.weights)
        beside = job.options.float16 or weights.stat().st_size > INLINE_BYTES

        def configure(options: Any) -> None:
            options.optimized_model_filepath = str(job.target)
            if beside:
                entry = "session.optimized_model_external_initializers_file_name"
                options.add_session_config_entry(entry, job.data.name)
            watcher = threading.Thread(target=_cancel_load, args=(job.cancel, finished, options), daemon=True)
            watcher.start()

        graph, rewritten = source.read_bytes(), dict[str, int]()
        if self.name == "ort-cpu":
            graph, rewritten = rewrite_for_cpu(graph, profiles_for(job.bundle)[job.name][0].optimum)
        finished = threading.Event()
        try:
            session = open_session(
                graph,
                external_folder=source.parent,
                backend=self.name,
                run=RunOptions(threads=1, spinning="off"),
                optimization=job.options.optimization,
                configure=configure,
            )
        except Exception as error:
            if job.cancel.is_set():
                raise CancelledError(f"the build of {job.name!r} was cancelled") from error
            raise
        finally:
            finished.set()
        if job.cancel.is_set():
            raise CancelledError(f"the build of {job.name!r} was cancelled")
        OrtEngine(session, inputs=job.component.inputs, outputs=job.component.outputs, backend=self.name)
        providers = session.get_providers()
        job.progress(job.name, "optimising", 1.0)
        if job.options.float16:
            del session
            job.progress(job.name, "converting to half precision", 0.0)
            convert_saved(job.target, job.data)
        found = count_operators(job.target.read_bytes())
        return {
            "weights": "beside the graph" if beside else "shared with the bundle",
            "providers": providers,
            "rewritten": rewritten,
            "operators": dict(sorted(found.items())),
            "fused": self._check_fusion(job, found),
        }

    def _check_fusion(self, job: BuildJob, found: Mapping[str, int]) -> dict[str, int]:
        """Raise `MismatchError` when the optimiser lost a fusion, unless it was told not to fuse."""
        stated = job.component.operators
        if self.name == "ort-cuda":
            return check_fusion(job.name, stated, found, strict=True, fused=FUSED)
        strict = job.options.optimization in FUSING and job.component.dtype == "float32"  # no kernels for the others
        return check_fusion(job.name, stated, found, strict=strict, fused=FUSED_ON_CPU)

    def _write_plain(self, job: BuildJob, source: Path) -> Mapping[str, Any]:
        """The graph as OpenVINO reads it, pointing at the bundle's weights: it compiles when it is opened."""
        graph = rewrite_for_openvino(source.read_bytes(), keep_angles=PRECISION_HINTS[self.name] != "f32")
        job.target.write_bytes(graph)
        return {"weights": "shared with the bundle", "operators": dict(sorted(count_operators(graph).items()))}

    def open(self, job: OpenJob) -> Engine:
        """Load a saved graph with the weights it points to; nothing is optimised again."""
        external, folder = None, None
        if job.entry.data is not None:
            folder = check_data(job.entry, job.store).parent
        elif (weights := read_weights(job.bundle, job.component)) is not None:
            external = {job.component.weights: weights}
        else:
            folder = check_weights(job.bundle, job.component, job.store).parent
        stream = engine_stream(self.name, job.run)
        if self.name in PRECISION_HINTS:
            open_for = partial(self._compile, bytes(job.data), run=job.run, external=external, external_folder=folder)
            specs = job.component.inputs, job.component.outputs
            return OpenVinoEngine(open_for, inputs=specs[0], outputs=specs[1], backend=self.name)
        session = open_session(
            bytes(job.data),
            backend=self.name,
            run=job.run,
            optimization="disabled",
            external=external,
            external_folder=folder,
            stream=None if stream is None else stream.cuda_stream,
        )
        return OrtEngine(
            session,
            inputs=job.component.inputs,
            outputs=job.component.outputs,
            backend=self.name,
            run=job.run,
            stream=stream,
        )

    def _compile(self, graph: bytes, dims: Mapping[str, int], **given: Any) -> Any:
        return open_session(graph, backend=self.name, optimization="disabled", dims=dims, **given)


def _cancel_load(cancel: threading.Event, finished: threading.Event, options: Any) -> None:
    """Tell ONNX Runtime to give up when the caller cancels; ends with the build."""
    while not finished.wait(0.05):
        if cancel.is_set():
            options.set_load_cancellation_flag(True)
            return


def backend(name: str) -> OrtBackend:
    return OrtBackend(name)
