"""OpenVINO as a provider of ONNX Runtime: its options, graphs in operators that it takes, and its engine.

The wheel `onnxruntime-openvino` takes the place of `onnxruntime` and runs on any x86-64 processor. The newer plugin
wheel (`onnxruntime-ep-openvino`) offers its CPU device on Intel's processors alone (microsoft/onnxruntime#31981).
OpenVINO compiles a graph whenever a session is made; what it compiles is not kept, since the store deserialises only
what it has hashed.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...errors import UnsupportedError
from ..base import Binding, Engine, TensorSpec
from ..graph.accounting import Forms, count_operators
from ..options import RunOptions
from ..profile import check_dims, dimension_names
from ..weights import check_weights, checked_graph
from .ort import OrtBinding, Provider, check_tensors, import_onnxruntime
from .ort_build import OrtBackend
from .ort_cpu import refuse_float16
from .registry import BuildJob, OpenJob, register

EXACT_SESSIONS = 4


def provider_options(precision: str, run: RunOptions) -> dict[str, str]:
    """The provider's options: a precision hint (`f32`, `bf16`), one stream, as many threads as asked for."""
    config = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": str(run.threads or os.cpu_count() or 1),
        "NUM_STREAMS": "1",
        "PERFORMANCE_HINT": "LATENCY",
    }
    return {"device_type": "CPU", "load_config": json.dumps({"CPU": config})}


class OpenVinoEngine:
    """A component on OpenVINO. Each set of sizes has a session compiled for exactly these, which is its fastest form.

    A session holds its own copy of the weights, so there are at most `EXACT_SESSIONS`; sizes that come later share one
    session of free sizes.
    """

    __slots__ = ("_lock", "_open", "_sessions", "backend", "inputs", "outputs")

    def __init__(
        self,
        open_for: Callable[[Mapping[str, int]], Any],
        *,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        backend: str,
    ) -> None:
        self._open, self._lock = open_for, threading.Lock()
        self._sessions: dict[tuple[tuple[str, int], ...], Any] = {}
        self.backend = backend
        self.inputs: dict[str, TensorSpec] = {s.name: s for s in inputs}
        self.outputs: dict[str, TensorSpec] = {s.name: s for s in outputs}

    @property
    def device(self) -> str:
        return "cpu"

    @property
    def capture(self) -> str:
        return "none"

    def bind(self, dims: Mapping[str, int]) -> Binding:
        """Buffers for these dimensions, and the session compiled for them: seconds, the first time."""
        specs = (*self.inputs.values(), *self.outputs.values())
        check_dims(specs, dims)
        exact = {n: dims[n] for n in dimension_names(specs)}
        with self._lock:
            key = tuple(sorted(exact.items()))
            if key not in self._sessions and len([k for k in self._sessions if k]) >= EXACT_SESSIONS:
                key, exact = (), {}
            if key not in self._sessions:
                session = self._open(exact)
                check_tensors("input", self.inputs, session.get_inputs())
                check_tensors("output", self.outputs, [o for o in session.get_outputs() if o.name in self.outputs])
                self._sessions[key] = session
            return OrtBinding(self._sessions[key], self.inputs, self.outputs, dims)


class OpenVinoBackend(OrtBackend):
    """Graphs in operators that OpenVINO takes, compiled when they are opened, in a precision of its own."""

    heeds = ()

    def __init__(self, name: str, precision: str, *, rewriting: int) -> None:
        self.precision, self.rewriting = precision, rewriting
        self.measured = precision == "f32"
        self.computes = None if precision == "f32" else "bfloat16"
        self.provider = Provider(
            backend=name,
            name="OpenVINOExecutionProvider",
            package="onnxruntime-openvino",
            extra="openvino",
            options=lambda run, stream: provider_options(precision, run),
        )

    def build(self, job: BuildJob) -> Mapping[str, Any]:
        """The graph as OpenVINO reads it, pointing at the bundle's weights."""
        from .openvino_graph import rewrite_for_openvino

        refuse_float16(job)
        if job.component.dtype == "fp8":
            raise UnsupportedError(
                f"the {job.name} has layers in fp8, which OpenVINO does not run on a processor",
                remedy="Quantize it with --precision int8, or name --backend tensorrt or tensorrt-rtx.",
            )
        job.progress(job.name, "optimising", 0.0)
        source = checked_graph(job.bundle, job.component)
        check_weights(job.bundle, job.component, None)
        graph = rewrite_for_openvino(source, keep_angles=self.precision != "f32")
        job.target.write_bytes(graph)
        return {"weights": "shared with the bundle", "operators": dict(sorted(count_operators(graph).items()))}

    def fusion(self, job: BuildJob) -> tuple[Forms, bool]:
        return {}, False

    def load(self, job: OpenJob, open_with: Callable[..., Any]) -> Engine:
        import_onnxruntime(self.provider).set_default_logger_severity(3)  # it warns of each constant that it folds
        specs = {"inputs": job.component.inputs, "outputs": job.component.outputs}
        return OpenVinoEngine(lambda dims: open_with(dims=dims), **specs, backend=self.name)


register(OpenVinoBackend("ort-openvino", "f32", rewriting=4))
register(OpenVinoBackend("ort-openvino-bf16", "bf16", rewriting=5))
