"""Graphs in the operators for which ONNX Runtime has kernels on CUDA.

It has none for GroupNormalization and inlines its definition, 29 nodes with float32 between them. Its own GroupNorm
(`com.microsoft`, contrib_ops/cuda/diffusion/group_norm.cc) takes pictures channels last, with SiLU behind it if asked,
in two kernels; the transposes round it are two copies more. Convolutions stay as they are: whether its layout rules for
CUDA would remove these copies has to be seen on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..graph.merge import ONNX
from ..graph.onnx_bytes import FLOAT, FLOAT16, Node, OnnxGraph, read_graph, users_of
from ..graph.rewrite import CONTRIB

CHANNELS_PER_THREAD = 2
"""Of the kernel: a group has to be a multiple of it wide."""
_TO_LAST = {3: [0, 2, 1], 4: [0, 2, 3, 1]}
_TO_FIRST = {3: [0, 2, 1], 4: [0, 3, 1, 2]}


def rewrite_for_cuda(model: bytes) -> tuple[bytes, dict[str, int]]:
    """The graph with GroupNorm where its kernel admits it, and how many there are. Raises `CorruptError`."""
    graph = read_graph(model)
    counts = {"GroupNorm": fuse_group_norms(graph)}
    return (graph.to_bytes() if counts["GroupNorm"] else model), counts


def fuse_group_norms(graph: OnnxGraph) -> int:
    """Put GroupNorm over channels-last pictures in place of each GroupNormalization and the SiLU behind it."""
    users = users_of(graph.nodes)
    replaced: dict[int, list[Node]] = {}
    dropped: set[int] = set()
    for node in graph.nodes:
        if not _admits(node, graph):
            continue
        silu = _silu(node.outputs[0], users, graph)
        output = silu[1].outputs[0] if silu else node.outputs[0]
        replaced[id(node)] = _channels_last(node, graph, output, f"cuda_groupnorm_{len(replaced)}_", silu=bool(silu))
        dropped |= {id(n) for n in silu}
    if replaced:
        graph.nodes = [n for node in graph.nodes if id(node) not in dropped for n in replaced.get(id(node), [node])]
        graph.opsets[CONTRIB] = 1
    return len(replaced)


def _admits(node: Node, graph: OnnxGraph) -> bool:
    """Whether the kernel takes a normalisation: its element type, a picture or a sequence, channels in pairs."""
    if node.operator != "GroupNormalization" or node.domain not in ONNX or len(node.inputs) != 3:
        return False
    x, scale, bias = node.inputs
    channels, groups = graph.constants.get(scale, ()), node.attributes.get("num_groups")
    if len(channels) != 1 or graph.constants.get(bias) != channels or not isinstance(groups, int):
        return False
    known = len(graph.shapes.get(x, ())) in _TO_LAST and graph.types.get(scale) in (FLOAT, FLOAT16)
    return known and channels[0] % (groups * CHANNELS_PER_THREAD) == 0


def _silu(name: str, users: Mapping[str, list[Node]], graph: OnnxGraph) -> tuple[Node, ...]:
    """The Sigmoid and the Mul that make x sigmoid(x) of a tensor nothing else reads; empty where there are none."""
    readers = users.get(name, [])
    if name in graph.outputs or sorted(n.operator for n in readers) != ["Mul", "Sigmoid"]:
        return ()
    mul, sigmoid = sorted(readers, key=lambda n: n.operator)
    alone = users.get(sigmoid.outputs[0], []) == [mul] and sigmoid.outputs[0] not in graph.outputs
    return (sigmoid, mul) if alone and sorted(mul.inputs) == sorted([name, sigmoid.outputs[0]]) else ()


def _channels_last(node: Node, graph: OnnxGraph, output: str, prefix: str, *, silu: bool) -> list[Node]:
    x, scale, bias = node.inputs
    rank, channels = len(graph.shapes[x]), graph.constants[scale][0]

    def new(operator: str, inputs: list[str], output: str, **attributes: int | list[int]) -> Node:
        return Node(operator=operator, inputs=inputs, outputs=[output], attributes=dict(attributes))

    nodes = [new("Transpose", [x], prefix + "last", perm=_TO_LAST[rank])]
    source, result = prefix + "last", prefix + "normal"
    if rank == 3:  # a sequence is a picture of one line
        line = graph.add_integers(f"cuda_groupnorm_line_{channels}", [0, 1, -1, channels])
        nodes.append(new("Reshape", [source, line], prefix + "line"))
        source, result = prefix + "line", prefix + "normal_line"
    # the kernel takes factor and term of a channel in float32
    of_channels = []
    for name, which in ((scale, "scale"), (bias, "bias")):
        if graph.types[name] != FLOAT:
            nodes.append(new("Cast", [name], prefix + which, to=FLOAT))
        of_channels.append(name if graph.types[name] == FLOAT else prefix + which)
    attributes: dict[str, float | int | list[int]] = {
        "groups": node.attributes["num_groups"],
        "epsilon": node.attributes.get("epsilon", 1e-5),
        "activation": int(silu),
        "channels_last": 1,
    }
    norm = Node(
        operator="GroupNorm", domain=CONTRIB, inputs=[source, *of_channels], outputs=[result], attributes=attributes
    )
    nodes.append(norm)
    if rank == 3:
        sequence = graph.add_integers(f"cuda_groupnorm_sequence_{channels}", [0, -1, channels])
        nodes.append(new("Reshape", [result, sequence], prefix + "normal"))
    return [*nodes, new("Transpose", [prefix + "normal"], output, perm=_TO_FIRST[rank])]
