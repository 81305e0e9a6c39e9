"""ONNX files as protocol buffers, read and written as far as the engines need, so that a build needs no `onnx`.

A message is a sequence of (field number, wire type, value). What a rewrite does not touch is copied as it was.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import CorruptError

FLOAT, UINT8, INT8, INT64, BOOL, FLOAT16, BFLOAT16, FLOAT8, INT4 = 1, 2, 3, 7, 9, 10, 16, 17, 22
_MODEL_OPSET, _MODEL_GRAPH, _MODEL_METADATA = 8, 7, 14
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT, _GRAPH_VALUE = 1, 5, 11, 12, 13
_REMEDY = "Export the checkpoint again."


@dataclass(slots=True, eq=False, kw_only=True)
class Node:
    """NodeProto: what it computes from which tensors. `attributes` are floats, integers and lists of integers.

    name: as it was read; a new node is named by its output.
    """

    operator: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, float | int | list[int]] = field(default_factory=dict)
    domain: str = ""
    name: str = ""
    raw: bytes | None = None

    def to_bytes(self) -> bytes:
        """The message: as it was read, or made from the fields of a new node."""
        if self.raw is not None:
            return self.raw
        message = b"".join(string(1, i) for i in self.inputs) + b"".join(string(2, o) for o in self.outputs)
        message += string(3, f"{self.outputs[0]}/{self.operator}") + string(4, self.operator)
        message += b"".join(block(5, _attribute_bytes(n, v)) for n, v in self.attributes.items())
        return message + (string(7, self.domain) if self.domain else b"")


@dataclass(slots=True, kw_only=True)
class OnnxGraph:
    """A model with its nodes apart. `shapes` are those that the file states: numbers, symbols, or `None`: unknown.

    `types` are the element types beside them, as in TensorProto.DataType.
    """

    nodes: list[Node]
    shapes: dict[str, tuple[int | str | None, ...]]
    types: dict[str, int]
    constants: dict[str, tuple[int, ...]]
    outputs: tuple[str, ...]
    opsets: dict[str, int]
    inputs: list[str]
    _model: list[tuple[int, int, bytes]]
    _graph: list[tuple[int, int, bytes]]

    def add_constant(self, name: str, data_type: int, dims: Sequence[int], raw: bytes) -> str:
        """Add an initializer, unless one of this name is there; returns its name."""
        if name not in self.constants:
            self.constants[name], self.types[name] = tuple(dims), data_type
            self._graph.append((_GRAPH_INITIALIZER, 2, _tensor_bytes(name, data_type, dims, raw)))
        return name

    def add_outside(self, name: str, data_type: int, dims: Sequence[int], file: str, offset: int, length: int) -> None:
        """Add an initializer whose bytes lie in a file beside the model."""
        self.constants[name], self.types[name] = tuple(dims), data_type
        entries = {"location": file, "offset": str(offset), "length": str(length)}
        message = b"".join(number(1, d) for d in dims) + number(2, data_type) + string(8, name)
        message += b"".join(block(13, string(1, k) + string(2, v)) for k, v in entries.items()) + number(14, 1)
        self._graph.append((_GRAPH_INITIALIZER, 2, message))

    def add_integers(self, name: str, values: Sequence[int]) -> str:
        return self.add_constant(name, INT64, [len(values)], struct.pack(f"<{len(values)}q", *values))

    def add_floats(self, name: str, values: npt.NDArray[Any]) -> str:
        """A vector of float32."""
        return self.add_constant(name, FLOAT, [len(values)], np.asarray(values, "<f4").tobytes())

    def add_input(self, name: str, shape: Sequence[int | str]) -> None:
        """Make a float32 tensor of this shape, in numbers and symbols, an input of the model."""
        self.inputs.append(name)
        self.shapes[name], self.types[name] = tuple(shape), FLOAT
        dims = b"".join(block(1, string(2, d) if isinstance(d, str) else number(1, d)) for d in shape)
        tensor = block(2, block(1, number(1, FLOAT) + block(2, dims)))
        self._graph.append((_GRAPH_INPUT, 2, string(1, name) + tensor))

    def add_output(self, name: str) -> None:
        """Make a float32 tensor of any shape an output of the model."""
        self.outputs = (*self.outputs, name)
        tensor = block(2, block(1, number(1, FLOAT)))
        self._graph.append((_GRAPH_OUTPUT, 2, string(1, name) + tensor))

    def constant_messages(self) -> list[bytes]:
        """The initializers as they are, each a TensorProto."""
        return [value for tag, wire, value in self._graph if tag == _GRAPH_INITIALIZER and wire == 2]

    def remove_constants(self, names: Collection[str]) -> None:
        """Take initializers away."""
        self.constants = {n: s for n, s in self.constants.items() if n not in names}
        self._graph = [f for f in self._graph if not (f[0] == _GRAPH_INITIALIZER and _named(f[2]) in names)]

    def add_metadata(self, key: str, value: str) -> None:
        self._model.append((_MODEL_METADATA, 2, string(1, key) + string(2, value)))

    def to_bytes(self) -> bytes:
        """The serialised model, with the nodes as they are now."""
        graph = b"".join(block(_GRAPH_NODE, n.to_bytes()) for n in self.nodes)
        graph += b"".join(copied(*f) for f in self._graph)
        model = b"".join(copied(*f) for f in self._model) + block(_MODEL_GRAPH, graph)
        for domain, version in self.opsets.items():
            model += block(_MODEL_OPSET, (string(1, domain) if domain else b"") + number(2, version))
        return model


def read_graph(model: bytes | memoryview) -> OnnxGraph:
    """Take a serialised model apart. Raises `CorruptError` for bytes that are no protocol buffer."""
    graph = OnnxGraph(
        nodes=[], shapes={}, types={}, constants={}, outputs=(), opsets={}, inputs=[], _model=[], _graph=[]
    )
    for tag, wire, value in fields_of(memoryview(model)):
        if tag == _MODEL_GRAPH and wire == 2:
            _read_graph(value, graph)
        elif tag == _MODEL_OPSET and wire == 2:
            opset = {n: v for n, _, v in fields_of(value)}
            graph.opsets[_text(opset.get(1))] = integer(opset[2]) if 2 in opset else 0
        else:
            graph._model.append((tag, wire, bytes(value)))
    return graph


def _read_graph(message: memoryview, graph: OnnxGraph) -> None:
    outputs = []
    for tag, wire, value in fields_of(message):
        if tag == _GRAPH_NODE and wire == 2:
            graph.nodes.append(_read_node(value))
            continue
        graph._graph.append((tag, wire, bytes(value)))
        if tag == _GRAPH_INITIALIZER:
            name, dims, element = _read_tensor(value)
            graph.constants[name] = dims
            graph.types[name] = element
        elif tag in (_GRAPH_INPUT, _GRAPH_OUTPUT, _GRAPH_VALUE):
            name, shape, element = _read_value(value)
            graph.types[name] = element
            if shape is not None:
                graph.shapes[name] = shape
            if tag == _GRAPH_OUTPUT:
                outputs.append(name)
            elif tag == _GRAPH_INPUT:
                graph.inputs.append(name)
    graph.outputs = tuple(outputs)


def _read_node(message: memoryview) -> Node:
    node = Node(operator="", inputs=[], outputs=[], raw=bytes(message))
    for tag, wire, value in fields_of(message):
        if wire != 2:
            continue
        if tag == 1:
            node.inputs.append(_text(value))
        elif tag == 2:
            node.outputs.append(_text(value))
        elif tag == 3:
            node.name = _text(value)
        elif tag == 4:
            node.operator = _text(value)
        elif tag == 5:
            name, content = _read_attribute(value)
            if content is not None:
                node.attributes[name] = content
        elif tag == 7:
            node.domain = _text(value)
    return node


def _read_attribute(message: memoryview) -> tuple[str, float | int | list[int] | None]:
    """Name and value; `None` for one that is neither float, integer nor integers."""
    name, scalar = "", None
    integers: list[int] = []
    for tag, wire, value in fields_of(message):
        if tag == 1:
            name = _text(value)
        elif tag == 2 and wire == 5:
            (scalar,) = struct.unpack("<f", value)
        elif tag == 3 and wire == 0:
            scalar = integer(value)
        elif tag == 8:
            integers += list(_packed(value)) if wire == 2 else [integer(value)]
    return name, integers or scalar


def _read_tensor(message: memoryview) -> tuple[str, tuple[int, ...], int]:
    """TensorProto: its name, its shape and the type of its elements."""
    name, element = "", 0
    dims: list[int] = []
    for tag, wire, value in fields_of(message):
        if tag == 1:
            dims += list(_packed(value)) if wire == 2 else [integer(value)]
        elif tag == 2:
            element = integer(value)
        elif tag == 8:
            name = _text(value)
    return name, tuple(dims), element


def _named(message: bytes) -> str:
    return _read_tensor(memoryview(message))[0]


def _read_value(message: memoryview) -> tuple[str, tuple[int | str | None, ...] | None, int]:
    """ValueInfoProto: its name, its shape when it is a tensor of known rank, and the type of its elements."""
    name, shape, element = "", None, 0
    for tag, _, value in fields_of(message):
        if tag == 1:
            name = _text(value)
        elif tag == 2:
            for tensor in _inner(value, 1):
                for tag, wire, inner in fields_of(tensor):
                    if tag == 1 and wire == 0:
                        element = integer(inner)
                for dims in _inner(tensor, 2):
                    shape = tuple(_dim(d) for d in _inner(dims, 1))
    return name, shape, element


def _dim(message: memoryview) -> int | str | None:
    for tag, _, value in fields_of(message):
        if tag == 1:
            return integer(value)
        if tag == 2:
            return _text(value)
    return None


def _inner(message: memoryview, field_tag: int) -> Iterator[memoryview]:
    return (value for tag, wire, value in fields_of(message) if tag == field_tag and wire == 2)


def fields_of(message: memoryview) -> Iterator[tuple[int, int, memoryview]]:
    """Number, wire type and value of every field; a number is its bytes. Raises `CorruptError`."""
    offset = 0
    while offset < len(message):
        tag, offset = varint(message, offset)
        wire, began = tag & 7, offset
        if wire == 0:
            _, offset = varint(message, offset)
        elif wire in (1, 5):
            offset += 8 if wire == 1 else 4
        elif wire == 2:
            length, began = varint(message, offset)
            offset = began + length
        else:
            raise CorruptError(f"an ONNX model has a field of wire type {wire}", remedy=_REMEDY)
        if offset > len(message):
            raise CorruptError("an ONNX model ends in the middle of a field", remedy=_REMEDY)
        yield tag >> 3, wire, message[began:offset]


def varint(message: memoryview, offset: int) -> tuple[int, int]:
    """The number that begins here, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if offset >= len(message):
            break
        byte = message[offset]
        offset += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, offset
    raise CorruptError("an ONNX model ends in the middle of a number", remedy=_REMEDY)


def integer(value: memoryview) -> int:
    """A signed 64-bit number from its bytes."""
    unsigned, _ = varint(value, 0)
    return unsigned - (1 << 64) if unsigned >> 63 else unsigned


def _packed(value: memoryview) -> Iterator[int]:
    offset = 0
    while offset < len(value):
        began = offset
        _, offset = varint(value, offset)
        yield integer(value[began:offset])


def _text(value: memoryview | None) -> str:
    return "" if value is None else str(value, "utf-8", "replace")


def varint_bytes(value: int) -> bytes:
    value &= (1 << 64) - 1
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def block(tag: int, value: bytes) -> bytes:
    """A length-delimited field."""
    return varint_bytes(tag << 3 | 2) + varint_bytes(len(value)) + value


def string(tag: int, value: str) -> bytes:
    return block(tag, value.encode())


def number(tag: int, value: int) -> bytes:
    return varint_bytes(tag << 3) + varint_bytes(value)


def copied(tag: int, wire: int, value: bytes) -> bytes:
    """A field as it was; the value of a number is its own bytes."""
    head = varint_bytes(tag << 3 | wire)
    return head + (varint_bytes(len(value)) if wire == 2 else b"") + value


def _attribute_bytes(name: str, value: float | int | list[int]) -> bytes:
    message = string(1, name)
    if isinstance(value, float):
        return message + b"\x15" + struct.pack("<f", value) + number(20, 1)
    if isinstance(value, int):
        return message + number(3, value) + number(20, 2)
    return message + b"".join(number(8, v) for v in value) + number(20, 7)


def _tensor_bytes(name: str, data_type: int, dims: Sequence[int], raw: bytes) -> bytes:
    return b"".join(number(1, d) for d in dims) + number(2, data_type) + string(8, name) + block(9, raw)


def users_of(nodes: Sequence[Node]) -> Mapping[str, list[Node]]:
    """The nodes that read each tensor."""
    users: dict[str, list[Node]] = {}
    for node in nodes:
        for name in node.inputs:
            users.setdefault(name, []).append(node)
    return users
