"""Forms of operators for which ONNX Runtime's CPU provider has its fastest kernels, put in before it optimises a graph.

Attention over [B, heads, S, D] between transposes becomes `MultiHeadAttention` over [B, S, heads * D], whose kernel
keeps a block of scores in the cache (Dao et al. 2022) where the other writes all S x S of them to memory.

GroupNormalization has no kernel: the runtime inlines its definition, some twenty nodes. A group is an instance once the
activation is seen as [B, groups, rest], so it becomes y = scale * InstanceNormalization(x) + bias with scale and bias
by channel (Wu and He 2018, 3.1).

Shapes of Reshape that are computed at each run become constants, where 0 (the input's own) and -1 can say them.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from .onnx_bytes import FLOAT, Graph, Node, read_graph, users_of

CONTRIB = "com.microsoft"
_ONNX = ("", "ai.onnx")
_HEADS_FIRST = [0, 2, 1, 3]


def rewrite_for_cpu(model: bytes) -> tuple[bytes, dict[str, int]]:
    """The model in these forms, and how many operators took each. Raises `CorruptError`."""
    graph = read_graph(model)
    counts = {
        "MultiHeadAttention": fuse_attention(graph),
        "InstanceNormalization": replace_group_norms(graph),
        "Reshape": fix_reshapes(graph),
    }
    return (graph.to_bytes() if any(counts.values()) else model), counts


def fuse_attention(graph: Graph) -> int:
    """Put `MultiHeadAttention` in place of Attention without a mask and the transposes round it; returns how many."""
    makers = {o: n for n in graph.nodes for o in n.outputs}
    users = users_of(graph.nodes)
    made: dict[int, Node] = {}
    dropped: set[int] = set()
    for node in graph.nodes:
        sources = _attention_sources(node, makers, graph)
        after = _only_user(node.outputs[0], users, graph, "Transpose")
        last = None if after is None else _only_user(after.outputs[0], users, graph, "Reshape")
        if sources is None or after is None or last is None or after.attributes.get("perm") != _HEADS_FIRST:
            continue
        heads, width = graph.shapes[node.inputs[0]][1], graph.shapes[node.inputs[0]][3]
        if not isinstance(heads, int) or not isinstance(width, int):
            continue
        if graph.shapes.get(last.outputs[0], ())[2:] != (heads * width,):
            continue
        attributes: dict[str, float | int | list[int]] = {"num_heads": heads}
        if "scale" in node.attributes:
            attributes["scale"] = node.attributes["scale"]
        made[id(last)] = Node(
            operator="MultiHeadAttention",
            domain=CONTRIB,
            inputs=sources,
            outputs=list(last.outputs),
            attributes=attributes,
        )
        dropped |= {id(node), id(after)}
    if made:
        graph.nodes = [made.get(id(n), n) for n in graph.nodes if id(n) not in dropped]
        graph.opsets[CONTRIB] = 1
    return len(made)


def _attention_sources(node: Node, makers: Mapping[str, Node], graph: Graph) -> list[str] | None:
    """Query, key and value as [B, S, heads * D], where a plain Attention got them split and transposed."""
    if node.operator != "Attention" or node.domain not in _ONNX or len(node.inputs) != 3 or len(node.outputs) != 1:
        return None
    if node.attributes.get("is_causal") or node.attributes.get("softcap"):
        return None
    found = []
    for name in node.inputs:
        transpose = makers.get(name)
        reshape = makers.get(transpose.inputs[0]) if transpose is not None else None
        if transpose is None or reshape is None or len(graph.shapes.get(name, ())) != 4:
            return None
        if transpose.operator != "Transpose" or transpose.attributes.get("perm") != _HEADS_FIRST:
            return None
        shape, whole = graph.shapes[name], graph.shapes.get(reshape.inputs[0], ())
        if reshape.operator != "Reshape" or len(whole) != 3 or whole[2] != _product(shape[1], shape[3]):
            return None
        found.append(reshape.inputs[0])
    return found


def _only_user(name: str, users: Mapping[str, list[Node]], graph: Graph, operator: str) -> Node | None:
    """The one node that reads a tensor, if it is of this kind and the tensor is no output of the model."""
    found = users.get(name, [])
    if len(found) != 1 or name in graph.outputs or found[0].operator != operator:
        return None
    return found[0]


def replace_group_norms(graph: Graph) -> int:
    """Put `InstanceNormalization` of the groups in place of each GroupNormalization; returns how many there were."""
    nodes: list[Node] = []
    count = 0
    for node in graph.nodes:
        made = _group_norm(node, graph, f"groupnorm_{count}_")
        nodes += made or [node]
        count += bool(made)
    graph.nodes = nodes
    return count


def _group_norm(node: Node, graph: Graph, prefix: str) -> list[Node]:
    """The nodes of one normalisation; none for another operator, another type, or unknown shapes."""
    if node.operator != "GroupNormalization" or node.domain not in _ONNX or len(node.inputs) != 3:
        return []
    x, scale, bias = node.inputs
    channels = graph.constants.get(scale, ())
    groups, epsilon = node.attributes.get("num_groups"), float(_number(node.attributes.get("epsilon", 1e-5)))
    if len(channels) != 1 or graph.constants.get(bias) != channels or not isinstance(groups, int):
        return []
    if graph.types.get(scale) != FLOAT:  # the kernel for instances is float32's alone
        return []
    known = len(graph.shapes.get(x, ()))
    rank = max(3, known)  # of an unknown rank: as [B, C, rest], and back to the shape it had
    rest = [0] * (rank - 3)
    split = graph.add_integers(f"groupnorm_split_{groups}_{rank}", [0, groups, -1, *rest])
    joined = graph.add_integers(f"groupnorm_joined_{channels[0]}_{rank}", [0, channels[0], -1, *rest])
    affine = graph.add_integers(f"groupnorm_affine_{rank}", [-1] + [1] * (rank - 2))
    ones = graph.add_constant(f"groupnorm_ones_{groups}", FLOAT, [groups], struct.pack("<f", 1.0) * groups)
    zeros = graph.add_constant(f"groupnorm_zeros_{groups}", FLOAT, [groups], bytes(4 * groups))

    def made(operator: str, inputs: list[str], output: str, **attributes: float) -> Node:
        return Node(operator=operator, inputs=inputs, outputs=[output], attributes=dict(attributes))

    result = [
        made("Reshape", [x, split], prefix + "groups"),
        made("InstanceNormalization", [prefix + "groups", ones, zeros], prefix + "normal", epsilon=epsilon),
        made("Reshape", [prefix + "normal", joined], prefix + "joined"),
        made("Reshape", [scale, affine], prefix + "scale"),
        made("Reshape", [bias, affine], prefix + "bias"),
        made("Mul", [prefix + "joined", prefix + "scale"], prefix + "scaled"),
        made("Add", [prefix + "scaled", prefix + "bias"], node.outputs[0] if known else prefix + "moved"),
    ]
    if not known:
        result.append(made("Shape", [x], prefix + "shape"))
        result.append(made("Reshape", [prefix + "moved", prefix + "shape"], node.outputs[0]))
    return result


def fix_reshapes(graph: Graph) -> int:
    """Give every Reshape that allows it a constant shape; what computed the shape falls away. Returns how many."""
    count = 0
    for index, node in enumerate(graph.nodes):
        if node.operator != "Reshape" or node.domain not in _ONNX or node.inputs[1] in graph.constants:
            continue
        target = _constant_target(graph.shapes.get(node.inputs[0]), graph.shapes.get(node.outputs[0]))
        if target is None:
            continue
        name = graph.add_integers("reshape_to_" + "_".join(map(str, target)), target)
        graph.nodes[index] = Node(operator="Reshape", inputs=[node.inputs[0], name], outputs=list(node.outputs))
        count += 1
    return count


def _constant_target(
    found: tuple[int | str | None, ...] | None, wanted: tuple[int | str | None, ...] | None
) -> list[int] | None:
    """A shape for Reshape in numbers, 0 and at most one -1; `None` when there is none."""
    if found is None or wanted is None:
        return None
    target = []
    for i, size in enumerate(wanted):
        if isinstance(size, int):
            if size < 1:
                return None
            target.append(size)
        else:
            target.append(0 if size is not None and i < len(found) and found[i] == size else -1)
    return target if target.count(-1) <= 1 else None


def _product(one: int | str | None, other: int | str | None) -> int | None:
    return one * other if isinstance(one, int) and isinstance(other, int) else None


def _number(value: float | int | list[int]) -> float:
    return 0.0 if isinstance(value, list) else value
