"""Graphs of a few nodes, for tests that rewrite them, and what ONNX Runtime makes of them."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

Shape = list[int | str]


def model(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, Shape],
    output: Shape,
    constants: dict[str, np.ndarray],
    **between: Shape,
) -> bytes:
    """A graph with the one output `y`; `between` are the shapes of tensors inside it."""

    def values(shapes: dict[str, Shape]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()]

    graph = helper.make_graph(
        nodes,
        "rewritten",
        values(inputs),
        values({"y": output}),
        [numpy_helper.from_array(v, n) for n, v in constants.items()],
        value_info=values(between),
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    onnx.checker.check_model(made, full_check=True)
    return bytes(made.SerializeToString())


def run(graph: bytes, inputs: dict[str, np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, inputs)[0])


def noise(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
