"""Layers in integers: the explicit form, which ONNX Runtime, OpenVINO and TensorRT all read.

A pair of QuantizeLinear and DequantizeLinear stands before each layer that is to run in integers, and its weight is
stored in them:

    q = clip(round(x / s) + z, 0, 255),    x ~ s (q - z)        (Jacob et al. 2018, arXiv:1712.05877, equation 1)

Activations have one s and z a tensor (uint8), weights one s an output channel and z = 0 (int8). ONNX Runtime runs a
convolution in integers only where its result is quantized too; a product of matrices returns floats.

What a linear layer reads may be divided by a factor a channel that its weight is multiplied by, so that a channel of
outliers does not spread the grid (Xiao et al. 2023, arXiv:2211.10438, equation 3). The normalisation before it takes
that division into its own scale and bias.

Floats of eight bits (`float8.py`) have the same form: x ~ s q with q in E4M3 and s the largest magnitude over 448.
TensorRT computes with them; ONNX Runtime on a CPU rounds to them and computes in float32, by which they are judged.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .float8 import LARGEST, encode_float8
from .merge import ONNX, makers_of, turned_weight
from .onnx_bytes import FLOAT, FLOAT8, INT8, UINT8, Node, OnnxGraph, users_of

Float32 = npt.NDArray[np.float32]
Int8 = npt.NDArray[np.int8]
PREFIX = "model."
CONV, LINEAR = "conv", "linear"
SUM = "_sum"
"""What the name of a convolution's result ends in, before it is rounded."""
LEAST_SCALE = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerLayer:
    """A layer that integers can compute: its module's name, its kind, its weight's name and shape, its tensors.

    shape: [out, in, kh, kw] of a convolution, [out, in] of a linear layer.
    """

    module: str
    kind: str
    weight: str
    shape: tuple[int, ...]
    input: str
    output: str


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerGrid:
    """The uint8 grid of an activation: x ~ scale (q - zero)."""

    scale: float
    zero: int

    @classmethod
    def of(cls, low: float, high: float) -> IntegerGrid:
        """The grid whose ends are these values; 0 is on it."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = max((high - low) / 255.0, LEAST_SCALE)
        return cls(scale=scale, zero=int(np.clip(round(-low / scale), 0, 255)))

    @property
    def farthest(self) -> float:
        """The larger magnitude of its ends."""
        return self.scale * max(self.zero, 255 - self.zero)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class IntegerGrids:
    """What lowering needs of a component: grids by tensor, and factors by the tensor that linear layers read.

    smoothing: float32 [C], by which what is read is divided and the weights' input channels multiplied; the grid of
    such a tensor is that of what it is divided to.
    """

    tensors: Mapping[str, IntegerGrid]
    smoothing: Mapping[str, Float32]


def integer_layers(graph: OnnxGraph) -> tuple[IntegerLayer, ...]:
    """The convolutions and linear layers with constant weights, in the order of the graph.

    Layers of single vectors (a timestep's embedding) are left out: they cost nothing.
    """
    makers = makers_of(graph.nodes)
    layers = []
    for node in graph.nodes:
        if node.operator == "Conv" and node.domain in ONNX and node.attributes.get("group", 1) == 1:
            kind, weight = CONV, node.inputs[1]
            if len(graph.constants.get(weight, ())) != 4:
                continue
        else:
            turned = turned_weight(node, makers, graph)
            if turned is None:
                continue
            kind, weight = LINEAR, turned
        layers.append(
            IntegerLayer(
                module=weight.removeprefix(PREFIX).removesuffix(".weight"),
                kind=kind,
                weight=weight,
                shape=graph.constants[weight],
                input=node.inputs[0],
                output=node.outputs[0],
            )
        )
    return tuple(layers)


def quantize_weight(weight: Float32) -> tuple[Int8, Float32]:
    """Integers and the scale of each output channel, which is the first axis: w ~ scale q, q from -127 to 127."""
    flat = np.abs(weight.reshape(len(weight), -1))
    scale = np.maximum(flat.max(axis=1) / np.float32(127.0), np.float32(LEAST_SCALE))
    shaped = scale.reshape(-1, *(1,) * (weight.ndim - 1))
    return np.clip(np.rint(weight / shaped), -127, 127).astype(np.int8), scale.astype(np.float32)


def float8_weight(weight: Float32) -> tuple[npt.NDArray[np.uint8], Float32]:
    """Codes of E4M3 and the scale of each output channel, which is the first axis."""
    flat = np.abs(weight.reshape(len(weight), -1))
    scale = np.maximum(flat.max(axis=1) / np.float32(LARGEST), np.float32(LEAST_SCALE))
    return encode_float8(weight / scale.reshape(-1, *(1,) * (weight.ndim - 1))), scale.astype(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """What layers are lowered to. sums: whether what a convolution gives is rounded too, as ONNX Runtime wants it.

    activation, weight: ONNX's types of elements; quantize: a weight to its elements and scales.
    """

    activation: int
    weight: int
    quantize: Callable[[Float32], tuple[npt.NDArray[Any], Float32]]
    sums: bool


INTEGERS = Numbers(activation=UINT8, weight=INT8, quantize=quantize_weight, sums=True)
FLOATS = Numbers(activation=FLOAT8, weight=FLOAT8, quantize=float8_weight, sums=False)


def lower_layers(
    graph: OnnxGraph,
    layers: Sequence[IntegerLayer],
    grids: IntegerGrids,
    weights: Callable[[str], npt.NDArray[Any]],
    numbers: Numbers = INTEGERS,
) -> None:
    """Put these layers of a graph into other numbers. weights: a float32 weight by its name."""
    chosen = {(layer.input, layer.output): layer for layer in layers}
    smoothed = _smooth(graph, layers, grids)
    nodes: list[Node] = []
    read: dict[str, str] = {}
    for node in graph.nodes:
        layer = chosen.get((node.inputs[0], node.outputs[0])) if node.inputs and node.outputs else None
        if layer is None or node.operator not in ("Conv", "MatMul"):
            nodes.append(node)
            continue
        if layer.input not in read:
            source = smoothed.get(layer.input, layer.input)
            if source != layer.input:
                nodes += _divide(graph, layer.input, source, grids.smoothing[layer.input])
            read[layer.input], pair = _pair(graph, source, f"{layer.input}_read", grids.tensors[layer.input], numbers)
            nodes += pair
        factors = grids.smoothing.get(layer.input) if layer.kind == LINEAR else None
        weight = np.asarray(weights(layer.weight), np.float32)
        nodes.append(integer_weight(graph, layer, weight if factors is None else weight * factors, numbers))
        inputs = [read[layer.input], f"{layer.weight}_float", *node.inputs[2:]]
        rounded = numbers.sums and layer.kind == CONV
        raw = f"{layer.output}{SUM}" if rounded else layer.output
        nodes.append(Node(operator=node.operator, inputs=inputs, outputs=[raw], attributes=dict(node.attributes)))
        if rounded:
            _, pair = _pair(graph, raw, f"{layer.output}_given", grids.tensors[layer.output], numbers)
            nodes += [pair[0], Node(operator=pair[1].operator, inputs=pair[1].inputs, outputs=[layer.output])]
    graph.nodes = nodes


def _smooth(graph: OnnxGraph, layers: Sequence[IntegerLayer], grids: IntegerGrids) -> dict[str, str]:
    """Where what is read is divided: in the normalisation that makes it, if nobody else reads it, or by a new node."""
    makers, users = makers_of(graph.nodes), users_of(graph.nodes)
    outputs = {layer.output for layer in layers if layer.kind == LINEAR}
    smoothed = {}
    for name in grids.smoothing:
        readers = [n for n in users.get(name, []) if n.operator != "Shape"]
        if not any(n.outputs[0] in outputs for n in readers):
            continue
        maker = makers.get(name)
        alone = all(n.outputs[0] in outputs for n in readers)
        if maker is None or maker.operator != "LayerNormalization" or len(maker.inputs) != 3 or not alone:
            smoothed[name] = f"{name}_divided"
            continue
        inverse = graph.add_floats(f"{name}_inverse", 1.0 / grids.smoothing[name])
        for index in (1, 2):  # (n g + b) / f = n (g / f) + b / f
            divided = f"{maker.inputs[index]}_divided"
            division = Node(operator="Mul", inputs=[maker.inputs[index], inverse], outputs=[divided])
            graph.nodes.insert(0, division)
            maker.inputs[index] = divided
        maker.raw = None
    return smoothed


def _divide(graph: OnnxGraph, name: str, divided: str, factors: Float32) -> list[Node]:
    inverse = graph.add_floats(f"{name}_inverse", 1.0 / factors)
    return [Node(operator="Mul", inputs=[name, inverse], outputs=[divided])]


def _pair(graph: OnnxGraph, source: str, name: str, grid: IntegerGrid, numbers: Numbers) -> tuple[str, list[Node]]:
    """Onto the grid and back: the name of what comes back, and the two nodes."""
    step, at = (grid.scale, grid.zero) if numbers.activation == UINT8 else (grid.farthest / LARGEST, 0)
    scale = graph.add_constant(f"{name}_scale", FLOAT, [], struct.pack("<f", step))
    zero = graph.add_constant(f"{name}_zero", numbers.activation, [], bytes([at]))
    integers, floats = f"{name}_integers", f"{name}_floats"
    return floats, [
        Node(operator="QuantizeLinear", inputs=[source, scale, zero], outputs=[integers]),
        Node(operator="DequantizeLinear", inputs=[integers, scale, zero], outputs=[floats]),
    ]


def integer_weight(graph: OnnxGraph, layer: IntegerLayer, weight: Float32, numbers: Numbers = INTEGERS) -> Node:
    """A weight in other numbers; a linear layer's lies [in, out], as the product reads it."""
    integers, scale = numbers.quantize(weight)
    axis = 0
    if layer.kind == LINEAR:
        integers, axis = np.ascontiguousarray(integers.T), 1
    name = f"{layer.weight}_integers"
    graph.add_constant(name, numbers.weight, integers.shape, integers.tobytes())
    scales = graph.add_floats(f"{layer.weight}_scale", scale)
    zeros = graph.add_constant(f"{layer.weight}_zero", numbers.weight, [len(scale)], bytes(len(scale)))
    attributes: dict[str, float | int | list[int]] = {"axis": axis}
    return Node(
        operator="DequantizeLinear",
        inputs=[name, scales, zeros],
        outputs=[f"{layer.weight}_float"],
        attributes=attributes,
    )
