"""Graphs in the operators that OpenVINO takes."""

from __future__ import annotations

import math
import struct

from ...errors import UnsupportedError
from ..graph.onnx_bytes import BOOL, FLOAT, Node, OnnxGraph, read_graph
from ..graph.rewrite import fix_reshapes, replace_group_norms

LOWEST = -3.4028234663852886e38  # float32's


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
    """Put softmax((q * scale) k^T + mask) v in place of every `Attention` (ONNX opset 23); returns how many there were.

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
    scores = prefix + "scores"
    nodes = [  # scaled are the S x D queries, not the S x S scores
        Node(operator="Mul", inputs=[query, scale], outputs=[prefix + "scaled"]),
        Node(operator="Transpose", inputs=[key], outputs=[prefix + "keys"], attributes={"perm": [0, 1, 3, 2]}),
        Node(operator="MatMul", inputs=[prefix + "scaled", prefix + "keys"], outputs=[scores]),
    ]
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
