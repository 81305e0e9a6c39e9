"""Layers in integers: the explicit form is a legal graph that computes what its equation says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from fewstep.engines import machine
from fewstep.engines.backends.ort import open_session, session_options
from fewstep.engines.graph.onnx_bytes import read_graph
from fewstep.engines.graph.quantized import (
    CONV,
    LINEAR,
    IntegerGrid,
    IntegerGrids,
    integer_layers,
    lower_layers,
    quantize_weight,
)
from fewstep.engines.graph.rewrite import rewrite_for_cpu
from fewstep.engines.graph.symmetric import make_symmetric
from fewstep.engines.options import RunOptions
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

CHANNELS, WIDTH, SIDE = 6, 5, 7


def graph_of(rng: np.random.Generator) -> tuple[bytes, dict[str, np.ndarray]]:
    """A convolution and, after a normalisation, two linear layers of one input, as exports write them."""
    weights = {
        "model.conv.weight": rng.normal(size=(CHANNELS, 3, 3, 3)).astype(np.float32),
        "model.conv.bias": rng.normal(size=CHANNELS).astype(np.float32),
        "model.norm.weight": rng.normal(size=SIDE).astype(np.float32),
        "model.norm.bias": rng.normal(size=SIDE).astype(np.float32),
        "model.one.weight": rng.normal(size=(WIDTH, SIDE)).astype(np.float32),
        "model.two.weight": rng.normal(size=(2, SIDE)).astype(np.float32),
    }
    shape = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Conv", ["x", "model.conv.weight", "model.conv.bias"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Reshape", ["c", "flat"], ["r"]),
        helper.make_node("LayerNormalization", ["r", "model.norm.weight", "model.norm.bias"], ["n"], axis=-1),
        helper.make_node("Transpose", ["model.one.weight"], ["w1"], perm=[1, 0]),
        helper.make_node("MatMul", ["n", "w1"], ["one"]),
        helper.make_node("Transpose", ["model.two.weight"], ["w2"], perm=[1, 0]),
        helper.make_node("MatMul", ["n", "w2"], ["two"]),
    ]
    graph = helper.make_graph(
        nodes,
        "layers",
        [shape("x", TensorProto.FLOAT, ["rows", 3, SIDE, SIDE])],
        [
            shape("one", TensorProto.FLOAT, ["rows", CHANNELS * SIDE, WIDTH]),
            shape("two", TensorProto.FLOAT, ["rows", CHANNELS * SIDE, 2]),
        ],
        [
            *(numpy_helper.from_array(v, n) for n, v in weights.items()),
            numpy_helper.from_array(np.array([0, CHANNELS * SIDE, SIDE]), "flat"),
        ],
        value_info=[shape("n", TensorProto.FLOAT, ["rows", CHANNELS * SIDE, SIDE])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    return model.SerializeToString(), weights


def run(model: bytes, x: np.ndarray, names: list[str], optimization: str = "all") -> list[np.ndarray]:
    session = open_session(model, run=RunOptions(threads=1), optimization=optimization)
    return list(session.run(names, {"x": x}))


def nearest(x: np.ndarray, grid: IntegerGrid) -> np.ndarray:
    """The equation in float64, by another way than the graph's."""
    steps = np.floor(np.asarray(x, np.float64) / np.float32(grid.scale) + 0.5)
    return (np.minimum(np.maximum(steps, -grid.zero), 255 - grid.zero)) * np.float64(np.float32(grid.scale))


@pytest.mark.parametrize("seed", range(3))
def test_the_graph_computes_its_equation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    model, weights = graph_of(rng)
    x = rng.normal(size=(2, 3, SIDE, SIDE)).astype(np.float32)
    conv, normed = run(_with_outputs(model, ["c", "n"]), x, ["c", "n"], "disabled")
    ends = {"x": (x.min(), x.max()), "c": (conv.min(), conv.max()), "n": (normed.min(), normed.max())}
    grids = {n: IntegerGrid.of(float(a), float(b)) for n, (a, b) in ends.items()}
    graph = read_graph(model)
    layers = integer_layers(graph)
    assert [(layer.module, layer.kind) for layer in layers] == [("conv", CONV), ("one", LINEAR), ("two", LINEAR)]
    lower_layers(graph, layers[1:], IntegerGrids(tensors=grids, smoothing={}), weights.__getitem__)
    lowered = graph.to_bytes()
    onnx.checker.check_model(onnx.load_from_string(lowered), full_check=True)
    kinds = [n.operator for n in graph.nodes]
    assert kinds.count("QuantizeLinear") == 1, "two layers of one input share its grid"
    for name, got in zip(("one", "two"), run(lowered, x, ["one", "two"], "disabled"), strict=True):
        integers, scale = quantize_weight(weights[f"model.{name}.weight"])
        exact = nearest(normed, grids["n"]) @ (integers * scale[:, None].astype(np.float64)).T
        assert np.abs(got - exact).max() < 1e-4 * np.abs(exact).max()


@pytest.mark.parametrize("seed", range(3))
def test_integer_kernels_are_used_and_agree(seed: int) -> None:
    """ONNX Runtime finds its integer operators in the form, and they give what the form says, in at most one step."""
    rng = np.random.default_rng(seed)
    model, weights = graph_of(rng)
    x = rng.normal(size=(2, 3, SIDE, SIDE)).astype(np.float32)
    conv, normed = run(_with_outputs(model, ["c", "n"]), x, ["c", "n"], "disabled")
    grids = {n: IntegerGrid.of(float(v.min()), float(v.max())) for n, v in {"x": x, "c": conv, "n": normed}.items()}
    graph = read_graph(model)
    lower_layers(graph, integer_layers(graph), IntegerGrids(tensors=grids, smoothing={}), weights.__getitem__)
    lowered, _ = rewrite_for_cpu(graph.to_bytes(), {"rows": 2})
    plain = run(lowered, x, ["one", "two"], "disabled")
    fast = run(lowered, x, ["one", "two"], "all")
    for one, other in zip(plain, fast, strict=True):
        assert np.linalg.norm(one - other) < 0.02 * np.linalg.norm(one)
    assert {"QLinearConv", "MatMulIntegerToFloat"} <= _operators(lowered)


def test_sums_of_the_largest_products_are_not_cut_off() -> None:
    """Two products of 255 and 127 are more than 16 bits hold, in which processors without VNNI add them up."""
    depth, grid = 64, IntegerGrid.of(0.0, 255.0)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "one", "zero"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "ones", "zeros"], ["v"], axis=1),
        helper.make_node("MatMul", ["d", "v"], ["y"]),
    ]
    constants = {
        "one": np.float32(grid.scale),
        "zero": np.uint8(grid.zero),
        "w": np.full((depth, 3), 127, np.int8),
        "ones": np.ones(3, np.float32),
        "zeros": np.zeros(3, np.int8),
    }
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", k]) for n, k in (("x", depth), ("y", 3))]
    made = [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()]
    graph = helper.make_graph(nodes, "sums", values[:1], values[1:], made)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()
    x = np.full((5, depth), 255.0, np.float32)
    assert "MatMulIntegerToFloat" in _operators(model)
    (y,) = run(model, x, ["y"], "all")
    np.testing.assert_allclose(y, depth * 255.0 * 127.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("flags", "value"),
    [("avx2 avx512f", "1"), ("avx2 avx_vnni", "0"), ("avx512f avx512_vnni", "0"), ("x86_64", "1")],
)
def test_the_slower_exact_sums_are_for_processors_without_vnni(
    flags: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "cpu_identity", lambda: ("a processor", flags))
    options = session_options(onnxruntime, RunOptions(), "all")
    assert options.get_session_config_entry("session.x64quantprecision") == value


def test_smoothing_changes_nothing_but_rounding() -> None:
    """What the layers read is divided and the weights multiplied: in exact arithmetic nothing happens."""
    rng = np.random.default_rng(5)
    model, weights = graph_of(rng)
    x = rng.normal(size=(2, 3, SIDE, SIDE)).astype(np.float32)
    (normed,) = run(_with_outputs(model, ["n"]), x, ["n"], "disabled")
    factors = np.exp(0.3 * rng.normal(size=SIDE)).astype(np.float32)
    divided = normed / factors
    grid = IntegerGrid.of(float(divided.min()), float(divided.max()))
    graph = read_graph(model)
    layers = [layer for layer in integer_layers(graph) if layer.kind == LINEAR]
    grids = IntegerGrids(tensors={"n": grid}, smoothing={"n": factors})
    lower_layers(graph, layers, grids, weights.__getitem__)
    assert sum(n.operator == "Mul" for n in graph.nodes) == 2, "the normalisation's scale and bias take the division"
    for name, got in zip(("one", "two"), run(graph.to_bytes(), x, ["one", "two"], "disabled"), strict=True):
        integers, scale = quantize_weight(weights[f"model.{name}.weight"] * factors)
        exact = nearest(divided, grid) @ (integers * scale[:, None].astype(np.float64)).T
        assert np.abs(got - exact).max() < 2e-3 * np.abs(exact).max()
        assert np.linalg.norm(got - normed @ weights[f"model.{name}.weight"].T) < 0.05 * np.linalg.norm(exact)


def test_a_tensor_that_others_read_is_divided_apart() -> None:
    """Where one of two readers is left as it is, the normalisation is too."""
    rng = np.random.default_rng(6)
    model, weights = graph_of(rng)
    x = rng.normal(size=(2, 3, SIDE, SIDE)).astype(np.float32)
    plain_one, plain_two = run(model, x, ["one", "two"], "disabled")
    graph = read_graph(model)
    layers = [layer for layer in integer_layers(graph) if layer.module == "one"]
    factors = np.exp(0.3 * rng.normal(size=SIDE)).astype(np.float32)
    grids = IntegerGrids(tensors={"n": IntegerGrid.of(-15.0, 15.0)}, smoothing={"n": factors})
    lower_layers(graph, layers, grids, weights.__getitem__)
    one, two = run(graph.to_bytes(), x, ["one", "two"], "disabled")
    assert np.array_equal(two, plain_two)
    assert 0 < np.linalg.norm(one - plain_one) < 0.15 * np.linalg.norm(plain_one)


@settings(max_examples=60, deadline=None)
@given(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4))
def test_grids_hold_zero_and_their_ends(one: float, other: float) -> None:
    low, high = min(one, other), max(one, other)
    grid = IntegerGrid.of(low, high)
    assert 0 <= grid.zero <= 255
    width = max(high, 0.0) - min(low, 0.0)
    assert abs(nearest(np.float64(0.0), grid)) == 0.0, "zero stays zero: padding adds nothing"
    for end in (low, high):
        assert abs(nearest(np.float64(end), grid) - end) <= width / 255.0 * 1.01 + 1e-9


def _with_outputs(model: bytes, names: list[str]) -> bytes:
    graph = read_graph(model)
    for name in names:
        graph.add_output(name)
    return graph.to_bytes()


def _operators(model: bytes) -> set[str]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimised.onnx"
        configure: Callable[..., None] = lambda options: setattr(options, "optimized_model_filepath", str(path))  # noqa: E731
        open_session(model, run=RunOptions(threads=1), optimization="all", configure=configure)
        return {n.op_type for n in onnx.load(path).graph.node}


def test_grids_about_zero_hold_what_the_others_do() -> None:
    """The form that TensorRT reads: z = 0 everywhere, nothing rounded behind convolutions, results near by."""
    rng = np.random.default_rng(8)
    model, weights = graph_of(rng)
    x = rng.normal(size=(2, 3, SIDE, SIDE)).astype(np.float32)
    conv, normed = run(_with_outputs(model, ["c", "n"]), x, ["c", "n"], "disabled")
    grids = {n: IntegerGrid.of(float(v.min()), float(v.max())) for n, v in {"x": x, "c": conv, "n": normed}.items()}
    graph = read_graph(model)
    lower_layers(graph, integer_layers(graph), IntegerGrids(tensors=grids, smoothing={}), weights.__getitem__)
    assert make_symmetric(graph) == 2
    made = graph.to_bytes()
    onnx.checker.check_model(onnx.load_from_string(made), full_check=True)
    zeros = {n.inputs[2] for n in graph.nodes if n.operator in ("QuantizeLinear", "DequantizeLinear")}
    values = {i.name: numpy_helper.to_array(i) for i in onnx.load_from_string(made).graph.initializer}
    assert all(values[name].dtype == np.int8 and not values[name].any() for name in zeros)
    plain = run(model, x, ["one", "two"], "disabled")
    for one, other in zip(plain, run(made, x, ["one", "two"], "disabled"), strict=True):
        assert 0 < np.linalg.norm(one - other) < 0.03 * np.linalg.norm(one)
