"""Weights alone in integers: what is stored and computed, judged by numpy, and by pictures of the embedded student."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import fewstep
import numpy as np
import onnx
import onnx.numpy_helper
import onnx.reference
import pytest
from fewstep.bundle import Bundle, read_bundle
from fewstep.engines import RunOptions
from fewstep.engines.backends.ort import CPU, open_session
from fewstep.engines.graph.onnx_bytes import read_graph
from fewstep.engines.graph.quantized import IntegerLayer, integer_layers, quantize_weight
from fewstep.engines.graph.weight_only import BLOCK, lower_weights, pack_nibbles, quantize_blocks
from fewstep.errors import MissingError, UnsupportedError
from fewstep.export.embedded import embedded_bundle
from fewstep.precision import psnr_of
from fewstep.quantize import quantize_bundle
from fewstep.quantize.forms import INT4_WEIGHTS, INT8_WEIGHTS, bytes_saved
from fewstep.search.sets import read_prompts

PROMPTS = read_prompts(Path(__file__).parents[2] / "examples" / "shapes.txt")
FEW: dict[str, Any] = {"prompts": PROMPTS, "pairs": 1, "choose": 2, "held_out": 4, "threads": 1, "calls": {"steps": 2}}
PROMPT = "a red circle on a blue background"


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Both precisions in one bundle: four bits of the decoder by block, eight everywhere."""
    folder = tmp_path_factory.mktemp("lowered") / "student"
    shutil.copytree(embedded_bundle("student")[0].folder, folder)
    quantize_bundle(
        read_bundle(folder), precision="int4-weights", budget="25dB", by="block", **FEW, components=["vae_decoder"]
    )
    return quantize_bundle(read_bundle(folder), precision="int8-weights", budget="40dB", by="component", **FEW)


def small_graph() -> tuple[bytes, dict[str, np.ndarray]]:
    """A convolution of 64 channels, one of 3, and a linear layer, with their weights in the graph."""
    rng = np.random.default_rng(0)
    shapes = {"a.weight": (64, 3, 3, 3), "b.weight": (32, 64, 3, 3), "c.weight": (48, 64)}
    weights = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    make = onnx.helper.make_node
    shape = onnx.helper.make_tensor("shape", onnx.TensorProto.INT64, [3], [1, 32, 64])
    nodes = [
        make("Conv", ["x", "a.weight"], ["h"], pads=[1, 1, 1, 1]),
        make("Conv", ["h", "b.weight"], ["g"], pads=[1, 1, 1, 1]),
        make("Reshape", ["g", "shape"], ["r"]),
        make("Transpose", ["c.weight"], ["c.turned"], perm=[1, 0]),
        make("MatMul", ["r", "c.turned"], ["y"]),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "small",
        [onnx.helper.make_tensor_value_info("x", 1, [1, 3, 8, 8])],
        [onnx.helper.make_tensor_value_info("y", 1, [1, 32, 48])],
        [*(onnx.numpy_helper.from_array(w, n) for n, w in weights.items()), shape],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)])
    model.ir_version = 10
    return model.SerializeToString(), weights


@pytest.mark.parametrize("bits", [8, 4])
def test_a_graph_computes_with_the_rounded_weights(bits: int) -> None:
    """ONNX's own reference evaluator gives what numpy's rounding does in the plain graph, and ONNX Runtime too."""
    data, weights = small_graph()
    graph = read_graph(data)
    layers = integer_layers(graph)
    assert [layer.weight for layer in layers] == [*weights]
    lower_weights(graph, layers, bits, weights.__getitem__)
    made = onnx.load_from_string(graph.to_bytes())
    onnx.checker.check_model(made, full_check=True)
    plain = onnx.load_from_string(data)
    for initializer in plain.graph.initializer:
        if initializer.name in weights:
            rounded = rounded_weight(weights[initializer.name], bits)
            initializer.CopyFrom(onnx.numpy_helper.from_array(rounded, initializer.name))
    x = np.random.default_rng(1).standard_normal((1, 3, 8, 8)).astype(np.float32)
    (expected,) = onnx.reference.ReferenceEvaluator(plain).run(None, {"x": x})
    (found,) = onnx.reference.ReferenceEvaluator(made).run(None, {"x": x})
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)
    session = open_session(made.SerializeToString(), provider=CPU, run=RunOptions(threads=1), optimization="all")
    (run,) = session.run(None, {"x": x})
    np.testing.assert_allclose(run, expected, rtol=1e-4, atol=1e-3)


def rounded_weight(weight: np.ndarray, bits: int) -> np.ndarray:
    """What a weight comes back as, by loops over rows and blocks alone."""
    columns = weight.shape[1]
    result = np.empty_like(weight)
    if bits == 8 or columns % BLOCK:
        for o, row in enumerate(weight):
            step = np.float32(np.abs(row).max() / 127)
            result[o] = np.clip(np.rint(row / step), -127, 127) * step
        return result
    integers, scales = quantize_blocks(weight)
    for o in range(len(weight)):
        for b in range(columns // BLOCK):
            part = slice(b * BLOCK, (b + 1) * BLOCK)
            result[o, part] = integers[o, part].astype(np.float32) * scales[o, b]
    return result


def test_scales_of_blocks_round_no_worse_than_the_largest_value_does() -> None:
    """Beside symmetric rounding by the largest magnitude; integers span four bits, and errors are within a step."""
    weight = np.random.default_rng(2).standard_t(4, (8, 64, 3, 3)).astype(np.float32)
    integers, scales = quantize_blocks(weight)
    assert integers.min() >= -8
    assert integers.max() <= 7
    blocks = weight.reshape(8, 2, BLOCK, 3, 3)
    error = blocks - integers.reshape(blocks.shape) * scales[:, :, None]
    plain = np.abs(blocks).max(axis=2, keepdims=True) / 7
    usual = blocks - np.clip(np.rint(blocks / plain), -8, 7) * plain
    assert np.square(error).sum() < 0.95 * np.square(usual).sum()
    assert np.count_nonzero(quantize_blocks(np.zeros((2, 32), np.float32))[0]) == 0


@pytest.mark.parametrize("count", [1, 2, 7, 32])
def test_nibbles_are_packed_as_onnx_has_them(count: int) -> None:
    values = np.random.default_rng(count).integers(-8, 8, count).astype(np.int8)
    tensor = onnx.TensorProto(data_type=onnx.TensorProto.INT4, dims=[count], raw_data=pack_nibbles(values))
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor).astype(np.int8), values)


def test_what_a_form_saves_is_what_its_tensors_take() -> None:
    layer = IntegerLayer(module="m", kind="conv", weight="m", shape=(64, 32, 3, 3), input="x", output="y")
    weight = np.zeros(layer.shape, np.float32)
    integers, scales = quantize_weight(weight)
    eight = integers.nbytes + scales.nbytes
    nibbles, scales = quantize_blocks(weight)
    four = len(pack_nibbles(nibbles)) + scales.nbytes
    steps = (INT8_WEIGHTS, INT4_WEIGHTS)
    assert bytes_saved(INT8_WEIGHTS, steps, layer) == weight.nbytes - eight
    assert bytes_saved(INT4_WEIGHTS, steps, layer) == eight - four


def test_pictures_are_within_the_budget_and_files_small(lowered: Bundle) -> None:
    """Both precisions by name; without one the farther. Pictures are made again here, at other seeds."""
    by_name = {s.precision: s for s in lowered.precisions}
    assert lowered.within("25dB").lowered == by_name["int4-weights"]
    assert lowered.within("int8-weights psnr>=25").lowered == by_name["int8-weights"]
    with pytest.raises(MissingError, match="Find int4-weights with"):
        lowered.within("int4-weights psnr>=90")
    plain = fewstep.load(lowered, backend="ort-cpu", threads=1)
    seeds = [100, 101, 102]
    expected = plain([PROMPT] * 3, seed=seeds, steps=2).images.astype(float)
    for precision, (share, least) in {"int4-weights": (0.25, 25.0), "int8-weights": (0.35, 38.0)}.items():
        budget = f"{precision} psnr>=25"
        stored = by_name[precision]
        sizes = [lowered.path(c["vae_decoder"].weights).stat().st_size for c in (stored.components, lowered.components)]
        assert sizes[0] < share * sizes[1]
        pipe = fewstep.load(lowered.folder, backend="ort-cpu", budget=budget, threads=1)
        made = pipe([PROMPT] * 3, seed=seeds, steps=2).images.astype(float)
        assert psnr_of(float(np.mean((made - expected) ** 2))) > least
        assert {c.dtype for c in stored.components.values()} == {precision}
    assert "text_encoder" in by_name["int8-weights"].components


def test_tensorrt_rtx_builds_eight_bits_and_refuses_four(lowered: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    from fewstep.engines import BuildOptions, Store, build_engines

    given: dict[str, Any] = {"backend": "tensorrt-rtx", "components": ["vae_decoder"]}
    given |= {"options": BuildOptions(compute_capabilities=("8.9",)), "store": Store(tmp_path / "store")}
    built = build_engines(lowered.within("int8-weights psnr>=25"), **given)["vae_decoder"]
    assert built.entry.key.dtype == "int8-weights"
    with pytest.raises(UnsupportedError, match=r"four bits.*int8-weights"):
        build_engines(lowered.within("int4-weights psnr>=25"), **given)
