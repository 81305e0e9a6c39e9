"""Where a graph says that its weights lie: nowhere but in the bundle's own file of them, whole and inside of it.

Backends open what a graph names themselves, so that it is read here before they see it: absolute paths, ways upwards,
links and places beyond the end have been holes of several of them (CVE-2024-27318, CVE-2025-51480, CVE-2026-27489).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from ...errors import CorruptError, UnsafeFileError
from .onnx_bytes import fields_of, integer

REMEDY = "Export the checkpoint again."
MOST_DEPTH = 32
_ELEMENT_BITS = {
    1: 32,
    2: 8,
    3: 8,
    4: 16,
    5: 16,
    6: 32,
    7: 64,
    9: 8,
    10: 16,
    11: 64,
    12: 32,
    13: 64,
    16: 16,
    17: 8,
    22: 4,
}
"""By TensorProto.DataType; strings never lie outside of a graph. Of four bits there are two elements a byte."""
_EXTERNAL = 1

# The fields that lead to tensors, as ONNX numbers them, and what each holds.
_LEADING = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}


@dataclass(slots=True)
class _Tensor:
    """TensorProto, as far as it says where its data lie."""

    name: str = ""
    dims: list[int] = field(default_factory=list)
    element: int = 0
    external: bool = False
    entries: list[tuple[str, str]] = field(default_factory=list)


def check_external(model: bytes, *, weights: str, length: int) -> None:
    """Raise unless every tensor that lies outside of a graph is a whole piece of the file `weights` of `length` bytes.

    Tensors of initialisers, attributes, subgraphs and functions are looked at. `UnsafeFileError` for another file,
    however it is written, `CorruptError` for an offset or a length that is none of this tensor in that file.
    """
    for tensor in _tensors(memoryview(model), "model", 0):
        if tensor.external or tensor.entries:
            _check(tensor, weights, length)


def _check(tensor: _Tensor, weights: str, length: int) -> None:
    stated = dict(tensor.entries)
    what = f"the graph's tensor {tensor.name[:80]!r}"
    if stated.get("location") != weights or len(stated) != len(tensor.entries):
        raise UnsafeFileError(
            f"{what} lies in the file {str(stated.get('location'))[:80]!r}", expected=repr(weights), remedy=REMEDY
        )
    bits = _ELEMENT_BITS.get(tensor.element)
    if bits is None or any(d < 0 for d in tensor.dims):
        raise CorruptError(
            f"{what} has shape {tensor.dims[:8]} and element type {tensor.element}",
            expected="one that can lie outside of a graph",
            remedy=REMEDY,
        )
    needed = -(-math.prod(tensor.dims) * bits // 8)
    if stated.get("length") != str(needed):
        raise CorruptError(
            f"{what} has {str(stated.get('length'))[:40]} bytes", expected=f"{needed}, as its shape says", remedy=REMEDY
        )
    offset = stated.get("offset", "")
    last = length - needed
    if not (offset.isascii() and offset.isdigit() and len(offset) < 20 and int(offset) <= last):
        raise CorruptError(
            f"{what} lies at {offset[:40]!r} in {weights}", expected=f"0 to {last}, as its file ends", remedy=REMEDY
        )


def _tensors(message: memoryview, kind: str, depth: int) -> Iterator[_Tensor]:
    """Every tensor in a message of this kind."""
    if depth > MOST_DEPTH:
        raise CorruptError(f"a graph has messages {depth} deep", expected=f"at most {MOST_DEPTH}", remedy=REMEDY)
    if kind == "tensor":
        yield _read(message)
        return
    leading = _LEADING[kind]
    for tag, wire, value in fields_of(message):
        if wire == 2 and tag in leading:
            yield from _tensors(value, leading[tag], depth + 1)


def _read(message: memoryview) -> _Tensor:
    tensor = _Tensor()
    for tag, wire, value in fields_of(message):
        if tag == 1:
            tensor.dims += _integers(value, wire)
        elif tag == 2 and wire == 0:
            tensor.element = integer(value)
        elif tag == 8 and wire == 2:
            tensor.name = str(value, "utf-8", "replace")
        elif tag == 13 and wire == 2:
            entry = {n: str(v, "utf-8", "replace") for n, w, v in fields_of(value) if w == 2}
            tensor.entries.append((entry.get(1, ""), entry.get(2, "")))
        elif tag == 14 and wire == 0:
            tensor.external = integer(value) == _EXTERNAL
    return tensor


def _integers(value: memoryview, wire: int) -> Iterator[int]:
    """One number, or several that are packed."""
    if wire == 0:
        yield integer(value)
    elif wire == 2:
        while value:
            ends = next((i + 1 for i, byte in enumerate(value[:10]) if byte < 0x80), 0)
            if not ends:
                raise CorruptError("an ONNX model ends in the middle of a number", remedy=REMEDY)
            yield integer(value[:ends])
            value = value[ends:]
