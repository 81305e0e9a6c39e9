"""A graph's weights in another file: which there are, and the graph that points at them there."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from .merge import drop_unused
from .onnx_bytes import FLOAT, FLOAT8, INT4, INT8, OnnxGraph, fields_of, integer

ELEMENTS = {FLOAT: "float32", INT8: "int8", FLOAT8: "float8", INT4: "uint8"}
"""What weights are made of, and what a file says of them: of four bits, the bytes that hold two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """An initialiser: its type and shape, and its bytes where the graph holds them itself."""

    name: str
    element: int
    shape: tuple[int, ...]
    raw: memoryview | None

    @property
    def described(self) -> tuple[str, str, tuple[int, ...]]:
        """Name, dtype and shape, as a file of weights has them."""
        shape = (-(-math.prod(self.shape) // 2),) if self.element == INT4 else self.shape
        return self.name, ELEMENTS[self.element], shape


def weights_of(graph: OnnxGraph, least_bytes: int) -> dict[str, Weight]:
    """Those that lie outside of the graph, and those inside of it that have so many bytes."""
    weights = {}
    for message in graph.constant_messages():
        fields = list(fields_of(memoryview(message)))
        raw = next((value for tag, wire, value in fields if tag == 9 and wire == 2), None)
        outside = any(tag == 14 and integer(value) == 1 for tag, _, value in fields)
        name = next(str(value, "utf-8") for tag, _, value in fields if tag == 8)
        weight = Weight(name=name, element=graph.types[name], shape=graph.constants[name], raw=raw)
        if outside or (raw is not None and len(raw) >= least_bytes and weight.element in ELEMENTS):
            weights[name] = weight
    return weights


def place_weights(
    graph: OnnxGraph, weights: Collection[Weight], file: str, places: Mapping[str, tuple[int, int]]
) -> None:
    """Have the graph point at a file for these weights: places are first bytes and lengths by name."""
    graph.remove_constants({w.name for w in weights})
    for weight in weights:
        graph.add_outside(weight.name, weight.element, weight.shape, file, *places[weight.name])


def drop_unread(graph: OnnxGraph) -> None:
    """Take away initialisers, and nodes that make of them alone, which nothing reads any more."""
    drop_unused(graph)
    read = {name for node in graph.nodes for name in node.inputs} | set(graph.outputs)
    graph.remove_constants(graph.constants.keys() - read)
