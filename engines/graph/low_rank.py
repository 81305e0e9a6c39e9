"""Low-rank changes as inputs of a graph: each linear layer and convolution gets matrices of each row's own.

    y = W x + b + up (down x)        (Hu et al. 2021, arXiv:2106.09685, equation 3)

`down` and `up` of all layers lie in two inputs, packed one after the other: `lora_down` [rows, I, rank] with I the
layers' inputs in a row, `lora_up` [rows, rank, O] with O their outputs. Rows of a smaller rank are
filled up with zeros, rows without a change are zeros. A layer's own weight is not touched, so that one engine serves
every change and a batch may mix them.

A text encoder may read words that it was not trained on, too: token ids from the size of its table on are rows of a
third input, `extra_words` [words, D] (textual inversion: Gal et al. 2022, arXiv:2208.01618).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ...errors import UnsupportedError
from ...tensors import TensorSpec
from .merge import ONNX, makers_of
from .onnx_bytes import FLOAT, Node, OnnxGraph, read_graph

DOWN, UP, RANK = "lora_down", "lora_up", "rank"
"""The inputs' names, and that of their common dimension."""
EXTRA_WORDS, WORDS = "extra_words", "words"
"""The input of vectors for words, and its dimension."""
TABLE = "token_embedding.weight"
MOST_PARTS = 100
"""Of one Split: backends infer shapes from its sizes, which must be so few that they stay in a graph (1 KiB)."""
_PREFIX = "model."
_LAST = (1 << 63) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A layer that takes a change: its module's name, its weight's shape, and where its matrices begin.

    shape: [out, in] or [out, in, kh, kw]. down: its first row of `lora_down`, of which it has in * kh * kw, ordered by
    (kh, kw, in). up: its first column of `lora_up`, of which it has out.
    """

    module: str
    shape: tuple[int, ...]
    down: int
    up: int

    @property
    def height(self) -> int:
        """Rows of `lora_down` that it has."""
        return math.prod(self.shape[1:])

    @property
    def width(self) -> int:
        """Columns of `lora_up` that it has."""
        return self.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankGraph:
    """A serialised graph with further inputs, what these are, and the layers in the order in which they are packed.

    vocabulary: rows of a text encoder's own table; `None` where no words can be given.
    """

    model: bytes
    inputs: tuple[TensorSpec, ...]
    layers: tuple[Layer, ...]
    vocabulary: int | None = None


def add_low_rank(model: bytes, *, kernels: bool) -> LowRankGraph:
    """Give a graph low-rank inputs for its linear layers and pointwise convolutions, and, with `kernels`, for all.

    A convolution of a larger kernel costs a copy of its input by element of the kernel, whatever the rank. Raises
    `UnsupportedError` for a graph with no layer of a known form, `CorruptError` for bytes that are no graph.
    """
    graph = read_graph(model)
    makers = makers_of(graph.nodes)
    rows = _rows(graph)
    layers: list[Layer] = []
    nodes: list[Node] = []
    below = across = 0
    table: tuple[int, ...] | None = None
    for node in graph.nodes:
        if _is_table(node, graph):
            table = graph.constants[node.inputs[0]]
            nodes += _with_words(node, graph, table[0])
            continue
        weight = _weight(node, makers, graph, rows, kernels=kernels)
        if weight is None:
            nodes.append(node)
            continue
        shape = graph.constants[weight]
        module = weight.removeprefix(_PREFIX).removesuffix(".weight")
        layer = Layer(module=module, shape=shape, down=below, up=across)
        nodes += _changed(node, len(layers), graph, graph.types[weight])
        layers.append(layer)
        below, across = below + layer.height, across + layer.width
    if not layers:
        raise UnsupportedError(
            "the graph has no linear layer of a known form", expected="a graph that fewstep exported"
        )
    graph.nodes = [*_taken_apart(graph, layers), *nodes]
    inputs = [
        TensorSpec(name=DOWN, dtype="float32", shape=(rows, below, RANK)),
        TensorSpec(name=UP, dtype="float32", shape=(rows, RANK, across)),
    ]
    if table is not None:
        inputs.append(TensorSpec(name=EXTRA_WORDS, dtype="float32", shape=(WORDS, table[1])))
    for spec in inputs:
        graph.add_input(spec.name, spec.shape)
    vocabulary = None if table is None else table[0]
    return LowRankGraph(model=graph.to_bytes(), inputs=tuple(inputs), layers=tuple(layers), vocabulary=vocabulary)


def _is_table(node: Node, graph: OnnxGraph) -> bool:
    """Whether a node looks tokens up in a text encoder's table."""
    own = node.operator == "Gather" and node.domain in ONNX and not node.attributes.get("axis")
    return own and node.inputs[0].endswith(TABLE) and len(graph.constants.get(node.inputs[0], ())) == 2


def _with_words(node: Node, graph: OnnxGraph, known: int) -> Iterator[Node]:
    """Rows of the table, or of the given words: W[min(i, n - 1)] where i < n, else words[i - n]."""
    (weight, ids), result, prefix = node.inputs, node.outputs[0], "words_"
    last, size = graph.add_integers(f"{prefix}last", [known - 1]), graph.add_integers(f"{prefix}size", [known])
    zero, axis = graph.add_integers(f"{prefix}zero", [0]), graph.add_integers(f"{prefix}axis", [-1])
    extra = EXTRA_WORDS
    if graph.types[weight] != FLOAT:
        extra = f"{prefix}cast"
        yield Node(operator="Cast", inputs=[EXTRA_WORDS], outputs=[extra], attributes={"to": graph.types[weight]})
    yield Node(operator="Min", inputs=[ids, last], outputs=[f"{prefix}own_ids"])
    yield Node(operator="Gather", inputs=[weight, f"{prefix}own_ids"], outputs=[f"{prefix}own"], attributes={"axis": 0})
    yield Node(operator="Sub", inputs=[ids, size], outputs=[f"{prefix}behind"])
    yield Node(operator="Max", inputs=[f"{prefix}behind", zero], outputs=[f"{prefix}ids"])
    yield Node(operator="Gather", inputs=[extra, f"{prefix}ids"], outputs=[f"{prefix}given"], attributes={"axis": 0})
    yield Node(operator="Greater", inputs=[ids, last], outputs=[f"{prefix}is_given"])
    yield Node(operator="Unsqueeze", inputs=[f"{prefix}is_given", axis], outputs=[f"{prefix}where"])
    yield Node(operator="Where", inputs=[f"{prefix}where", f"{prefix}given", f"{prefix}own"], outputs=[result])


def _rows(graph: OnnxGraph) -> str:
    """The name of the dimension along which inputs have rows."""
    first = next(iter(graph.inputs), "")
    rows = (graph.shapes.get(first) or (None,))[0]
    if not isinstance(rows, str):
        raise UnsupportedError("the graph's inputs have no rows", expected="a graph that fewstep exported")
    return rows


def _weight(node: Node, makers: Mapping[str, Node], graph: OnnxGraph, rows: str, *, kernels: bool) -> str | None:
    """The weight of a node that may be changed row by row; `None` for others."""
    if node.domain not in ONNX or len(node.inputs) < 2:
        return None
    x, name = graph.shapes.get(node.inputs[0], ()), node.inputs[1]
    if node.operator == "MatMul" and len(x) == 3:
        turned = makers.get(name)
        if turned is None or turned.operator != "Transpose" or turned.attributes.get("perm") != [1, 0]:
            return None
        name = turned.inputs[0]
    elif node.operator == "Gemm" and len(x) == 2:
        if node.attributes.get("transB") != 1 or node.attributes.get("transA"):
            return None
    elif node.operator == "Conv" and len(x) == 4:
        kernel = graph.constants.get(name, ())[2:]
        plain = node.attributes.get("group", 1) == 1 and node.attributes.get("dilations", [1, 1]) == [1, 1]
        if not plain or len(kernel) != 2 or not (kernels or _is_pointwise(node, kernel)):
            return None
    else:
        return None
    named = name in graph.constants and name.startswith(_PREFIX) and name.endswith(".weight")
    return name if named and x[0] == rows else None


def _is_pointwise(node: Node, kernel: tuple[int, ...]) -> bool:
    return kernel == (1, 1) and node.attributes.get("strides", [1, 1]) == [1, 1] and not any(_pads(node))


def _pads(node: Node) -> list[int]:
    pads = node.attributes.get("pads") or [0, 0, 0, 0]
    return list(pads) if isinstance(pads, list) else [0, 0, 0, 0]


def _taken_apart(graph: OnnxGraph, layers: list[Layer]) -> Iterator[Node]:
    """The layers' own matrices out of the packed inputs, in each precision that layers have."""
    types = {graph.types[f"{_PREFIX}{layer.module}.weight"] for layer in layers}
    for element in sorted(types):
        for name, axis in ((DOWN, 1), (UP, 2)):
            source = name
            if element != FLOAT:
                source = f"{name}_{element}"
                yield Node(operator="Cast", inputs=[name], outputs=[source], attributes={"to": element})
            sizes = [layer.height if name == DOWN else layer.width for layer in layers]
            parts = [_part(name, i, element) for i in range(len(layers))]
            yield from _split(graph, source, axis, sizes, parts)


def _split(graph: OnnxGraph, source: str, axis: int, sizes: list[int], parts: list[str]) -> Iterator[Node]:
    """One tensor in parts of these sizes: at once, or many by groups of at most `MOST_PARTS`."""
    groups = [range(i, min(i + MOST_PARTS, len(parts))) for i in range(0, len(parts), MOST_PARTS)]
    if len(groups) > 1:
        names = [f"{source}_group_{i}" for i in range(len(groups))]
        yield from _split(graph, source, axis, [sum(sizes[i] for i in g) for g in groups], names)
    else:
        names = [source]
    for name, group in zip(names, groups, strict=True):
        lengths = graph.add_integers(f"{name}_sizes", [sizes[i] for i in group])
        outputs = [parts[i] for i in group]
        yield Node(operator="Split", inputs=[name, lengths], outputs=outputs, attributes={"axis": axis})


def _part(name: str, index: int, element: int) -> str:
    return f"{name}_{index}_{element}"


def _changed(node: Node, index: int, graph: OnnxGraph, element: int) -> Iterator[Node]:
    """The layer, and its result with the change added: nodes whose last output has the name of the layer's own."""
    down, up = _part(DOWN, index, element), _part(UP, index, element)
    result, own, prefix = node.outputs[0], f"{node.outputs[0]}_own", f"lora_{index}_"
    yield Node(
        operator=node.operator,
        inputs=list(node.inputs),
        outputs=[own],
        attributes=dict(node.attributes),
        domain=node.domain,
    )
    x = node.inputs[0]
    if node.operator == "Conv":
        yield from _of_patches(node, x, graph, prefix)
        # up^T (down^T z), with z [rows, in * kh * kw, h * w]
        for name, matrix in (("narrow", down), ("wide", up)):
            yield Node(operator="Transpose", inputs=[matrix], outputs=[prefix + name], attributes={"perm": [0, 2, 1]})
        yield Node(operator="MatMul", inputs=[prefix + "narrow", prefix + "patches"], outputs=[prefix + "low"])
        yield Node(operator="MatMul", inputs=[prefix + "wide", prefix + "low"], outputs=[prefix + "flat"])
        yield Node(operator="Shape", inputs=[own], outputs=[prefix + "shape"])
        yield Node(operator="Reshape", inputs=[prefix + "flat", prefix + "shape"], outputs=[prefix + "change"])
    else:
        lone = node.operator == "Gemm"
        if lone:
            axis = graph.add_integers("lora_axis", [1])
            yield Node(operator="Unsqueeze", inputs=[x, axis], outputs=[prefix + "row"])
        change = prefix + ("rows" if lone else "change")
        yield Node(operator="MatMul", inputs=[prefix + "row" if lone else x, down], outputs=[prefix + "low"])
        yield Node(operator="MatMul", inputs=[prefix + "low", up], outputs=[change])
        if lone:
            yield Node(operator="Squeeze", inputs=[change, axis], outputs=[prefix + "change"])
    yield Node(operator="Add", inputs=[own, prefix + "change"], outputs=[result])


def _of_patches(node: Node, x: str, graph: OnnxGraph, prefix: str) -> Iterator[Node]:
    """What each place of a convolution's result sees of its input, [rows, kh * kw * in, h * w]."""
    kernel = graph.constants[node.inputs[1]][2:]
    pads, stated = _pads(node), node.attributes.get("strides")
    strides = list(stated) if isinstance(stated, list) else [1, 1]
    patches = x
    if not _is_pointwise(node, kernel):
        padded = x
        if any(pads):
            padded = prefix + "padded"
            edges = graph.add_integers(f"lora_pads_{'_'.join(map(str, pads))}", [0, 0, *pads[:2], 0, 0, *pads[2:]])
            yield Node(operator="Pad", inputs=[x, edges], outputs=[padded])
        axes = graph.add_integers("lora_sides", [2, 3])
        steps = graph.add_integers(f"lora_steps_{strides[0]}_{strides[1]}", strides)
        shifted = []
        for i in range(kernel[0]):
            for j in range(kernel[1]):
                ends = [_LAST if at == size - 1 else at + 1 - size for at, size in zip((i, j), kernel, strict=True)]
                begin = graph.add_integers(f"lora_from_{i}_{j}", [i, j])
                end = graph.add_integers(f"lora_to_{i}_{j}_{kernel[0]}_{kernel[1]}", ends)
                shifted.append(f"{prefix}at_{i}_{j}")
                yield Node(operator="Slice", inputs=[padded, begin, end, axes, steps], outputs=[shifted[-1]])
        patches = prefix + "seen"
        yield Node(operator="Concat", inputs=shifted, outputs=[patches], attributes={"axis": 1})
    flat = graph.add_integers("lora_flat", [0, 0, -1])
    yield Node(operator="Reshape", inputs=[patches, flat], outputs=[prefix + "patches"])
