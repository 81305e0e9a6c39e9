"""A UNet's graph traced in float16, in another precision: the same nodes over another type, without tracing again.

Every tensor of float16 becomes one of the other type; what was float32 stays. For float32 the casts that do nothing
then are cut out. The gate compares the result with torch like any traced graph.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
from fewstep.export.trace.graphs import TracedGraph
from fewstep.weights.layout import plan_layout

TYPES = {"float32": ir.DataType.FLOAT, "bfloat16": ir.DataType.BFLOAT16}


def retype(graph: TracedGraph, dtype: str, key: str) -> TracedGraph:
    """The float16 graph of a UNet with `dtype` in place of float16, under another key."""
    if graph.dtype != "float16" or graph.kind != "unet":
        raise ValueError(f"the graph is a {graph.kind} in {graph.dtype}, not a UNet in float16")
    target = TYPES[dtype]
    model = ir.from_proto(onnx.load_from_string(graph.onnx))
    parameters = tuple(replace(p, dtype=dtype if p.dtype == "float16" else p.dtype) for p in graph.parameters)
    layout = plan_layout([(p.name, p.dtype, p.shape) for p in parameters])
    for parameter in parameters:
        begin, size = layout.places[parameter.name]
        value = model.graph.initializers[parameter.name]
        kind = target if value.dtype == ir.DataType.FLOAT16 else value.dtype
        value.const_value = ir.ExternalTensor(
            location=f"{graph.kind}.safetensors",
            offset=begin,
            length=size,
            dtype=kind,
            shape=ir.Shape(parameter.shape),
            name=parameter.name,
            base_dir="",
        )
        value.dtype = kind
    weights = {p.name for p in parameters}
    for name, value in model.graph.initializers.items():
        if name not in weights and value.dtype == ir.DataType.FLOAT16:
            value.const_value = _converted(value.const_value, target, name)
            value.dtype = target
    for node in model.graph.all_nodes():
        _retype_node(node, target)
    if dtype == "float32":
        _cut_casts(model)
    operators = Counter(node.op_type for node in model.graph.all_nodes())
    return replace(
        graph,
        key=key,
        dtype=dtype,
        parameters=parameters,
        operators=dict(sorted(operators.items())),
        header_sha256=layout.sha256,
        onnx=ir.to_proto(model).SerializeToString(deterministic=True),
    )


def _converted(tensor: ir.TensorProtocol | None, target: ir.DataType, name: str) -> ir.Tensor:
    """A constant in another type; float16's rounding must not have changed it, or the graph would be another."""
    if tensor is None:
        raise ValueError(f"the constant {name!r} has no value")
    value = tensor.numpy().astype(np.float32)
    if not np.array_equal(value, np.round(value * 1024) / 1024):
        raise ValueError(f"the constant {name!r} is {value}, which float16 may have rounded: trace this precision")
    return ir.Tensor(value.astype(target.numpy()), dtype=target, name=name)


def _retype_node(node: ir.Node, target: ir.DataType) -> None:
    for name, attribute in list(node.attributes.items()):
        if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == ir.DataType.FLOAT16:
            node.attributes[name] = ir.AttrTensor(name, _converted(attribute.value, target, node.name or name))
        elif name in {"to", "dtype", "stash_type"} and attribute.value == ir.DataType.FLOAT16.value:
            node.attributes[name] = ir.AttrInt64(name, target.value)
    for value in node.outputs:
        if value.dtype == ir.DataType.FLOAT16:
            value.dtype = target


def _cut_casts(model: ir.Model) -> None:
    """Remove the casts from float32 to float32, but for one that makes a graph's output."""
    outputs = {v.name for v in model.graph.outputs}
    for node in list(model.graph):
        if node.op_type != "Cast" or node.attributes["to"].value != ir.DataType.FLOAT.value:
            continue
        source, made = node.inputs[0], node.outputs[0]
        if source is None or source.dtype != ir.DataType.FLOAT or made.name in outputs:
            continue
        ir.convenience.replace_all_uses_with(made, source)
        model.graph.remove(node, safe=True)
