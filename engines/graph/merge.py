"""Fewer and larger nodes, for ONNX Runtime on the CPU: small models spend as long between operators as in them.

Merged before the runtime optimises a graph are the products of one input and the projections of one embedding. A gated
unit is taken apart instead, which saves the copy of its halves. Then goes whatever nobody reads: the runtime runs such
nodes, once their readers were replaced.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from .onnx_bytes import Node, OnnxGraph, users_of

ONNX = ("", "ai.onnx")
MOST_COLUMNS = 4096
"""Of a merged product: larger ones fill the cores by themselves, and their results would all lie in memory at once."""


def merge_products(graph: OnnxGraph) -> int:
    """Multiply what several linear layers read by all their weights at once, and split the result before any biases.

    Queries, keys and values of self-attention are three of one input; keys and values of cross-attention, in all of a
    UNet's blocks, are products of the one prompt. Returns how many products are gone.
    """
    makers = makers_of(graph.nodes)
    groups: dict[str, list[tuple[Node, str]]] = {}
    for node in graph.nodes:
        weight = turned_weight(node, makers, graph)
        if weight is not None and len(graph.shapes.get(node.inputs[0], ())) == 3:
            groups.setdefault(node.inputs[0], []).append((node, weight))
    groups = {
        name: layers for name, layers in groups.items() if len(layers) > 1 and _columns(layers, graph) <= MOST_COLUMNS
    }
    placed = {id(layers[0][0]): list(_product(name, layers, graph)) for name, layers in groups.items()}
    dropped = {id(node) for layers in groups.values() for node, _ in layers}
    graph.nodes = [m for n in graph.nodes for m in placed.get(id(n), [] if id(n) in dropped else [n])]
    return sum(len(layers) - 1 for layers in groups.values())


def _columns(layers: Sequence[tuple[Node, str]], graph: OnnxGraph) -> int:
    return sum(graph.constants[weight][0] for _, weight in layers)


def turned_weight(node: Node, makers: Mapping[str, Node], graph: OnnxGraph) -> str | None:
    """The constant [D, C] of x W^T, before its transposition."""
    turned = makers.get(node.inputs[1]) if node.operator == "MatMul" and node.domain in ONNX else None
    if (
        turned is None
        or turned.domain not in ONNX
        or turned.operator != "Transpose"
        or turned.attributes.get("perm") != [1, 0]
    ):
        return None
    return turned.inputs[0] if len(graph.constants.get(turned.inputs[0], ())) == 2 else None


def _product(name: str, layers: Sequence[tuple[Node, str]], graph: OnnxGraph) -> Iterator[Node]:
    # [x W1^T, x W2^T, ...] = x [W1; W2; ...]^T
    prefix, weights = f"{name}_times_", [w for _, w in layers]
    yield Node(operator="Concat", inputs=weights, outputs=[prefix + "rows"], attributes={"axis": 0})
    yield Node(operator="Transpose", inputs=[prefix + "rows"], outputs=[prefix + "weight"], attributes={"perm": [1, 0]})
    yield Node(operator="MatMul", inputs=[name, prefix + "weight"], outputs=[prefix + "all"])
    sizes = graph.add_integers(prefix + "sizes", [graph.constants[w][0] for w in weights])
    outputs = [node.outputs[0] for node, _ in layers]
    yield Node(operator="Split", inputs=[prefix + "all", sizes], outputs=outputs, attributes={"axis": 2})


def merge_projections(graph: OnnxGraph) -> int:
    """Compute all Gemms of one input as a single one, where each adds to a feature map: a UNet's timestep, by block.

    Returns how many are gone.
    """
    users = users_of(graph.nodes)
    groups: dict[str, list[tuple[Node, Node]]] = {}
    for node in graph.nodes:
        after = users.get(node.outputs[0], [])
        if len(after) == 1 and _is_projection(node, after[0], graph):
            groups.setdefault(node.inputs[0], []).append((node, after[0]))
    groups = {name: pairs for name, pairs in groups.items() if len(pairs) > 1}
    placed = {id(pairs[0][0]): list(_projection(name, pairs, graph)) for name, pairs in groups.items()}
    dropped = {id(n) for pairs in groups.values() for pair in pairs for n in pair}
    graph.nodes = [m for n in graph.nodes for m in placed.get(id(n), [] if id(n) in dropped else [n])]
    return sum(len(pairs) - 1 for pairs in groups.values())


def _is_projection(node: Node, after: Node, graph: OnnxGraph) -> bool:
    """Whether this is x W^T + b with constants W [C, D] and b [C], and what follows makes [B, C, 1, 1] of it."""
    if node.operator != "Gemm" or node.domain not in ONNX or len(node.inputs) != 3 or node.outputs[0] in graph.outputs:
        return False
    plain = {"transA": 0, "transB": 1, "alpha": 1.0, "beta": 1.0}
    if any(node.attributes.get(k, 0 if k.startswith("trans") else 1.0) != v for k, v in plain.items()):
        return False
    weight, bias = (graph.constants.get(i, ()) for i in node.inputs[1:])
    if len(weight) != 2 or bias != weight[:1] or after.operator != "Unsqueeze":
        return False
    return graph.shapes.get(after.outputs[0], ())[1:] == (weight[0], 1, 1)


def _projection(name: str, pairs: Sequence[tuple[Node, Node]], graph: OnnxGraph) -> Iterator[Node]:
    # [x W1^T + b1, x W2^T + b2, ...] = x [W1; W2; ...]^T + [b1, b2, ...]
    prefix = f"{name}_projected_"
    gemms = [gemm for gemm, _ in pairs]
    axis: dict[str, float | int | list[int]] = {"axis": 0}
    for index, what in ((1, "weight"), (2, "bias")):
        yield Node(operator="Concat", inputs=[g.inputs[index] for g in gemms], outputs=[prefix + what], attributes=axis)
    inputs = [name, prefix + "weight", prefix + "bias"]
    yield Node(operator="Gemm", inputs=inputs, outputs=[prefix + "all"], attributes={"transB": 1})
    axes = graph.add_integers("projected_axes", [2, 3])
    yield Node(operator="Unsqueeze", inputs=[prefix + "all", axes], outputs=[prefix + "maps"])
    sizes = graph.add_integers(prefix + "sizes", [graph.constants[g.inputs[2]][0] for g in gemms])
    outputs = [after.outputs[0] for _, after in pairs]
    yield Node(operator="Split", inputs=[prefix + "maps", sizes], outputs=outputs, attributes={"axis": 1})


def split_gates(graph: OnnxGraph) -> int:
    """Compute the two halves of a gated unit (GEGLU, Shazeer 2020) by two products instead of splitting one's result.

    The half that goes through GELU then meets its bias in the same operator. Returns how many there were.
    """
    makers, users = makers_of(graph.nodes), users_of(graph.nodes)
    placed: dict[int, list[Node]] = {}
    dropped: set[int] = set()
    for node in graph.nodes:
        parts = _gate(node, makers, users, graph)
        if parts is None:
            continue
        product, weight, total, bias = parts
        placed[id(node)] = list(_halves(node, product.inputs[0], weight, bias))
        dropped |= {id(product), id(total), id(node)}
    graph.nodes = [m for n in graph.nodes for m in placed.get(id(n), [] if id(n) in dropped else [n])]
    return len(placed)


def _gate(
    node: Node, makers: Mapping[str, Node], users: Mapping[str, Sequence[Node]], graph: OnnxGraph
) -> tuple[Node, str, Node, str] | None:
    """Before a split in two: the product, its weight [2 D, C], the sum with its bias [2 D], and that bias."""
    if node.operator != "Split" or node.domain not in ONNX or len(node.outputs) != 2 or len(node.inputs) != 1:
        return None
    shape, total = graph.shapes.get(node.inputs[0], ()), makers.get(node.inputs[0])
    if len(shape) != 3 or node.attributes.get("axis") not in (2, -1) or total is None or total.operator != "Add":
        return None
    for product_name, bias in (total.inputs, total.inputs[::-1]):
        product = makers.get(product_name)
        weight = None if product is None else turned_weight(product, makers, graph)
        if product is None or weight is None or graph.constants.get(bias) != shape[2:]:
            continue
        alone = all(len(users[n]) == 1 and n not in graph.outputs for n in (product_name, total.outputs[0]))
        return (product, weight, total, bias) if alone and graph.constants[weight][:1] == shape[2:] else None
    return None


def _halves(node: Node, source: str, weight: str, bias: str) -> Iterator[Node]:
    # split(x [W1; W2]^T + [b1, b2]) = (x W1^T + b1, x W2^T + b2)
    halves: dict[str, float | int | list[int]] = {"axis": 0, "num_outputs": 2}
    names = [f"{output}_half" for output in node.outputs]
    yield Node(operator="Split", inputs=[weight], outputs=[n + "_rows" for n in names], attributes=halves)
    yield Node(operator="Split", inputs=[bias], outputs=[n + "_bias" for n in names], attributes=halves)
    for name, output in zip(names, node.outputs, strict=True):
        turn: dict[str, float | int | list[int]] = {"perm": [1, 0]}
        yield Node(operator="Transpose", inputs=[name + "_rows"], outputs=[name + "_weight"], attributes=turn)
        yield Node(operator="MatMul", inputs=[source, name + "_weight"], outputs=[name])
        yield Node(operator="Add", inputs=[name, name + "_bias"], outputs=[output])


def drop_unused(graph: OnnxGraph) -> int:
    """Remove the nodes that nothing reads, and what only they read; returns how many."""
    needed, kept = set(graph.outputs), []
    for node in reversed(graph.nodes):
        if needed.intersection(node.outputs):
            kept.append(node)
            needed.update(node.inputs)
    count = len(graph.nodes) - len(kept)
    graph.nodes = kept[::-1]
    return count


def makers_of(nodes: Sequence[Node]) -> Mapping[str, Node]:
    """The node that makes each tensor."""
    return {name: node for node in nodes for name in node.outputs if name}
