"""Fusion accounting: which operators a graph holds, and whether the fused ones came through the backend whole.

ONNX files are read as protocol buffers, as far as the names of the operators and no further, so that a build needs no
`onnx`: a message is a sequence of (field number, wire type, value); ModelProto.graph is field 7, GraphProto.node field
1, NodeProto.op_type field 4 and NodeProto.attribute field 5, AttributeProto.g field 6.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping

from ..errors import CorruptError, MismatchError

FUSED = {"Attention": ("Attention", "MultiHeadAttention", "PackedMultiHeadAttention", "GroupQueryAttention")}
_log = logging.getLogger("fewstep.engines")


def count_operators(model: bytes | memoryview) -> Counter[str]:
    """How many nodes of each operator a serialised ONNX model holds, sub-graphs included. Raises `CorruptError`."""
    counts: Counter[str] = Counter()
    for number, value in _fields(memoryview(model)):
        if number == 7:
            _count_graph(value, counts)
    return counts


def _count_graph(graph: memoryview, counts: Counter[str]) -> None:
    for number, node in _fields(graph):
        if number != 1:
            continue
        for field, value in _fields(node):
            if field == 4:
                counts[bytes(value).decode("utf-8", "replace")] += 1
            elif field == 5:
                for inner, subgraph in _fields(value):
                    if inner == 6:
                        _count_graph(subgraph, counts)


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The length-delimited fields of a message; numbers are skipped."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 0:
            _, at = _varint(message, at)
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        elif kind == 2:
            length, at = _varint(message, at)
            if at + length > len(message):
                raise CorruptError("an ONNX model ends in the middle of a field", remedy="Export the checkpoint again.")
            yield tag >> 3, message[at : at + length]
            at += length
        else:
            raise CorruptError(f"an ONNX model has a field of wire type {kind}", remedy="Export the checkpoint again.")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise CorruptError("an ONNX model ends in the middle of a number", remedy="Export the checkpoint again.")


def check_fusion(
    component: str, stated: Mapping[str, int], found: Mapping[str, int], *, strict: bool
) -> dict[str, int]:
    """Compare the fused operators of a built graph with those that the manifest counts; returns what was found.

    With `strict` a lost one raises `MismatchError`; otherwise it is logged, as slower and not wrong.
    """
    result = {}
    for name, forms in FUSED.items():
        expected, got = stated.get(name, 0), sum(found.get(f, 0) for f in forms)
        result[name] = got
        if got >= expected:
            continue
        text = f"{got} of {expected} {name} operators of {component!r} came through fused"
        if strict:
            raise MismatchError(
                text, expected="all of them", remedy="Upgrade the backend, or export with another opset."
            )
        _log.warning("%s: the engine is right but slower than it could be", text)
    return result
