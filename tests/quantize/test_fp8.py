"""Layers in floats of eight bits: the encoding, the graph's equation, and the student under a budget of pictures."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import fewstep
import ml_dtypes
import numpy as np
import pytest
from fewstep.bundle import Bundle, read_bundle
from fewstep.engines import BuildOptions, Store, build_engines
from fewstep.engines.backends.ort import open_session
from fewstep.engines.backends.registry import BuildJob, load_backend
from fewstep.engines.gate.verify import load_cases, verify_graph
from fewstep.engines.graph.float8 import CODES, LARGEST, NUMBERS, decode_float8, encode_float8
from fewstep.engines.graph.onnx_bytes import read_graph
from fewstep.engines.graph.quantized import FLOATS, IntegerGrid, IntegerGrids, integer_layers, lower_layers
from fewstep.engines.options import RunOptions
from fewstep.errors import UnsupportedError
from fewstep.export.embedded import embedded_bundle
from fewstep.quantize import quantize_bundle
from fewstep.search.sets import read_prompts
from fewstep.weights.stored import open_tensors
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import TensorProto, helper, numpy_helper

E4M3 = ml_dtypes.float8_e4m3fn
PROMPTS = read_prompts(Path(__file__).parents[2] / "examples" / "shapes.txt")
BUDGET = "psnr>=20"
FEW: dict[str, Any] = {
    **{"prompts": PROMPTS, "pairs": 1, "choose": 4, "held_out": 8, "by": "block", "threads": 1},
    "calls": {"steps": 2},
}


def rounded(values: np.ndarray) -> np.ndarray:
    """By another library, with what is beyond the largest number at it."""
    return np.clip(values, -448.0, 448.0).astype(E4M3)


@given(arrays(np.float32, 40, elements=st.floats(-1000, 1000, width=32)))
def test_codes_are_the_other_library_s(values: np.ndarray) -> None:
    np.testing.assert_array_equal(encode_float8(values), rounded(values).view(np.uint8))


def test_every_number_and_every_middle() -> None:
    assert (CODES, LARGEST) == (127, 448.0)
    codes = np.array([*range(CODES), *range(0x80, 0x80 + CODES)], np.uint8)
    numbers = codes.view(E4M3).astype(np.float32)
    np.testing.assert_array_equal(decode_float8(codes), numbers)
    np.testing.assert_array_equal(encode_float8(numbers), codes)
    middles = np.concatenate([s * (NUMBERS[:-1] + NUMBERS[1:]) / 2 for s in (1, -1)]).astype(np.float32)
    np.testing.assert_array_equal(encode_float8(middles), rounded(middles).view(np.uint8))


def test_a_graph_computes_with_what_it_was_rounded_to() -> None:
    rng = np.random.default_rng(2)
    conv, linear = (rng.normal(size=s).astype(np.float32) for s in ((6, 3, 3, 3), (5, 7)))
    nodes = [
        helper.make_node("Conv", ["x", "model.conv.weight"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Transpose", ["model.one.weight"], ["w"], perm=[1, 0]),
        helper.make_node("MatMul", ["c", "w"], ["y"]),
    ]
    x_info, y_info = (
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", k, 7, w]) for n, k, w in (("x", 3, 7), ("y", 6, 5))
    )
    weights = {"model.conv.weight": conv, "model.one.weight": linear}
    made = [numpy_helper.from_array(w, n) for n, w in weights.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "layers", [x_info], [y_info], made),
        opset_imports=[helper.make_opsetid("", 23)],
        ir_version=10,
    )
    graph = read_graph(model.SerializeToString())
    x = rng.normal(size=(2, 3, 7, 7)).astype(np.float32)
    ends = {"x": float(np.abs(x).max()), "c": 9.0}
    grids = IntegerGrids(tensors={n: IntegerGrid.of(-e, e) for n, e in ends.items()}, smoothing={})
    lower_layers(graph, integer_layers(graph), grids, weights.__getitem__, FLOATS)
    assert [n.operator for n in graph.nodes].count("QuantizeLinear") == 2, "what a convolution gives is not rounded"
    session = open_session(graph.to_bytes(), run=RunOptions(threads=1), optimization="disabled")
    (made_y,) = session.run(["y"], {"x": x})

    def onto(values: np.ndarray, farthest: float) -> np.ndarray:
        scale = np.float32(farthest / 448.0)
        return rounded(values / scale).astype(np.float32) * scale

    def by_channel(weight: np.ndarray) -> np.ndarray:
        return np.stack([onto(w, float(np.abs(w).max())) for w in weight])

    from torch import from_numpy
    from torch.nn import functional

    farthest = {n: g.farthest for n, g in grids.tensors.items()}
    summed = functional.conv2d(from_numpy(onto(x, farthest["x"])), from_numpy(by_channel(conv)), padding=1).numpy()
    expected = onto(summed, farthest["c"]) @ by_channel(linear).T
    # a sum that lies between two numbers may be rounded to either
    assert np.mean(np.abs(made_y - expected) > 1e-4 * np.abs(expected).max()) < 0.02


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("fp8") / "student"
    shutil.copytree(embedded_bundle("student")[0].folder, folder)
    return quantize_bundle(read_bundle(folder), precision="fp8", budget=BUDGET, **FEW)


def test_pictures_are_within_the_budget(lowered: Bundle) -> None:
    (stored,) = lowered.precisions
    assert (stored.precision, stored.budget) == ("fp8", BUDGET)
    assert stored.psnr >= 20.0
    within = lowered.within(f"fp8 {BUDGET}")
    plain, fp8 = (fewstep.load(b, backend="ort-cpu") for b in (lowered, within))
    call: dict[str, Any] = {"steps": 2, "seed": [70, 71, 72], "size": (64, 64)}
    one, other = (p([*PROMPTS[:3]], **call).images.astype(np.float64) for p in (plain, fp8))
    error = float(np.mean((one - other) ** 2))
    assert 0.0 < error < 255.0**2 / 10**2.0
    cases = load_cases(within)
    assert all(verify_graph(within, name, cases).passed for name in within.components)


def test_weights_lie_in_eight_bits(lowered: Bundle) -> None:
    part = lowered.within(f"fp8 {BUDGET}").component("unet")
    assert part.dtype == "fp8"
    stored = open_tensors([lowered.folder / part.weights])
    whole = sum(t.data.nbytes for t in stored.values())
    eight = sum(t.data.nbytes for t in stored.values() if t.dtype == "F8_E4M3")
    assert eight > 0.1 * whole
    assert part.operators["QuantizeLinear"] > 10


def test_tensorrt_rtx_builds_it_without_a_gpu(lowered: Bundle, tmp_path: Path) -> None:
    within = lowered.within(f"fp8 {BUDGET}")
    pytest.importorskip("tensorrt_rtx")
    for component in ("unet", "vae_decoder"):
        if within.component(component).dtype != "fp8":
            continue
        built = build_engines(
            within,
            backend="tensorrt-rtx",
            components=[component],
            options=BuildOptions(compute_capabilities=("8.9",)),
            store=Store(tmp_path / "store"),
        )[component]
        assert built.entry.facts["quantized"] > 0
        assert built.entry.key.dtype == "fp8"


def test_openvino_is_refused_by_name(lowered: Bundle, tmp_path: Path) -> None:
    within = lowered.within(f"fp8 {BUDGET}")
    job = BuildJob(
        bundle=within,
        name="unet",
        component=within.component("unet"),
        profiles=(),
        options=BuildOptions(),
        target=tmp_path / "engine",
        data=tmp_path / "data",
        store=Store(tmp_path / "store"),
        progress=lambda *_: None,
        cancel=threading.Event(),
    )
    with pytest.raises(UnsupportedError, match="fp8, which OpenVINO does not run"):
        load_backend("ort-openvino").build(job)
