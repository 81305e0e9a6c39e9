"""OpenVINO as a provider of ONNX Runtime: its options, graphs in operators that it takes, and its engine.

The wheel `onnxruntime-openvino` takes the place of `onnxruntime` and runs on any x86-64 processor. The newer plugin
wheel (`onnxruntime-ep-openvino`) offers its CPU device on Intel's processors alone (microsoft/onnxruntime#31981).
OpenVINO compiles a graph whenever a session is made; what it compiles is not kept, since the store deserialises only
what it has hashed.
"""

from __future__ import annotations

import json
import math
import os
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...errors import UnsupportedError
from ..base import Binding, Engine, TensorSpec
from ..graph.accounting import Forms, count_operators
from ..graph.onnx_bytes import BOOL, FLOAT, Node, OnnxGraph, read_graph
from ..graph.rewrite import fix_reshapes, replace_group_norms
from ..options import RunOptions
from ..profile import check_dims, dimension_names
from ..weights import check_graph, check_weights
from .ort import OrtBinding, Provider, check_tensors, import_onnxruntime
from .ort_build import OrtBackend
from .ort_cpu import refuse_float16
from .registry import BuildJob, OpenJob, register

EXACT_SESSIONS = 4
LOWEST = -3.4028234663852886e38  # float32's


def provider_options(precision: str, run: RunOptions) -> dict[str, str]:
    """The provider's options: a precision hint (`f32`, `bf16`), one stream, as many threads as asked for."""
    config = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": str(run.threads or os.cpu_count() or 1),
        "NUM_STREAMS": "1",
        "PERFORMANCE_HINT": "LATENCY",
    }
    return {"device_type": "CPU", "load_config": json.dumps({"CPU": config})}


def rewrite_for_openvino(model: bytes, *, keep_angles: bool = False) -> bytes:
    """The graph in operators that the provider takes, so that all of it becomes one OpenVINO model.

    What it does not take, ONNX Runtime runs itself, between as many OpenVINO models as are left: GroupNormalization
    alone cuts an SD UNet into some sixty. `keep_angles` has sines and cosines computed in float32 whatever the hint:
    OpenVINO's rule is that what leads to an output, after the last product of matrices, keeps its precision, so they
    become outputs. A timestep of 999 is 1000 in bfloat16, and its sine another. Raises `UnsupportedError`,
    `CorruptError`.
    """
    graph = read_graph(model)
    replace_group_norms(graph)
    fix_reshapes(graph)
    decompose_attention(graph)
    if keep_angles:
        for node in graph.nodes:
            if node.operator in ("Sin", "Cos"):
                graph.add_output(node.outputs[0])
    return graph.to_bytes()


def decompose_attention(graph: OnnxGraph) -> int:
    """Put softmax(q k^T * scale + mask) v in place of every `Attention` (ONNX opset 23); returns how many there were.

    OpenVINO 2025.4, which the wheel holds, knows no `Attention`; it finds the pattern and fuses it again. Raises
    `UnsupportedError` for attention that is not of this plain form.
    """
    nodes: list[Node] = []
    count = 0
    for node in graph.nodes:
        if node.operator != "Attention" or node.domain not in ("", "ai.onnx"):
            nodes.append(node)
            continue
        nodes += _plain_attention(node, graph, f"attention_{count}_")
        count += 1
    graph.nodes = nodes
    return count


def _plain_attention(node: Node, graph: OnnxGraph, prefix: str) -> list[Node]:
    query, key, value, *rest = node.inputs
    shape = graph.shapes.get(query, ())
    width = shape[3] if len(shape) == 4 else None
    plain = isinstance(width, int) and not any(rest[1:]) and sum(map(bool, node.outputs)) == 1
    if not plain or not isinstance(width, int) or node.attributes.get("is_causal") or node.attributes.get("softcap"):
        raise UnsupportedError(
            f"the attention that makes {node.outputs[0]!r} is causal, capped, cached or not of rank 4",
            expected="softmax(q k^T * scale + mask) v",
            remedy="Use the backend 'ort-cpu'.",
        )
    given = node.attributes.get("scale")
    number = given if isinstance(given, float) else 1.0 / math.sqrt(width)
    scale = graph.add_constant(prefix + "scale", FLOAT, [], struct.pack("<f", number))
    nodes = [
        Node(operator="Transpose", inputs=[key], outputs=[prefix + "keys"], attributes={"perm": [0, 1, 3, 2]}),
        Node(operator="MatMul", inputs=[query, prefix + "keys"], outputs=[prefix + "scores"]),
        Node(operator="Mul", inputs=[prefix + "scores", scale], outputs=[prefix + "scaled"]),
    ]
    scores = prefix + "scaled"
    if rest and rest[0]:
        masked = prefix + "masked"
        if graph.types.get(rest[0]) == BOOL:
            lowest = graph.add_constant("attention_lowest", FLOAT, [], struct.pack("<f", LOWEST))
            nodes.append(Node(operator="Where", inputs=[rest[0], scores, lowest], outputs=[masked]))
        else:
            nodes.append(Node(operator="Add", inputs=[scores, rest[0]], outputs=[masked]))
        scores = masked
    weights = prefix + "weights"
    nodes.append(Node(operator="Softmax", inputs=[scores], outputs=[weights], attributes={"axis": -1}))
    nodes.append(Node(operator="MatMul", inputs=[weights, value], outputs=[node.outputs[0]]))
    return nodes


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
        refuse_float16(job)
        job.progress(job.name, "optimising", 0.0)
        source = check_graph(job.bundle, job.component)
        check_weights(job.bundle, job.component, None)
        graph = rewrite_for_openvino(source.read_bytes(), keep_angles=self.precision != "f32")
        job.target.write_bytes(graph)
        return {"weights": "shared with the bundle", "operators": dict(sorted(count_operators(graph).items()))}

    def fusion(self, job: BuildJob) -> tuple[Forms, bool]:
        return {}, False

    def load(self, job: OpenJob, open_with: Callable[..., Any]) -> Engine:
        import_onnxruntime(self.provider).set_default_logger_severity(3)  # it warns of each constant that it folds
        specs = {"inputs": job.component.inputs, "outputs": job.component.outputs}
        return OpenVinoEngine(lambda dims: open_with(dims=dims), **specs, backend=self.name)


register(OpenVinoBackend("ort-openvino", "f32", rewriting=3))
register(OpenVinoBackend("ort-openvino-bf16", "bf16", rewriting=4))
