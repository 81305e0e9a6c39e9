"""OpenVINO as a provider of ONNX Runtime: its options, and graphs without the one operator that it cannot read.

The wheel `onnxruntime-openvino` takes the place of `onnxruntime` and runs on any x86-64 processor. The newer plugin
wheel (`onnxruntime-ep-openvino`) offers its CPU device on Intel's processors alone (microsoft/onnxruntime#31981).
OpenVINO compiles a graph whenever a session is made; what it compiles is not kept, since the store deserialises only
what it has hashed.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError, UnsupportedError
from .options import RunOptions

PRECISION_HINTS = {"ort-openvino": "f32", "ort-openvino-bf16": "bf16"}


def provider_options(backend: str, run: RunOptions) -> dict[str, str]:
    """The provider's options: precision as the backend's name says, one stream, as many threads as asked for."""
    config = {
        "INFERENCE_PRECISION_HINT": PRECISION_HINTS[backend],
        "INFERENCE_NUM_THREADS": str(run.threads or os.cpu_count() or 1),
        "NUM_STREAMS": "1",
        "PERFORMANCE_HINT": "LATENCY",
    }
    return {"device_type": "CPU", "load_config": json.dumps({"CPU": config})}


def decompose_attention(source: Path) -> bytes:
    """The graph with every `Attention` (ONNX opset 23) as softmax(q k^T * scale + mask) v; weights stay outside.

    OpenVINO 2025.4, which the wheel holds, knows no `Attention`; it finds the pattern and fuses it again. Raises
    `UnsupportedError` for attention that is not of this plain form, `MissingExtraError` without the module `onnx`.
    """
    try:
        import onnx
        from onnx import helper, numpy_helper
    except ImportError as error:
        raise MissingExtraError("onnx", "openvino", purpose="a graph for OpenVINO") from error
    import numpy as np

    model = onnx.load(str(source), load_external_data=False)
    graph = model.graph
    values = {v.name: v.type.tensor_type for v in (*graph.value_info, *graph.input)}
    lowest = "attention_lowest"
    graph.initializer.append(numpy_helper.from_array(np.array(np.finfo(np.float32).min), lowest))
    nodes: list[Any] = []
    for index, node in enumerate(graph.node):
        if node.op_type != "Attention" or node.domain not in ("", "ai.onnx"):
            nodes.append(node)
            continue
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        query, key, value, *rest = node.input
        shape = [d.dim_value for d in values[query].shape.dim] if query in values else []
        plain = len(shape) == 4 and shape[3] and not any(rest[1:]) and len([o for o in node.output if o]) == 1
        if not plain or attributes.get("is_causal") or attributes.get("softcap"):
            raise UnsupportedError(
                f"the attention {node.name or index} is causal, capped, cached or not of rank 4",
                expected="softmax(q k^T * scale + mask) v",
                remedy="Use the backend 'ort-cpu'.",
            )
        prefix = f"attention_{index}_"
        scale = np.array(attributes.get("scale", 1.0 / math.sqrt(shape[3])), np.float32)
        graph.initializer.append(numpy_helper.from_array(scale, prefix + "scale"))
        scores = prefix + "scaled"
        nodes += [
            helper.make_node("Transpose", [key], [prefix + "keys"], perm=[0, 1, 3, 2]),
            helper.make_node("MatMul", [query, prefix + "keys"], [prefix + "scores"]),
            helper.make_node("Mul", [prefix + "scores", prefix + "scale"], [scores]),
        ]
        if rest and rest[0]:
            boolean = rest[0] in values and values[rest[0]].elem_type == onnx.TensorProto.BOOL
            form, given = ("Where", [rest[0], scores, lowest]) if boolean else ("Add", [scores, rest[0]])
            nodes.append(helper.make_node(form, given, [prefix + "masked"]))
            scores = prefix + "masked"
        nodes += [
            helper.make_node("Softmax", [scores], [prefix + "weights"], axis=-1),
            helper.make_node("MatMul", [prefix + "weights", value], [node.output[0]]),
        ]
    del graph.node[:]
    graph.node.extend(nodes)
    return bytes(model.SerializeToString())
