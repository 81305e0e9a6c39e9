"""Weights in integers, everything else in floats: a quarter or an eighth of the bytes, and the same arithmetic.

A DequantizeLinear makes floats of a layer's weight whenever the layer runs, w ~ s q, so that only one layer's floats
are in memory at a time; ONNX Runtime multiplies matrices by such weights without making floats of them first.

Eight bits have one s an output channel. Four bits have one s for each 32 input channels (blocks, as in Dettmers and
Zettlemoyer 2023, arXiv:2212.09720, section 3): q from -8 to 7, and s is the one of a few that rounds with the least
squared error, since a block's largest value is often worth cutting off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .onnx_bytes import FLOAT, INT4, Node, OnnxGraph
from .quantized import LEAST_SCALE, LINEAR, Float32, Int8, IntegerLayer, integer_weight

BLOCK = 32
"""Input channels that share a scale of four bits."""
CUTS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
"""Of a block's largest magnitude, what the largest integer stands for."""
MOST_INTEGER = 7.5
"""Half way between the two ends of four bits, so that neither is wasted."""


def takes_blocks(layer: IntegerLayer) -> bool:
    """Whether a layer's input channels fall into whole blocks."""
    return layer.shape[1] % BLOCK == 0


def quantize_blocks(weight: Float32) -> tuple[Int8, Float32]:
    """Integers from -8 to 7 in the weight's shape [out, in, ...], and scales [out, in / 32, ...]."""
    out, columns, *rest = weight.shape
    blocks = weight.reshape(out, columns // BLOCK, BLOCK, *rest)
    largest = np.maximum(np.abs(blocks).max(axis=2, keepdims=True), np.float32(LEAST_SCALE))
    least = np.full(largest.shape, np.inf, np.float32)
    scale, integers = np.empty_like(largest), np.empty(blocks.shape, np.int8)
    for cut in CUTS:
        tried = largest * np.float32(cut / MOST_INTEGER)
        rounded = np.clip(np.rint(blocks / tried), -8, 7)
        error = np.sum((blocks - rounded * tried) ** 2, axis=2, keepdims=True)
        better = error < least
        least, scale = np.where(better, error, least), np.where(better, tried, scale)
        integers = np.where(better, rounded.astype(np.int8), integers)
    return integers.reshape(weight.shape), scale[:, :, 0]


def pack_nibbles(integers: Int8) -> bytes:
    """Two a byte, the first in the lower half, as ONNX stores INT4; a last half byte is zero."""
    flat = integers.reshape(-1).view(np.uint8) & 0xF
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    return bytes((flat[::2] | flat[1::2] << 4).tobytes())


def lower_weights(
    graph: OnnxGraph, layers: Sequence[IntegerLayer], bits: int, weights: Callable[[str], npt.NDArray[Any]]
) -> None:
    """Store these layers' weights in 8 or 4 bits; layers without whole blocks in 8. weights: float32 ones by name."""
    chosen = {(layer.input, layer.output): layer for layer in layers}
    nodes: list[Node] = []
    for node in graph.nodes:
        layer = chosen.get((node.inputs[0], node.outputs[0])) if node.inputs and node.outputs else None
        if layer is not None and node.operator in ("Conv", "MatMul"):
            weight = np.asarray(weights(layer.weight), np.float32)
            blocks = bits == 4 and takes_blocks(layer)
            floats = _blocks(graph, layer, weight) if blocks else integer_weight(graph, layer, weight)
            nodes.append(floats)
            inputs = [node.inputs[0], floats.outputs[0], *node.inputs[2:]]
            node = Node(operator=node.operator, inputs=inputs, outputs=node.outputs, attributes=dict(node.attributes))
        nodes.append(node)
    graph.nodes = nodes


def _blocks(graph: OnnxGraph, layer: IntegerLayer, weight: Float32) -> Node:
    """A weight in four bits; a linear layer's lies [in, out], as the product reads it."""
    integers, scale = quantize_blocks(weight)
    axis = 1
    if layer.kind == LINEAR:
        integers, scale, axis = np.ascontiguousarray(integers.T), np.ascontiguousarray(scale.T), 0
    name = f"{layer.weight}_integers"
    graph.add_constant(name, INT4, integers.shape, pack_nibbles(integers))
    scales = graph.add_constant(f"{layer.weight}_scales", FLOAT, scale.shape, scale.astype("<f4").tobytes())
    return Node(
        operator="DequantizeLinear",
        inputs=[name, scales],
        outputs=[f"{layer.weight}_float"],
        attributes={"axis": axis, "block_size": BLOCK},
    )
