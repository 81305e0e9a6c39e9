"""Forms of operators for which ONNX Runtime's CPU provider has its fastest kernels, put in before it optimises a graph.

Attention over [B, heads, S, D] between transposes becomes attention over [B, S, heads * D]. The runtime has two:
`MultiHeadAttention` keeps a block of scores in the cache (Dao et al. 2022), where ONNX's own operator writes all S x S
to memory, which is faster while these are few.

GroupNormalization has no kernel: the runtime inlines its definition, some twenty nodes. A group is an instance once the
activation is seen as [B, groups, rest], so it becomes y = scale * InstanceNormalization(x) + bias with scale and bias
by channel (Wu and He 2018, 3.1): a Mul and an Add on all threads, or for small ones BatchNormalization with mean 0 and
variance 1, which is one pass on one thread.

Shapes of Reshape that are computed at each run become constants, where 0 (the input's own) and -1 can say them, or are
read from a feature map that has them.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from .merge import ONNX, drop_unused, makers_of, merge_products, merge_projections, split_gates, turned_weight
from .onnx_bytes import FLOAT, Node, OnnxGraph, read_graph, users_of
from .symbolic import count_elements

CONTRIB = "com.microsoft"
SMALL = 1 << 18
"""Elements of an activation up to which one pass on one thread is faster than two passes on all."""
FEW_SCORES = 1 << 15
"""Of one attention: up to so many, writing them all to memory is faster than working by blocks."""
SHARED_NORMS = "shared normalisations"
_WITH_GRAPHS = ("If", "Loop", "Scan")
_HEADS_FIRST = [0, 2, 1, 3]


def rewrite_for_cpu(model: bytes, dims: Mapping[str, int] | None = None) -> tuple[bytes, dict[str, int]]:
    """The model in these forms, and how many operators took each; `dims` are the sizes that it runs at most often.

    Raises `CorruptError`.
    """
    graph = read_graph(model)
    if any(n.operator in _WITH_GRAPHS for n in graph.nodes):
        return model, {}  # the graphs inside them read tensors that no list of inputs names
    counts = {
        "Attention": fuse_attention(graph, dims),
        "InstanceNormalization": replace_group_norms(graph, dims),
        SHARED_NORMS: share_normals(graph),
        "Reshape": fix_reshapes(graph),
        "gated units": split_gates(graph),
        "merged": merge_products(graph) + merge_projections(graph),
        "unused": drop_unused(graph),
    }
    return (graph.to_bytes() if any(counts.values()) else model), counts


def rewrite_with_weights(model: bytes, dims: Mapping[str, int] | None = None) -> tuple[bytes, dict[str, int]]:
    """As `rewrite_for_cpu`, with every weight left as the file has it: nothing is merged, and no matrix is turned.

    What reads x W^T reads W, so that another W is another array and no copy of one. Raises `CorruptError`.
    """
    graph = read_graph(model)
    counts = {
        "Attention": fuse_attention(graph, dims),
        "InstanceNormalization": replace_group_norms(graph, dims),
        SHARED_NORMS: share_normals(graph),
        "Reshape": fix_reshapes(graph),
        "products": read_weights_turned(graph),
        "unused": drop_unused(graph),
    }
    return graph.to_bytes(), counts


def read_weights_turned(graph: OnnxGraph) -> int:
    """Put `FusedMatMul`, which turns matrices itself, for MatMul of a constant's Transpose; returns how many."""
    makers = makers_of(graph.nodes)
    turned = {id(n): w for n in graph.nodes if (w := turned_weight(n, makers, graph)) is not None}
    for i, node in enumerate(graph.nodes):
        if id(node) in turned:
            inputs = [node.inputs[0], turned[id(node)]]
            graph.nodes[i] = Node(
                operator="FusedMatMul", domain=CONTRIB, inputs=inputs, outputs=node.outputs, attributes={"transB": 1}
            )
    if turned:
        graph.opsets[CONTRIB] = 1
    return len(turned)


def fuse_attention(graph: OnnxGraph, dims: Mapping[str, int] | None = None) -> int:
    """Put attention that splits heads itself in place of Attention and the transposes round it; returns how many.

    Where there are at most `FEW_SCORES`, when dimensions are `dims`, it is ONNX's own in its form of rank 3; elsewhere
    `MultiHeadAttention`. That knows no mask of this kind, for which ONNX's own is taken up to `SMALL` scores.
    """
    makers, users = makers_of(graph.nodes), users_of(graph.nodes)
    fused: dict[int, Node] = {}
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
        if any(graph.shapes[n][1::2] != (heads, width) for n in node.inputs[1:3]):
            continue
        rows, near, far = (*graph.shapes[node.inputs[0]][::2][:2], graph.shapes[node.inputs[1]][2])
        scores = count_elements((rows, heads, near, far), dims) if dims else None
        masked = len(sources) > 3
        small = scores is not None and scores <= (SMALL if masked else FEW_SCORES)
        if masked and not small:
            continue
        # reshape(transpose(attention(Q, K, V))) = attention of q, k, v [B, S, heads * D], of which these are the heads
        names = ("q_num_heads", "kv_num_heads") if small else ("num_heads",)
        attributes: dict[str, float | int | list[int]] = dict.fromkeys(names, heads)
        if "scale" in node.attributes:
            attributes["scale"] = node.attributes["scale"]
        fused[id(last)] = Node(
            operator="Attention" if small else "MultiHeadAttention",
            domain="" if small else CONTRIB,
            inputs=sources,
            outputs=list(last.outputs),
            attributes=attributes,
        )
        dropped |= {id(node), id(after)}
    if fused:
        graph.nodes = [fused.get(id(n), n) for n in graph.nodes if id(n) not in dropped]
        graph.opsets[CONTRIB] = 1
    return len(fused)


def _attention_sources(node: Node, makers: Mapping[str, Node], graph: OnnxGraph) -> list[str] | None:
    """Query, key and value as [B, S, heads * D], where Attention got them split and transposed, and the mask if any."""
    if node.operator != "Attention" or node.domain not in ONNX or len(node.outputs) != 1:
        return None
    if len(node.inputs) not in (3, 4) or node.attributes.get("is_causal") or node.attributes.get("softcap"):
        return None
    sources = []
    for name in node.inputs[:3]:
        transpose = makers.get(name)
        reshape = makers.get(transpose.inputs[0]) if transpose is not None else None
        if transpose is None or reshape is None or len(graph.shapes.get(name, ())) != 4:
            return None
        if transpose.operator != "Transpose" or transpose.attributes.get("perm") != _HEADS_FIRST:
            return None
        shape, whole = graph.shapes[name], graph.shapes.get(reshape.inputs[0], ())
        if reshape.operator != "Reshape" or len(whole) != 3 or whole[2] != _product(shape[1], shape[3]):
            return None
        sources.append(reshape.inputs[0])
    return sources + node.inputs[3:]


def _only_user(name: str, users: Mapping[str, list[Node]], graph: OnnxGraph, operator: str) -> Node | None:
    """The one node that reads a tensor, if it is of this kind and the tensor is no output of the model."""
    readers = users.get(name, [])
    if len(readers) != 1 or name in graph.outputs or readers[0].operator != operator:
        return None
    return readers[0]


def replace_group_norms(graph: OnnxGraph, dims: Mapping[str, int] | None = None) -> int:
    """Put `InstanceNormalization` of the groups in place of each GroupNormalization; returns how many there were.

    What has at most `SMALL` elements where dimensions are `dims` gets its scale and bias from BatchNormalization.
    """
    nodes: list[Node] = []
    count = 0
    for node in graph.nodes:
        size = count_elements(graph.shapes.get(node.inputs[0]) or (None,), dims) if dims and node.inputs else None
        replacement = _group_norm(node, graph, f"groupnorm_{count}_", small=size is not None and size <= SMALL)
        nodes += replacement or [node]
        count += bool(replacement)
    graph.nodes = nodes
    return count


def share_normals(graph: OnnxGraph) -> int:
    """Normalise what several of them normalise once: they differ in scale and bias behind it. Returns how many less."""
    known: dict[tuple[object, ...], str] = {}
    renamed: dict[str, str] = {}
    for node in graph.nodes:
        if renamed.keys() & set(node.inputs):
            node.inputs, node.raw = [renamed.get(i, i) for i in node.inputs], None
        if node.operator in ("InstanceNormalization", "Reshape") and node.outputs[0].startswith("groupnorm_"):
            first = known.setdefault((node.operator, *node.inputs, str(node.attributes)), node.outputs[0])
            if first != node.outputs[0]:
                renamed[node.outputs[0]] = first
    shared = [n for n in graph.nodes if n.operator == "InstanceNormalization" and n.outputs[0] in renamed]
    graph.nodes = [n for n in graph.nodes if n.outputs[0] not in renamed]
    return len(shared)


def _group_norm(node: Node, graph: OnnxGraph, prefix: str, *, small: bool) -> list[Node]:
    """The nodes of one normalisation; none for another operator, another type, or unknown shapes."""
    if node.operator != "GroupNormalization" or node.domain not in ONNX or len(node.inputs) != 3:
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
    ones, zeros = (_filled(graph, groups, value) for value in (1.0, 0.0))

    def new(operator: str, inputs: list[str], output: str, **attributes: float) -> Node:
        return Node(operator=operator, inputs=inputs, outputs=[output], attributes=dict(attributes))

    # (x - mean) / sqrt(var + eps), with mean and variance of a group: of an instance of [B, groups, rest]
    result = [
        new("Reshape", [x, split], prefix + "groups"),
        new("InstanceNormalization", [prefix + "groups", ones, zeros], prefix + "normal", epsilon=epsilon),
        new("Reshape", [prefix + "normal", joined], prefix + "joined"),
    ]
    output = node.outputs[0] if known else prefix + "moved"
    if small:
        # (normal - 0) / sqrt(1 + 0) * scale + bias
        mean, variance = (_filled(graph, channels[0], value) for value in (0.0, 1.0))
        result.append(new("BatchNormalization", [prefix + "joined", scale, bias, mean, variance], output, epsilon=0.0))
    else:
        # normal * scale + bias
        affine = graph.add_integers(f"groupnorm_affine_{rank}", [-1] + [1] * (rank - 2))
        result += [
            new("Reshape", [scale, affine], prefix + "scale"),
            new("Reshape", [bias, affine], prefix + "bias"),
            new("Mul", [prefix + "joined", prefix + "scale"], prefix + "scaled"),
            new("Add", [prefix + "scaled", prefix + "bias"], output),
        ]
    if not known:
        result.append(new("Shape", [x], prefix + "shape"))
        result.append(new("Reshape", [prefix + "moved", prefix + "shape"], node.outputs[0]))
    return result


def _filled(graph: OnnxGraph, count: int, value: float) -> str:
    return graph.add_constant(f"{count}_times_{value:g}", FLOAT, [count], struct.pack("<f", value) * count)


def fix_reshapes(graph: OnnxGraph) -> int:
    """Give every Reshape that allows it a constant shape, or that of a feature map; returns how many took one.

    What computed the shape falls away.
    """
    nodes: list[Node] = []
    maps: dict[tuple[int | str | None, ...], str] = {}
    makers = makers_of(graph.nodes)
    count = 0
    for node in graph.nodes:
        if node.operator == "InstanceNormalization" and (grouped := makers.get(node.inputs[0])) is not None:
            maps.setdefault(graph.shapes.get(grouped.inputs[0], ()), grouped.inputs[0])
        if node.operator != "Reshape" or node.domain not in ONNX or node.inputs[1] in graph.constants:
            nodes.append(node)
            continue
        shape = graph.shapes.get(node.outputs[0])
        target = _constant_target(graph.shapes.get(node.inputs[0]), shape)
        name = None if target is None else graph.add_integers("reshape_to_" + "_".join(map(str, target)), target)
        if name is None and shape is not None and len(shape) == 4 and None not in shape:
            name = _shape_of(maps.get((shape[0], shape[3], shape[1], shape[2])), nodes, graph)
        if name is None:
            nodes.append(node)
            continue
        nodes.append(Node(operator="Reshape", inputs=[node.inputs[0], name], outputs=list(node.outputs)))
        count += 1
    graph.nodes = nodes
    return count


def _shape_of(feature_map: str | None, nodes: list[Node], graph: OnnxGraph) -> str | None:
    """The shape [B, H, W, C] of a feature map [B, C, H, W], which Reshape gives to tokens; `None` for no map."""
    if feature_map is None:
        return None
    name = f"{feature_map}_channels_last"
    if not any(name in n.outputs for n in nodes):
        order = graph.add_integers("channels_last", [0, 2, 3, 1])
        nodes.append(Node(operator="Shape", inputs=[feature_map], outputs=[f"{feature_map}_shape"]))
        nodes.append(Node(operator="Gather", inputs=[f"{feature_map}_shape", order], outputs=[name]))
    return name


def _constant_target(
    source: tuple[int | str | None, ...] | None, shape: tuple[int | str | None, ...] | None
) -> list[int] | None:
    """A shape for Reshape in numbers, 0 and at most one -1; `None` when there is none."""
    if source is None or shape is None:
        return None
    target = []
    for i, size in enumerate(shape):
        if isinstance(size, int):
            if size < 1:
                return None
            target.append(size)
        else:
            # 0 is the input's own size, and the one -1 what the number of elements leaves
            target.append(0 if size is not None and i < len(source) and source[i] == size else -1)
    return target if target.count(-1) <= 1 else None


def _product(one: int | str | None, other: int | str | None) -> int | None:
    return one * other if isinstance(one, int) and isinstance(other, int) else None


def _number(value: float | int | list[int]) -> float:
    return 0.0 if isinstance(value, list) else value
