"""Graphs whose weights are inputs: after the optimiser, any weights of these shapes give what a fresh build gives."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from fewstep.engines.graph.weights_apart import Fed, read_fed, take_weights_apart
from fewstep.errors import UnsupportedError
from onnx import helper, numpy_helper
from small_graph import model, noise

SIZE = 12


def convolutions(channels: list[int], kernel: int, *, bias: bool) -> tuple[bytes, dict[str, tuple[int, ...]]]:
    """A chain of convolutions with an activation between, and the shapes of their weights."""
    shapes: dict[str, tuple[int, ...]] = {}
    nodes, last = [], "x"
    for i, (inner, outer) in enumerate(pairwise(channels)):
        shapes[f"w{i}"] = (outer, inner, kernel, kernel)
        inputs = [last, f"w{i}"]
        if bias:
            shapes[f"b{i}"] = (outer,)
            inputs.append(f"b{i}")
        output = "y" if i == len(channels) - 2 else f"c{i}"
        nodes.append(helper.make_node("Conv", inputs, [output], pads=[kernel // 2] * 4))
        last = output
        if output != "y":
            nodes.append(helper.make_node("Relu", [output], [f"r{i}"]))
            last = f"r{i}"
    return built(nodes, shapes, [1, channels[0], SIZE, SIZE], [1, channels[-1], SIZE, SIZE], 1), shapes


def built(nodes: list, shapes: dict[str, tuple[int, ...]], given: list, output: list, seed: int) -> bytes:
    return model(nodes, {"x": given}, output, weights_of(shapes, seed))


def weights_of(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    return {n: noise(*s, seed=seed + i) for i, (n, s) in enumerate(shapes.items())}


def optimised(graph: bytes, folder: Path) -> bytes:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "saved.onnx")
    onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return (folder / "saved.onnx").read_bytes()


def check(graph: bytes, other: bytes, shapes: dict[str, tuple[int, ...]], given: list, folder: Path) -> list[Fed]:
    """The graph with the other's weights bound gives what the other gives, to the last bit."""
    apart = take_weights_apart(optimised(graph, folder), {}, graph, weights_of(shapes, 1))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(apart, options, providers=["CPUExecutionProvider"])
    fed = list(read_fed(session.get_modelmeta().custom_metadata_map))
    assert {f.source for f in fed} == set(shapes)
    x = noise(*given, seed=99)
    for seed, whole in ((1, graph), (50, other)):
        weights = weights_of(shapes, seed)
        arrays = {f.name: f.laid_out(weights[f.source]) for f in fed}
        (found,) = session.run(None, {"x": x, **arrays})
        fresh = onnxruntime.InferenceSession(whole, providers=["CPUExecutionProvider"])
        assert np.array_equal(found, fresh.run(None, {"x": x})[0])
    return fed


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("channels", [[4, 16, 4], [3, 17, 33, 2], [4, 32, 48, 64, 4], [64, 64], [20, 36, 20]])
def test_convolutions_of_any_channels(channels: list[int], bias: bool, kernel: int, tmp_path: Path) -> None:
    graph, shapes = convolutions(channels, kernel, bias=bias)
    given = [1, channels[0], SIZE, SIZE]
    check(graph, rebuilt(graph, shapes), shapes, given, tmp_path)


def rebuilt(graph: bytes, shapes: dict[str, tuple[int, ...]]) -> bytes:
    """The same graph with other weights."""
    whole = onnx.load_from_string(graph)
    weights = weights_of(shapes, 50)
    del whole.graph.initializer[:]
    whole.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in weights.items())
    return bytes(whole.SerializeToString())


def test_what_is_computed_of_weights_is_refused(tmp_path: Path) -> None:
    """A product of two weights is folded into one, of which nothing tells how other weights would give it."""
    shapes = {"w": (8, 8), "v": (8, 8)}
    nodes = [helper.make_node("MatMul", ["w", "v"], ["m"]), helper.make_node("MatMul", ["x", "m"], ["y"])]
    graph = built(nodes, shapes, [2, 8], [2, 8], 1)
    with pytest.raises(UnsupportedError, match="'m' of weights, in a way that is not known"):
        take_weights_apart(optimised(graph, tmp_path), {}, graph, weights_of(shapes, 1))
