"""Rewritten graphs compute what the ONNX definitions say, and are left alone where a form does not fit."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from fewstep.engines.graph.accounting import count_operators
from fewstep.engines.graph.onnx_bytes import read_graph
from fewstep.engines.graph.rewrite import rewrite_for_cpu
from fewstep.errors import CorruptError
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from small_graph import Shape, model, noise, run


@pytest.mark.parametrize("shape", [(2, 12, 5, 3), (2, 12, 7)], ids=["an image", "a sequence"])
@pytest.mark.parametrize("known", [True, False], ids=["rank known", "rank unknown"])
def test_group_norm_is_what_onnx_defines(shape: tuple[int, ...], known: bool) -> None:
    symbols: Shape = ["rows", 12, *("height", "width")[: len(shape) - 2]]
    nodes = [
        helper.make_node("Exp", ["x"], ["e"]),
        helper.make_node("GroupNormalization", ["e", "scale", "bias"], ["y"], num_groups=3, epsilon=1e-3),
    ]
    constants = {"scale": noise(12, seed=2), "bias": noise(12, seed=3)}
    graph = model(nodes, {"x": symbols}, symbols, constants, **({"e": symbols} if known else {}))
    x = noise(*shape)
    rewritten, counts = rewrite_for_cpu(graph)
    assert counts["InstanceNormalization"] == 1
    assert "GroupNormalization" not in count_operators(rewritten)
    assert ("Shape" in count_operators(rewritten)) is not known
    expected = ReferenceEvaluator(onnx.load_model_from_string(graph)).run(None, {"x": x})[0]
    np.testing.assert_allclose(run(rewritten, {"x": x}), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", [8, 512], ids=["small", "large"])
def test_a_small_group_norm_gets_scale_and_bias_in_one_pass(side: int) -> None:
    symbols: Shape = ["rows", 12, "2*side", "(((side - 1)//2)) + 1"]
    nodes = [helper.make_node("GroupNormalization", ["x", "scale", "bias"], ["y"], num_groups=3, epsilon=1e-3)]
    constants = {"scale": noise(12, seed=2), "bias": noise(12, seed=3)}
    graph = model(nodes, {"x": symbols}, symbols, constants)
    rewritten, _ = rewrite_for_cpu(graph, {"rows": 1, "side": side})
    found = count_operators(rewritten)
    assert (found["BatchNormalization"], found["Mul"]) == ((1, 0) if side == 8 else (0, 1))
    x = noise(2, 12, 16, 4)
    expected = ReferenceEvaluator(onnx.load_model_from_string(graph)).run(None, {"x": x})[0]
    np.testing.assert_allclose(run(rewritten, {"x": x}), expected, rtol=1e-5, atol=1e-5)


def test_group_norm_in_half_precision_is_left_alone() -> None:
    node = helper.make_node
    nodes = [
        node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16),
        node("GroupNormalization", ["half", "scale", "bias"], ["normal"], num_groups=3),
        node("Cast", ["normal"], ["y"], to=TensorProto.FLOAT),
    ]
    constants = {"scale": noise(12, seed=2).astype(np.float16), "bias": noise(12, seed=3).astype(np.float16)}
    graph = model(nodes, {"x": ["rows", 12, "height"]}, ["rows", 12, "height"], constants)
    rewritten, counts = rewrite_for_cpu(graph)
    assert counts["InstanceNormalization"] == 0
    x = noise(2, 12, 7)
    expected = ReferenceEvaluator(onnx.load_model_from_string(graph)).run(None, {"x": x})[0]
    np.testing.assert_allclose(run(rewritten, {"x": x}), expected, atol=1e-2)


def attention(
    perm: tuple[int, ...] = (0, 2, 1, 3), second_user: bool = False, masked: bool = False, **attributes: float
) -> tuple[bytes, dict[str, np.ndarray]]:
    """Attention of two heads between reshapes and transposes, as our exporter writes it; more keys than queries."""
    node = helper.make_node
    nodes = []
    for name in "qkv":
        nodes.append(node("Reshape", [name, "split"], [f"{name}4"]))
        nodes.append(node("Transpose", [f"{name}4"], [f"{name}t"], perm=perm))
    nodes += [
        node("Attention", ["qt", "kt", "vt", *(["mask"] if masked else [])], ["a"], **attributes),
        node("Transpose", ["a"], ["at"], perm=perm),
        node("Reshape", ["at", "joined"], ["joined_a"]),
        node("Add", ["joined_a", "at_sum"], ["y"]) if second_user else node("Identity", ["joined_a"], ["y"]),
    ]
    if second_user:
        nodes.insert(-1, node("ReduceMean", ["at"], ["at_sum"], keepdims=0))
    heads_first = {f"{n}t": ["rows", 2, s, 4] for n, s in (("q", "near"), ("k", "far"), ("v", "far"))}
    if perm != (0, 2, 1, 3):
        heads_first = {n: [s[0], *s[2:0:-1], s[3]] for n, s in heads_first.items()}
    constants = {"split": np.array([0, 0, 2, 4]), "joined": np.array([0, 0, 8])}
    if masked:
        constants["mask"] = np.tri(5, 7, 1, dtype=bool)[None, None]
    inputs: dict[str, Shape] = {"q": ["rows", "near", 8], "k": ["rows", "far", 8], "v": ["rows", "far", 8]}
    shapes: dict[str, Shape] = {**heads_first, "joined_a": ["rows", "near", 8]}
    graph = model(nodes, inputs, ["rows", "near", 8], constants, **shapes)
    return graph, {"q": noise(3, 5, 8), "k": noise(3, 7, 8, seed=2), "v": noise(3, 7, 8, seed=3)}


@pytest.mark.parametrize("attributes", [{}, {"scale": 0.9}], ids=["plain", "scaled"])
def test_attention_between_transposes_is_one_operator(attributes: dict[str, float]) -> None:
    graph, inputs = attention(**attributes)
    rewritten, counts = rewrite_for_cpu(graph)
    assert counts["Attention"] == 1
    assert not {"Attention"} & count_operators(rewritten).keys()
    np.testing.assert_allclose(run(rewritten, inputs), run(graph, inputs), rtol=1e-5, atol=1e-6)
    if attributes:  # the scale must have mattered
        assert np.abs(run(rewritten, inputs) - run(rewrite_for_cpu(attention()[0])[0], inputs)).max() > 1e-3


@pytest.mark.parametrize("form", [{}, {"scale": 0.9}, {"masked": True}], ids=["plain", "scaled", "masked"])
def test_attention_with_few_scores_stays_onnx_own(form: dict[str, float]) -> None:
    graph, inputs = attention(**form)  # type: ignore[arg-type]
    rewritten, counts = rewrite_for_cpu(graph, {"rows": 1, "near": 5, "far": 7})
    assert counts["Attention"] == 1
    found = count_operators(rewritten)
    assert (found["Attention"], found["Transpose"]) == (1, 0)
    np.testing.assert_allclose(run(rewritten, inputs), run(graph, inputs), rtol=1e-5, atol=1e-6)
    if form:  # scale and mask must have mattered
        assert np.abs(run(rewritten, inputs) - run(rewrite_for_cpu(attention()[0])[0], inputs)).max() > 1e-3


@pytest.mark.parametrize("form", [{}, {"masked": True}], ids=["plain", "masked"])
def test_attention_with_many_scores_is_done_by_blocks_unless_masked(form: dict[str, bool]) -> None:
    graph, _ = attention(**form)  # type: ignore[arg-type]
    rewritten, counts = rewrite_for_cpu(graph, {"rows": 1, "near": 1024, "far": 1024})
    assert counts["Attention"] == (0 if form else 1)
    assert count_operators(rewritten)["MultiHeadAttention"] == (0 if form else 1)


@pytest.mark.parametrize("changed", [{"is_causal": 1}, {"softcap": 2.0}, {"second_user": True}], ids=str)
def test_attention_of_another_form_stays(changed: dict[str, float]) -> None:
    graph, _ = attention(**changed)  # type: ignore[arg-type]
    rewritten, counts = rewrite_for_cpu(graph)
    assert counts["Attention"] == 0
    assert count_operators(rewritten)["Attention"] == 1


def test_attention_whose_heads_share_keys_stays() -> None:
    node = helper.make_node
    nodes = []
    for name, split in (("q", "two"), ("k", "one"), ("v", "one")):
        nodes.append(node("Reshape", [name, split], [f"{name}4"]))
        nodes.append(node("Transpose", [f"{name}4"], [f"{name}t"], perm=[0, 2, 1, 3]))
    nodes += [
        node("Attention", ["qt", "kt", "vt"], ["a"]),
        node("Transpose", ["a"], ["at"], perm=[0, 2, 1, 3]),
        node("Reshape", ["at", "joined"], ["y"]),
    ]
    constants = {"two": np.array([0, 0, 2, 4]), "one": np.array([0, 0, 1, 4]), "joined": np.array([0, 0, 8])}
    inputs: dict[str, Shape] = {"q": ["rows", "near", 8], "k": ["rows", "far", 4], "v": ["rows", "far", 4]}
    between: dict[str, Shape] = {"qt": ["rows", 2, "near", 4], "kt": ["rows", 1, "far", 4], "vt": ["rows", 1, "far", 4]}
    graph = model(nodes, inputs, ["rows", "near", 8], constants, **between)
    rewritten, counts = rewrite_for_cpu(graph, {"rows": 1, "near": 5, "far": 7})
    assert counts["Attention"] == 0
    given = {"q": noise(3, 5, 8), "k": noise(3, 7, 4, seed=2), "v": noise(3, 7, 4, seed=3)}
    np.testing.assert_array_equal(run(rewritten, given), run(graph, given))


def test_a_computed_shape_becomes_constant_where_the_symbols_say_it() -> None:
    node = helper.make_node
    nodes = [
        node("Shape", ["x"], ["rows"], start=0, end=1),
        node("Concat", ["rows", "rest"], ["target"], axis=0),
        node("Reshape", ["x", "target"], ["y"]),
    ]
    graph = model(nodes, {"x": ["n", 6]}, ["n", 2, 3], {"rest": np.array([2, 3])})
    rewritten, counts = rewrite_for_cpu(graph)
    assert counts["Reshape"] == 1
    target = next(n for n in onnx.load_model_from_string(rewritten).graph.node if n.op_type == "Reshape").input[1]
    assert read_graph(rewritten).constants[target] == (3,)
    x = noise(5, 6)
    np.testing.assert_array_equal(run(rewritten, {"x": x}), x.reshape(5, 2, 3))


def test_tokens_take_their_shape_from_the_feature_map_they_came_from() -> None:
    node = helper.make_node
    feature: Shape = ["rows", 6, "height", "width"]
    nodes = [
        node("GroupNormalization", ["x", "ones", "zeros"], ["normal"], num_groups=2),
        node("Transpose", ["normal"], ["last"], perm=[0, 2, 3, 1]),
        node("Reshape", ["last", "flat"], ["tokens"]),
        node("Exp", ["tokens"], ["more"]),
        *(node("Shape", ["x"], [f"s{i}"], start=i, end=i + 1) for i in (0, 2, 3)),
        node("Concat", ["s0", "s2", "s3", "channels"], ["target"], axis=0),
        node("Reshape", ["more", "target"], ["y"]),
    ]
    constants = {"flat": np.array([0, -1, 6]), "channels": np.array([6])}
    constants |= {"ones": np.ones(6, np.float32), "zeros": np.zeros(6, np.float32)}
    last: Shape = ["rows", "height", "width", 6]
    tokens: Shape = ["rows", "height*width", 6]
    graph = model(nodes, {"x": feature}, last, constants, normal=feature, last=last, tokens=tokens, more=tokens)
    rewritten, counts = rewrite_for_cpu(graph)
    assert counts["Reshape"] == 1
    assert count_operators(rewritten)["Concat"] == 0
    x = noise(2, 6, 3, 5)
    np.testing.assert_allclose(run(rewritten, {"x": x}), run(graph, {"x": x}), rtol=1e-5, atol=1e-5)


def test_a_shape_of_two_unknowns_stays_computed() -> None:
    nodes = [helper.make_node("Shape", ["like"], ["target"]), helper.make_node("Reshape", ["x", "target"], ["y"])]
    graph = model(nodes, {"x": ["n"], "like": ["a", "b"]}, ["a", "b"], {})
    rewritten, counts = rewrite_for_cpu(graph)
    assert counts["Reshape"] == 0
    assert rewritten == graph


def test_bytes_that_are_no_model_are_refused() -> None:
    with pytest.raises(CorruptError, match="in the middle of"):
        rewrite_for_cpu(attention()[0][:-5])
