"""A graph after ONNX Runtime has optimised it, with its weights as inputs: other weights are other arrays to bind.

The optimiser leaves most weights as they are, gives some another shape, and lays those of convolutions out in blocks of
channels. Which of this became of each is found by comparing bytes, so that what is not understood is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import UnsupportedError
from ...values import parse_json
from .merge import makers_of
from .onnx_bytes import FLOAT, Node, OnnxGraph, fields_of, integer, read_graph

METADATA = "fewstep.weights"
REBUILD = "Build it again with: fewstep build BUNDLE --force"
BLOCKED = "com.microsoft.nchwc"
"""The domain of operators over [B, C / b, H, W, b]."""
BLOCKS = (16, 8, 4)
_SUFFIX = "_nchwc"
_VIEWS = {"Reshape", "Unsqueeze", "Squeeze", "Identity", "Flatten", "Gather"}
"""Operators that leave the elements in their order; Gather where it takes all rows, which their bytes tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fed:
    """An input that takes a weight.

    name: of the input, source: of the weight in the component's own graph, shape: of the input. form: `"same"`, the
    elements in their order; `"padded"`, a vector with zeros behind it; `"rows"` and `"blocks"`, a convolution's weight
    [O, I, H, W] as [O / b, I, H, W, b] and [O / b, I / b, H, W, b, b], the last two being channels in and out.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    form: str
    block: int = 0

    def laid_out(self, weight: NDArray[Any]) -> NDArray[Any]:
        """A weight, float32, as the input takes it; without a copy where the elements keep their order."""
        if self.form == "same":
            return weight.reshape(self.shape)
        if self.form == "padded":
            return np.pad(weight.ravel(), (0, math.prod(self.shape) - weight.size)).reshape(self.shape)
        b = self.block
        rows = _filled(weight, 0, b)
        if self.form == "rows":
            o, i, h, w = rows.shape
            parts = rows.reshape(o // b, b, i, h, w).transpose(0, 2, 3, 4, 1)
        else:
            o, i, h, w = (blocks := _filled(rows, 1, b)).shape
            parts = blocks.reshape(o // b, b, i // b, b, h, w).transpose(0, 2, 4, 5, 3, 1)
        return np.ascontiguousarray(parts).reshape(self.shape)


def _filled(weight: NDArray[Any], axis: int, block: int) -> NDArray[Any]:
    """With zeros, up to whole blocks of channels."""
    missing = -weight.shape[axis] % block
    if not missing:
        return weight
    return np.pad(weight, [(0, missing if a == axis else 0) for a in range(weight.ndim)])


@dataclass(frozen=True, slots=True)
class _Initialiser:
    """An initialiser: its values, or the place where a file has them."""

    name: str
    shape: tuple[int, ...]
    element: int
    values: memoryview | None
    place: Mapping[str, str]


def take_weights_apart(
    saved: bytes, files: Mapping[str, Path], source: bytes, weights: Mapping[str, NDArray[Any]]
) -> bytes:
    """The saved graph with every weight of the source as an input; which is which is in its metadata (`read_fed`).

    saved: what the optimiser wrote; files: where those are that its tensors name. source: the graph that it was given.
    weights: by the names of the source's initialisers, float32.

    Raises `UnsupportedError` for a tensor that was made from weights otherwise than by another layout.
    """
    graph, given = read_graph(saved), read_graph(source)
    tensors = {t.name: t for t in _initialisers(graph)}
    readers = _readers(graph)
    origins = _Origins(given, weights)
    fed: list[Fed] = []
    inside: list[tuple[_Initialiser, bytes]] = []
    for tensor in tensors.values():
        values = _values(tensor, files)
        origin = _origin(tensor.name, readers, origins)
        if origin is not None:
            fed.append(_fed(tensor, values, origin, weights[origin]))
        elif origins.depends(tensor.name) or (tensor.element == FLOAT and tensor.name not in origins.known):
            raise UnsupportedError(
                f"the optimiser made {tensor.name!r} of weights, in a way that is not known",
                expected="weights as they are, or in another layout",
                remedy="Build it without --refittable.",
            )
        elif tensor.place:
            inside.append((tensor, values.tobytes()))
    graph.remove_constants({f.name for f in fed} | {t.name for t, _ in inside})
    for tensor, content in inside:
        graph.add_constant(tensor.name, tensor.element, tensor.shape, content)
    for one in fed:
        graph.add_input(one.name, one.shape)
    graph.add_metadata(METADATA, json.dumps([asdict(f) for f in fed]))
    return graph.to_bytes()


def read_fed(metadata: Mapping[str, str]) -> tuple[Fed, ...]:
    """The inputs that take weights, of a model's metadata."""
    stated = parse_json(metadata.get(METADATA, ""), "the engine's record of its weights", remedy=REBUILD)
    return tuple(Fed(**{**f, "shape": tuple(f["shape"])}) for f in stated)


class _Origins:
    """What the source says of its tensors: which are weights, seen as they are, and which depend on some."""

    def __init__(self, graph: OnnxGraph, weights: Mapping[str, NDArray[Any]]) -> None:
        self._makers, self._weights = makers_of(graph.nodes), weights
        self.known = {*graph.constants, *self._makers}

    def of(self, name: str) -> str | None:
        """The weight whose elements a tensor has, in their order."""
        while name not in self._weights:
            maker = self._makers.get(name)
            if maker is None or maker.operator not in _VIEWS:
                return None
            name = maker.inputs[0]
        return name

    def convolution(self, name: str) -> Node | None:
        """The convolution that makes a tensor, itself or through an activation that it is fused with."""
        maker = self._makers.get(name)
        while maker is not None and maker.operator != "Conv" and len(maker.inputs) == 1:
            maker = self._makers.get(maker.inputs[0])
        return maker if maker is not None and maker.operator == "Conv" else None

    def depends(self, name: str) -> bool:
        if name in self._weights:
            return True
        maker = self._makers.get(name)
        return maker is not None and any(self.depends(i) for i in maker.inputs if i)


def _origin(name: str, readers: Mapping[str, tuple[Node, int]], origins: _Origins) -> str | None:
    """The weight that an initialiser was made from; of a convolution over blocks, that of the one it stands for."""
    own = origins.of(name)
    if own is not None or name not in readers:
        return own
    node, index = readers[name]
    if node.domain != BLOCKED or not node.name.endswith(_SUFFIX):
        return None
    convolution = origins.convolution(node.name.removesuffix(_SUFFIX))
    return None if convolution is None or index >= len(convolution.inputs) else origins.of(convolution.inputs[index])


def _fed(tensor: _Initialiser, values: NDArray[Any], source: str, weight: NDArray[Any]) -> Fed:
    for form in _forms(tensor, source, weight):
        laid_out = form.laid_out(weight)
        if np.array_equal(laid_out.ravel().view(np.uint32), values):
            return form
    raise UnsupportedError(
        f"the optimiser laid out {source!r} in a way that is not known",
        expected="blocks of channels",
        remedy="Build it without --refittable.",
    )


def _forms(tensor: _Initialiser, source: str, weight: NDArray[Any]) -> Iterator[Fed]:
    """What the input may be, as its size says."""
    size = math.prod(tensor.shape)
    if size == weight.size:
        yield Fed(name=tensor.name, source=source, shape=tensor.shape, form="same")
    if weight.ndim == 1:
        yield Fed(name=tensor.name, source=source, shape=tensor.shape, form="padded")
    if weight.ndim != 4:
        return
    outer, inner, *kernel = weight.shape
    for block in BLOCKS:
        whole = -(-outer // block) * block * math.prod(kernel)
        for form, channels in (("blocks", -(-inner // block) * block), ("rows", inner)):
            if whole * channels == size:
                yield Fed(name=tensor.name, source=source, shape=tensor.shape, form=form, block=block)


def _initialisers(graph: OnnxGraph) -> Iterator[_Initialiser]:
    for message in graph.constant_messages():
        dims: list[int] = []
        element, name, values, place = 0, "", None, {}
        for tag, wire, value in fields_of(memoryview(message)):
            if tag == 1:
                dims += [integer(v) for _, _, v in _numbers(value, wire)]
            elif tag == 2:
                element = integer(value)
            elif tag == 8:
                name = str(value, "utf-8")
            elif tag == 9:
                values = value
            elif tag == 13:
                entry = {n: str(v, "utf-8") for n, _, v in fields_of(value)}
                place[entry[1]] = entry[2]
        yield _Initialiser(name, tuple(dims), element, values, place)


def _numbers(value: memoryview, wire: int) -> Iterator[tuple[int, int, memoryview]]:
    """One number, or several that are packed."""
    if wire == 0:
        yield 0, 0, value
        return
    while value:
        ends = next(i + 1 for i, byte in enumerate(value) if byte < 0x80)
        yield 0, 0, value[:ends]
        value = value[ends:]


def _values(tensor: _Initialiser, files: Mapping[str, Path]) -> NDArray[Any]:
    """The bits of a float32 tensor, as uint32; of another, its bytes."""
    kind = np.uint32 if tensor.element == FLOAT else np.uint8
    if not tensor.place:
        return np.frombuffer(b"" if tensor.values is None else tensor.values, kind)
    offset, length = int(tensor.place["offset"]), int(tensor.place["length"])
    return np.memmap(files[tensor.place["location"]], np.uint8, "r", offset, length).view(kind)


def _readers(graph: OnnxGraph) -> dict[str, tuple[Node, int]]:
    """The first node that reads each tensor, and as which input."""
    readers: dict[str, tuple[Node, int]] = {}
    for node in graph.nodes:
        for index, name in enumerate(node.inputs):
            readers.setdefault(name, (node, index))
    return readers
