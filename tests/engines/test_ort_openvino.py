"""OpenVINO as a provider: decomposed attention is attention, and what cannot be had is said in words.

The wheel takes the place of the tested onnxruntime, so the provider itself runs in the bench's own environment.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from fewstep.bundle import Bundle
from fewstep.engines import Engine, RunOptions, Store, build_engines
from fewstep.engines.backends.openvino import OpenVinoEngine
from fewstep.engines.backends.openvino_graph import rewrite_for_openvino
from fewstep.engines.backends.registry import load_backend
from fewstep.engines.graph.accounting import count_operators
from fewstep.errors import MissingExtraError, UnsupportedError
from onnx import TensorProto, helper, numpy_helper


def attention(path: Path, *, mask: int | None = None, **attributes: object) -> Path:
    """A graph of one Attention over [batch, 2 heads, length, 4], float32; `mask` is its element type."""
    shape = ["batch", 2, "length", 4]
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in "qkv"]
    if mask is not None:
        inputs.append(helper.make_tensor_value_info("mask", mask, ["length", "length"]))
    names = [i.name for i in inputs]
    node = helper.make_node("Attention", names, ["y"], **attributes)
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)
    model = helper.make_model(
        helper.make_graph([node], "attention", inputs, [output], [numpy_helper.from_array(np.zeros(1), "unused")]),
        opset_imports=[helper.make_opsetid("", 23)],
        ir_version=10,
    )
    onnx.save(model, str(path))
    return path


def run(model: bytes, inputs: dict[str, np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, inputs)[0])


@pytest.mark.parametrize(
    ("mask", "attributes"),
    [(None, {}), (None, {"scale": 0.3}), (TensorProto.FLOAT, {}), (TensorProto.BOOL, {})],
    ids=["plain", "scaled", "added mask", "boolean mask"],
)
def test_decomposed_attention_is_attention(tmp_path: Path, mask: int | None, attributes: dict[str, float]) -> None:
    path = attention(tmp_path / "a.onnx", mask=mask, **attributes)
    rng = np.random.default_rng(5)
    inputs = {n: rng.standard_normal((3, 2, 7, 4)).astype(np.float32) for n in "qkv"}
    if mask == TensorProto.FLOAT:
        inputs["mask"] = rng.standard_normal((7, 7)).astype(np.float32)
    elif mask == TensorProto.BOOL:
        inputs["mask"] = np.tril(np.ones((7, 7), bool))
    decomposed = rewrite_for_openvino(path.read_bytes())
    assert "Attention" not in count_operators(decomposed)
    expected = run(path.read_bytes(), inputs)
    np.testing.assert_allclose(run(decomposed, inputs), expected, rtol=1e-5, atol=1e-6)
    unmasked = {n: inputs[n] for n in "qkv"}
    if mask is not None:  # the mask must have mattered
        assert np.abs(run(attention(tmp_path / "b.onnx").read_bytes(), unmasked) - expected).max() > 0.01


def test_attention_of_another_form_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="causal"):
        rewrite_for_openvino(attention(tmp_path / "a.onnx", is_causal=1).read_bytes())


@pytest.mark.parametrize(("backend", "hint"), [("ort-openvino", "f32"), ("ort-openvino-bf16", "bf16")])
def test_precision_and_threads_are_said_explicitly(backend: str, hint: str) -> None:
    config = json.loads(load_backend(backend).provider.options(RunOptions(threads=3), None)["load_config"])["CPU"]
    assert config["INFERENCE_PRECISION_HINT"] == hint
    assert config["INFERENCE_NUM_THREADS"] == "3"


def test_without_its_wheel_the_backend_names_it(bundle: Bundle, store: Store) -> None:
    if "OpenVINOExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-openvino is installed")
    with pytest.raises(MissingExtraError, match="onnxruntime-openvino"):
        build_engines(bundle, backend="ort-openvino", store=store)


def test_group_norms_do_not_cut_the_graph() -> None:
    shape = ["rows", 8, "height", "width"]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in "xy"]
    constants = [numpy_helper.from_array(np.ones(8, np.float32), n) for n in ("scale", "bias")]
    node = helper.make_node("GroupNormalization", ["x", "scale", "bias"], ["y"], num_groups=2)
    model = helper.make_model(
        helper.make_graph([node], "norm", values[:1], values[1:], constants),
        opset_imports=[helper.make_opsetid("", 23)],
        ir_version=10,
    )
    found = count_operators(rewrite_for_openvino(model.SerializeToString()))
    assert found["InstanceNormalization"] == 1
    assert "GroupNormalization" not in found


def test_sizes_beyond_the_fourth_share_a_session(bundle: Bundle) -> None:
    part = bundle.component("unet")
    opened = []

    def open_for(dims: Mapping[str, int]) -> onnxruntime.InferenceSession:
        opened.append(dict(dims))
        options = onnxruntime.SessionOptions()
        for name, size in dims.items():
            options.add_free_dimension_override_by_name(name, size)
        return onnxruntime.InferenceSession(str(bundle.path(part.graph)), options, providers=["CPUExecutionProvider"])

    engine = OpenVinoEngine(open_for, inputs=part.inputs, outputs=part.outputs, backend="ort-openvino")
    assert isinstance(engine, Engine)
    for rows in (1, 2, 3, 4, 5, 6, 1):
        binding = engine.bind({"rows": rows, "height": 8, "width": 8, "tokens": 77, "unused": rows})
        binding.enqueue()
        assert binding.outputs["out"].shape[0] == rows
    assert [d.get("rows") for d in opened] == [1, 2, 3, 4, None]


def test_sines_become_outputs_where_their_precision_matters() -> None:
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows"]) for n in "xy"]
    nodes = [
        helper.make_node("Sin", ["x"], ["sine"]),
        helper.make_node("Cos", ["x"], ["cosine"]),
        helper.make_node("Add", ["sine", "cosine"], ["y"]),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "angles", values[:1], values[1:]),
        opset_imports=[helper.make_opsetid("", 23)],
        ir_version=10,
    ).SerializeToString()
    kept = onnx.load_model_from_string(rewrite_for_openvino(model, keep_angles=True))
    assert [o.name for o in kept.graph.output] == ["y", "sine", "cosine"]
    assert [o.name for o in onnx.load_model_from_string(rewrite_for_openvino(model)).graph.output] == ["y"]
    x = np.array([999.0, 1.0], np.float32)
    session = onnxruntime.InferenceSession(kept.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(["sine"], {"x": x})[0], np.sin(x), rtol=1e-5)
