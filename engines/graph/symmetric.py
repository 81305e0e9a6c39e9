"""Grids about zero, which is what TensorRT takes: its integers are int8 with z = 0.

A grid of uint8 from -s z to s (255 - z) becomes one of int8 whose end is the farther of the two: it holds all that the
other does, in steps up to twice as long. What a convolution gives is not rounded here: TensorRT runs convolutions in
integers whatever becomes of their result, which ONNX Runtime does not.
"""

from __future__ import annotations

import struct

from .merge import ONNX, makers_of
from .onnx_bytes import FLOAT, INT8, UINT8, Node, OnnxGraph, fields_of
from .quantized import SUM

PAIR = ("QuantizeLinear", "DequantizeLinear")


def make_symmetric(graph: OnnxGraph) -> int:
    """Give a graph in the explicit form grids about zero; returns how many pairs it has then."""
    values = _values(graph)
    _leave_sums(graph)
    nodes: list[Node] = []
    for node in graph.nodes:
        if _on_grid(node, graph):
            scale, zero = _about_zero(graph, node, values)
            inputs = [node.inputs[0], scale, zero]
            node = Node(operator=node.operator, inputs=inputs, outputs=list(node.outputs))
        nodes.append(node)
    graph.nodes = nodes
    return sum(n.operator == PAIR[0] for n in nodes)


def _on_grid(node: Node, graph: OnnxGraph) -> bool:
    if node.operator not in PAIR or node.domain not in ONNX or len(node.inputs) < 3:
        return False
    return graph.types.get(node.inputs[2]) == UINT8


def _leave_sums(graph: OnnxGraph) -> None:
    """Take away the pairs behind convolutions: their results get the names that the pairs gave."""
    makers = makers_of(graph.nodes)
    dropped: set[int] = set()
    for node in graph.nodes:
        if node.operator != PAIR[1] or not _on_grid(node, graph):
            continue
        rounding = makers[node.inputs[0]]
        maker = makers.get(rounding.inputs[0])
        if maker is not None and maker.operator == "Conv" and maker.outputs[0].endswith(SUM):
            maker.outputs, maker.raw = list(node.outputs), None
            dropped |= {id(node), id(rounding)}
    graph.nodes = [n for n in graph.nodes if id(n) not in dropped]


def _about_zero(graph: OnnxGraph, node: Node, values: dict[str, bytes]) -> tuple[str, str]:
    (scale,) = struct.unpack("<f", values[node.inputs[1]])
    zero = values[node.inputs[2]][0]
    farther = scale * max(zero, 255 - zero)
    named = graph.add_constant(f"{node.inputs[1]}_about_zero", FLOAT, [], struct.pack("<f", farther / 127.0))
    return named, graph.add_constant(f"{node.inputs[2]}_about_zero", INT8, [], b"\0")


def _values(graph: OnnxGraph) -> dict[str, bytes]:
    """The bytes of the constants that lie in the graph itself."""
    values = {}
    for message in graph.constant_messages():
        fields = {tag: value for tag, wire, value in fields_of(memoryview(message)) if wire == 2}
        if 9 in fields and 8 in fields:
            values[str(fields[8], "utf-8")] = bytes(fields[9])
    return values
