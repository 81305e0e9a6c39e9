"""Graphs for ONNX Runtime on CUDA: its GroupNorm computes what ONNX's GroupNormalization and SiLU do.

The CPU has no kernel for that operator. Its definition is written out in its place; that ONNX Runtime knows the
operator with these inputs and attributes is asked of ONNX Runtime.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from checkpoints import make_sdxl
from fewstep.engines.backends.ort_cuda_graph import rewrite_for_cuda
from fewstep.engines.graph.accounting import count_operators
from fewstep.export import export_bundle
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented
from small_graph import Shape, model, noise, run

NHWC, NCHW = [0, 2, 3, 1], [0, 3, 1, 2]


def defined(graph: bytes) -> bytes:
    """The model with each of ONNX Runtime's GroupNorms written out as its documentation defines it."""
    made = onnx.load_model_from_string(graph)
    nodes = []
    for i, n in enumerate(made.graph.node):
        if n.domain != "com.microsoft":
            nodes.append(n)
            continue
        given = {a.name: helper.get_attribute_value(a) for a in n.attribute}
        assert set(given) == {"groups", "epsilon", "activation", "channels_last"}
        assert given["channels_last"] == 1
        t = [f"defined_{i}_{k}" for k in range(6)]
        node = helper.make_node
        nodes += [
            node("Transpose", [n.input[0]], [t[0]], perm=NCHW),
            node("Cast", [t[0]], [t[1]], to=TensorProto.FLOAT),
            node(
                "GroupNormalization",
                [t[1], n.input[1], n.input[2]],
                [t[2]],
                num_groups=given["groups"],
                epsilon=given["epsilon"],
            ),
            node("Sigmoid", [t[2]], [t[3]]),
            node("Mul", [t[2], t[3]], [t[4]]),
            node("CastLike", [t[4] if given["activation"] else t[2], n.input[0]], [t[5]]),
            node("Transpose", [t[5]], [n.output[0]], perm=NHWC),
        ]
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    return bytes(made.SerializeToString())


def check_known(graph: bytes | Path) -> None:
    """ONNX Runtime reads it, its types and shapes agree, and nothing but the kernel is missing on the CPU."""
    with pytest.raises(NotImplemented, match=r"GroupNorm\(1\)"):
        onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])


def norm(rank: int, *, channels: int = 12, groups: int = 3, silu: str = "own", half: bool = False) -> bytes:
    symbols: Shape = ["rows", channels, *("height", "width")[: rank - 2]]
    node = helper.make_node
    x, y = ("half", "normal") if half or silu else ("x", "y")
    nodes = (
        [node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16 if half else TensorProto.FLOAT)] if x == "half" else []
    )
    nodes.append(node("GroupNormalization", [x, "scale", "bias"], [y], num_groups=groups, epsilon=1e-3))
    last = y
    if silu:
        nodes.append(node("Sigmoid", ["normal"], ["sigmoid"]))
        nodes.append(node("Mul", ["sigmoid", "normal"], ["gated"]))
        last = "gated"
    if silu == "read again":
        nodes.append(node("Add", ["gated", "normal"], ["sum"]))
        last = "sum"
    if last != "y":
        nodes.append(node("Cast", [last], ["y"], to=TensorProto.FLOAT))
    dtype = np.float16 if half else np.float32
    constants = {"scale": noise(channels, seed=2).astype(dtype), "bias": noise(channels, seed=3).astype(dtype)}
    graph = onnx.load_model_from_string(model(nodes, {"x": symbols}, symbols, constants))
    if x == "half":
        kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
        graph.graph.value_info.append(helper.make_tensor_value_info("half", kind, symbols))
    return bytes(graph.SerializeToString())


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("silu", ["", "own", "read again"])
@pytest.mark.parametrize("rank", [3, 4])
def test_group_norm_is_what_onnx_defines(rank: int, silu: str, half: bool) -> None:
    graph = norm(rank, silu=silu, half=half)
    rewritten, counts = rewrite_for_cuda(graph)
    assert counts == {"GroupNorm": 1}
    found = count_operators(rewritten)
    assert (found["GroupNormalization"], found["GroupNorm"], found["Sigmoid"]) == (0, 1, int(silu == "read again"))
    check_known(rewritten)
    x = noise(2, 12, *(5, 7)[: rank - 2])
    expected = ReferenceEvaluator(onnx.load_model_from_string(graph)).run(None, {"x": x})[0]
    tolerance = 1e-2 if half else 1e-5
    np.testing.assert_allclose(run(defined(rewritten), {"x": x}), expected, rtol=tolerance, atol=tolerance)


def test_what_the_kernel_does_not_take_is_left_alone() -> None:
    for graph in (norm(4, channels=15, groups=3, silu=""), norm(4, channels=3, groups=3)):
        rewritten, counts = rewrite_for_cuda(graph)
        assert counts == {"GroupNorm": 0}
        assert rewritten == graph


def test_whole_components_keep_what_they_compute(tmp_path: Path) -> None:
    checkpoint = make_sdxl(tmp_path / "checkpoint")
    bundle = export_bundle(checkpoint, tmp_path / "bundle", dtype="unet=fp16,vae_decoder=fp32", gate=False)
    for name, limit in (("unet", 2e-2), ("vae_decoder", 1e-4)):
        component = bundle.component(name)
        source = bundle.path(component.graph).read_bytes()
        rewritten, counts = rewrite_for_cuda(source)
        before, after = count_operators(source), count_operators(rewritten)
        assert counts["GroupNorm"] == before["GroupNormalization"] > 0
        assert after["GroupNormalization"] == 0
        assert after["Sigmoid"] < before["Sigmoid"]
        files = {"original": source, "rewritten": rewritten, "defined": defined(rewritten)}
        for kind, graph in files.items():
            (bundle.folder / f"{kind}.onnx").write_bytes(graph)
        check_known(bundle.folder / "rewritten.onnx")
        dims = {"rows": 2, "batch": 2, "height": 8, "width": 8, "tokens": 77}
        given = {s.name: noise(*s.resolve(dims), seed=i) for i, s in enumerate(component.inputs)}
        outputs = []
        for kind in ("original", "defined"):
            session = onnxruntime.InferenceSession(bundle.folder / f"{kind}.onnx", providers=["CPUExecutionProvider"])
            outputs.append(session.run(None, given)[0].astype(np.float64))
        levels = 1.01 if name == "vae_decoder" else limit * np.abs(outputs[0]).max()
        assert np.abs(outputs[0] - outputs[1]).max() <= levels
