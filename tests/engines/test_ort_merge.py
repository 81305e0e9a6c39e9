"""Merged nodes compute what the nodes before them did, and nodes of another form are left alone."""

from __future__ import annotations

import numpy as np
import pytest
from fewstep.engines.graph.accounting import count_operators
from fewstep.engines.graph.merge import MOST_COLUMNS
from fewstep.engines.graph.rewrite import rewrite_for_cpu
from onnx import TensorProto, helper
from small_graph import Shape, model, noise, run

node = helper.make_node
TOKENS: Shape = ["rows", "tokens", 6]


def products(rank: int = 3, columns: int = 4) -> bytes:
    """y = (x A^T, x B^T, z C^T): two products of one input, and one of another."""
    nodes = []
    for name, source in (("a", "x"), ("b", "x"), ("c", "z")):
        nodes.append(node("Transpose", [name], [f"{name}_t"], perm=[1, 0]))
        nodes.append(node("MatMul", [source, f"{name}_t"], [f"{name}_p"]))
    nodes.append(node("Concat", ["a_p", "b_p", "c_p"], ["y"], axis=-1))
    constants = {"a": noise(columns, 6, seed=2), "b": noise(3, 6, seed=3), "c": noise(5, 6, seed=4)}
    tokens: Shape = TOKENS if rank == 3 else ["rows", 6]
    return model(nodes, {"x": tokens, "z": tokens}, [*tokens[:-1], columns + 8], constants)


def test_products_of_one_input_are_one() -> None:
    graph = products()
    rewritten, counts = rewrite_for_cpu(graph)
    assert counts["merged"] == 1
    assert count_operators(rewritten)["MatMul"] == 2
    inputs = {"x": noise(3, 5, 6), "z": noise(3, 5, 6, seed=9)}
    np.testing.assert_allclose(run(rewritten, inputs), run(graph, inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", [{"rank": 2}, {"columns": MOST_COLUMNS}], ids=["of matrices", "large"])
def test_other_products_stay(form: dict[str, int]) -> None:
    rewritten, counts = rewrite_for_cpu(products(**form))
    assert counts["merged"] == 0
    assert count_operators(rewritten)["MatMul"] == 3


def projections(**gemm: float) -> bytes:
    """y [B, 4 + 6, H] from two projections of one embedding, each added to a map of its own; and a third, read bare."""
    nodes = []
    for name in ("one", "two"):
        nodes.append(node("Gemm", ["t", f"{name}_w", f"{name}_b"], [f"{name}_p"], transB=1, **gemm))
        nodes.append(node("Unsqueeze", [f"{name}_p", "axes"], [f"{name}_u"]))
        nodes.append(node("Add", [f"{name}_x", f"{name}_u"], [f"{name}_y"]))
    nodes.append(node("Gemm", ["t", "three_w", "three_b"], ["three_p"], transB=1))
    nodes.append(node("Unsqueeze", ["three_p", "last"], ["three_u"]))
    nodes.append(node("Unsqueeze", ["three_u", "last"], ["three_y"]))
    nodes.append(node("Concat", ["one_y", "two_y", "three_y"], ["y"], axis=1))
    widths = {"one": 4, "two": 6, "three": 2}
    constants = {f"{n}_w": noise(c, 5, seed=i) for i, (n, c) in enumerate(widths.items())}
    constants |= {f"{n}_b": noise(c, seed=9 + i) for i, (n, c) in enumerate(widths.items())}
    constants |= {"axes": np.array([2, 3]), "last": np.array([-1])}
    maps: dict[str, Shape] = {f"{n}_x": ["rows", widths[n], 1, 1] for n in ("one", "two")}
    between: dict[str, Shape] = {f"{n}_u": ["rows", widths[n], 1, 1] for n in ("one", "two")}
    return model(nodes, {"t": ["rows", 5], **maps}, ["rows", 12, 1, 1], constants, **between)


def test_projections_of_one_embedding_are_one_product() -> None:
    graph = projections()
    rewritten, counts = rewrite_for_cpu(graph)
    assert counts["merged"] == 1
    assert count_operators(rewritten)["Gemm"] == 2
    inputs = {"t": noise(3, 5), "one_x": noise(3, 4, 1, 1, seed=2), "two_x": noise(3, 6, 1, 1, seed=3)}
    np.testing.assert_allclose(run(rewritten, inputs), run(graph, inputs), rtol=1e-5, atol=1e-5)


def test_scaled_projections_stay() -> None:
    _, counts = rewrite_for_cpu(projections(alpha=0.5))
    assert counts["merged"] == 0


def gated(read_again: bool = False) -> bytes:
    """y = a * gelu(g) of (a, g) = x W^T + b, as in GEGLU."""
    nodes = [
        node("Transpose", ["w"], ["turned"], perm=[1, 0]),
        node("MatMul", ["x", "turned"], ["product"]),
        node("Add", ["product", "b"], ["biased"]),
        node("Split", ["biased"], ["a", "g"], axis=2, num_outputs=2),
        node("Gelu", ["g"], ["gelu"]),
        node("Mul", ["a", "gelu"], ["gated"]),
        node("ReduceMax", ["biased"], ["most"]) if read_again else node("Exp", ["gated"], ["most"]),
        node("Add", ["gated", "most"], ["y"]),
    ]
    constants = {"w": noise(8, 6, seed=2), "b": noise(8, seed=3)}
    return model(nodes, {"x": TOKENS}, ["rows", "tokens", 4], constants, biased=["rows", "tokens", 8])


def test_the_halves_of_a_gated_unit_are_products_of_their_own() -> None:
    graph = gated()
    rewritten, counts = rewrite_for_cpu(graph)
    assert counts["gated units"] == 1
    assert count_operators(rewritten)["MatMul"] == 2
    x = noise(3, 5, 6)
    np.testing.assert_allclose(run(rewritten, {"x": x}), run(graph, {"x": x}), rtol=1e-5, atol=1e-5)


def test_a_gated_unit_that_is_read_whole_stays() -> None:
    rewritten, counts = rewrite_for_cpu(gated(read_again=True))
    assert counts["gated units"] == 0
    assert count_operators(rewritten)["MatMul"] == 1


def test_what_nobody_reads_goes_with_what_led_to_it() -> None:
    nodes = [node("Exp", ["x"], ["e"]), node("Neg", ["e"], ["n"]), node("Abs", ["n"], ["a"]), node("Exp", ["e"], ["y"])]
    graph = model(nodes, {"x": ["n"]}, ["n"], {})
    rewritten, counts = rewrite_for_cpu(graph)
    assert counts["unused"] == 2
    assert count_operators(rewritten) == {"Exp": 2}


def test_a_graph_with_graphs_inside_is_left_alone() -> None:
    branch = helper.make_graph(
        [node("Neg", ["e"], ["z"])], "branch", [], [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n"])]
    )
    nodes = [
        node("Exp", ["x"], ["e"]),
        node("If", ["true"], ["y"], then_branch=branch, else_branch=branch),
    ]
    graph = model(nodes, {"x": ["n"]}, ["n"], {"true": np.array(True)})
    rewritten, counts = rewrite_for_cpu(graph)
    assert counts == {}
    assert rewritten == graph
