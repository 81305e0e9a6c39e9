"""Where tensors lie in a safetensors file that fewstep writes: a function of names, dtypes and shapes alone.

The format is the one that the safetensors project specifies: eight bytes of header length, a JSON header, the data
without holes. Two freedoms that it leaves are used here: the header is padded with spaces so that the data begin at
a multiple of 4096, and tensors whose size is a multiple of 64 come first, so that these are aligned too. Because the
header does not depend on the weights, a graph can point at them before they exist.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UnsupportedError
from .stored import CODES

ALIGNMENT = 4096
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int8": 1, "float8": 1, "uint8": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """`header` opens the file; `order` is the order of the data; `places` gives each tensor's first byte and size."""

    header: bytes
    order: tuple[str, ...]
    places: dict[str, tuple[int, int]]
    total_bytes: int

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.header).hexdigest()


def plan_layout(tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> Layout:
    """Lay out tensors given as (name, dtype, shape)."""
    sizes = {}
    for name, dtype, shape in tensors:
        if dtype not in SIZES:
            raise UnsupportedError(f"tensor {name!r} has dtype {dtype}", expected=f"one of {', '.join(SIZES)}")
        sizes[name] = math.prod(shape) * SIZES[dtype]
    described = {name: (dtype, shape) for name, dtype, shape in tensors}
    order = sorted(sizes, key=lambda n: (sizes[n] % 64 != 0, n))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in order:
        dtype, shape = described[name]
        entries[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [at, at + sizes[name]]}
        at += sizes[name]
    text = json.dumps(entries, separators=(",", ":")).encode()
    length = -(-(len(text) + 8) // ALIGNMENT) * ALIGNMENT - 8
    header = length.to_bytes(8, "little") + text.ljust(length)
    start, places = len(header), {}
    for name in order:
        places[name] = (start, sizes[name])
        start += sizes[name]
    return Layout(header=header, order=tuple(order), places=places, total_bytes=start)
