"""Rewritten graphs compute what the ONNX definitions say, and are left alone where a form does not fit."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from fewstep.engines.accounting import count_operators
from fewstep.engines.onnx_bytes import read_graph
from fewstep.engines.ort_rewrite import rewrite_for_cpu
from fewstep.errors import CorruptError
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

Shape = list[int | str]


def model(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, Shape],
    output: Shape,
    constants: dict[str, np.ndarray],
    **between: Shape,
) -> bytes:
    """A graph with the one output `y`; `between` are the shapes of tensors inside it."""

    def values(shapes: dict[str, Shape]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()]

    graph = helper.make_graph(
        nodes,
        "rewritten",
        values(inputs),
        values({"y": output}),
        [numpy_helper.from_array(v, n) for n, v in constants.items()],
        value_info=values(between),
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    onnx.checker.check_model(made, full_check=True)
    return bytes(made.SerializeToString())


def run(graph: bytes, inputs: dict[str, np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, inputs)[0])


def noise(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


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
    perm: tuple[int, ...] = (0, 2, 1, 3), second_user: bool = False, **attributes: float
) -> tuple[bytes, dict[str, np.ndarray]]:
    """Attention of two heads between reshapes and transposes, as our exporter writes it; more keys than queries."""
    node = helper.make_node
    nodes = []
    for name in "qkv":
        nodes.append(node("Reshape", [name, "split"], [f"{name}4"]))
        nodes.append(node("Transpose", [f"{name}4"], [f"{name}t"], perm=perm))
    nodes += [
        node("Attention", ["qt", "kt", "vt"], ["a"], **attributes),
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
    inputs: dict[str, Shape] = {"q": ["rows", "near", 8], "k": ["rows", "far", 8], "v": ["rows", "far", 8]}
    shapes: dict[str, Shape] = {**heads_first, "joined_a": ["rows", "near", 8]}
    graph = model(nodes, inputs, ["rows", "near", 8], constants, **shapes)
    return graph, {"q": noise(3, 5, 8), "k": noise(3, 7, 8, seed=2), "v": noise(3, 7, 8, seed=3)}


@pytest.mark.parametrize("attributes", [{}, {"scale": 0.9}], ids=["plain", "scaled"])
def test_attention_between_transposes_is_one_operator(attributes: dict[str, float]) -> None:
    graph, inputs = attention(**attributes)
    rewritten, counts = rewrite_for_cpu(graph)
    assert counts["MultiHeadAttention"] == 1
    assert not {"Attention"} & count_operators(rewritten).keys()
    np.testing.assert_allclose(run(rewritten, inputs), run(graph, inputs), rtol=1e-5, atol=1e-6)
    if attributes:  # the scale must have mattered
        assert np.abs(run(rewritten, inputs) - run(rewrite_for_cpu(attention()[0])[0], inputs)).max() > 1e-3


@pytest.mark.parametrize("changed", [{"is_causal": 1}, {"softcap": 2.0}, {"second_user": True}], ids=str)
def test_attention_of_another_form_stays(changed: dict[str, float]) -> None:
    graph, _ = attention(**changed)  # type: ignore[arg-type]
    rewritten, counts = rewrite_for_cpu(graph)
    assert counts["MultiHeadAttention"] == 0
    assert count_operators(rewritten)["Attention"] == 1


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


def test_a_shape_of_two_unknowns_stays_computed() -> None:
    nodes = [helper.make_node("Shape", ["like"], ["target"]), helper.make_node("Reshape", ["x", "target"], ["y"])]
    graph = model(nodes, {"x": ["n"], "like": ["a", "b"]}, ["a", "b"], {})
    rewritten, counts = rewrite_for_cpu(graph)
    assert counts["Reshape"] == 0
    assert rewritten == graph


def test_bytes_that_are_no_model_are_refused() -> None:
    with pytest.raises(CorruptError, match="in the middle of"):
        rewrite_for_cpu(attention()[0][:-5])
