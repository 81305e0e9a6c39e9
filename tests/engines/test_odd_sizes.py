"""Latents that a UNet halves with a rest: interpolation as torch's, engines of such sizes, which UNets take them."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import UNet2DConditionModel
from fewstep.bundle import Bundle
from fewstep.engines import Store, build_engines, open_engine
from fewstep.engines.memory import predict
from fewstep.errors import ArgumentError
from fewstep.families.base import latent_multiple
from onnx import TensorProto, helper

LARGEST_LEVEL = 1024
"""Cells a side of the second level for the largest picture, 16384 pixels at a factor of 8."""
DEEP = {"block_out_channels": [4, 4, 4], "layers_per_block": 1, "norm_num_groups": 2, "cross_attention_dim": 4}


def test_onnx_runtime_interpolates_as_torch_does() -> None:
    """From every number of cells to twice as many and to one less: which of them each takes its value from."""
    node = helper.make_node(
        "Resize",
        ["x", "", "", "size"],
        ["y"],
        mode="nearest",
        nearest_mode="floor",
        coordinate_transformation_mode="asymmetric",
    )
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, "h", "w"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, "H", "W"])
    size = helper.make_tensor_value_info("size", TensorProto.INT64, [4])
    graph = helper.make_graph([node], "resize", [x, size], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for cells in range(1, LARGEST_LEVEL + 1):
        whole = np.arange(cells, dtype=np.float32).reshape(1, 1, cells, 1)
        for target in (2 * cells, 2 * cells - 1):
            theirs = torch.nn.functional.interpolate(torch.from_numpy(whole), size=(target, 1), mode="nearest").numpy()
            ours = session.run(None, {"x": whole, "size": np.array([1, 1, target, 1], np.int64)})[0]
            np.testing.assert_array_equal(ours, theirs)
            np.testing.assert_array_equal(ours.ravel(), np.arange(target) // 2)


@pytest.mark.parametrize(
    ("down", "up"),
    [
        (("CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"), ("UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D")),
        (("DownBlock2D",) * 3, ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D")),
        (("ResnetDownsampleBlock2D",) * 3, ("ResnetUpsampleBlock2D",) * 3),
        (("SimpleCrossAttnDownBlock2D",) * 3, ("SimpleCrossAttnUpBlock2D",) * 3),
    ],
)
def test_which_unets_take_any_size(down: tuple[str, ...], up: tuple[str, ...]) -> None:
    """As diffusers' own model does: it takes every multiple, and every size only where that is 1."""
    config = {**DEEP, "down_block_types": down, "up_block_types": up, "attention_head_dim": 2}
    model = UNet2DConditionModel.from_config(config).eval()

    def takes(cells: int) -> bool:
        text = torch.zeros(1, 3, 4)
        with torch.no_grad():
            try:
                out = model(torch.ones(1, 4, cells, cells), 1, text, return_dict=False)[0]
            except RuntimeError:
                return False
        return tuple(out.shape) == (1, 4, cells, cells)

    multiple = latent_multiple(config)
    assert all(takes(cells) for cells in range(multiple, 20, multiple))
    assert all(takes(cells) for cells in range(1, 10)) == (multiple == 1)


@pytest.mark.parametrize("backend", ["ort-cpu", "torch"])
@pytest.mark.parametrize("family", ["sd1_bundle", "sd2_bundle", "sdxl_bundle"])
def test_backends_agree_at_odd_sizes(request: pytest.FixtureRequest, store: Store, backend: str, family: str) -> None:
    import fewstep

    bundle: Bundle = request.getfixturevalue(family)
    pipe = fewstep.load(bundle, backend=backend, device="cpu", store=store, size=(18, 26))
    other = fewstep.load(bundle, backend="ort-cpu", device="cpu", store=store, size=(32, 32))
    call = {"seed": 3, "steps": 2, "size": (18, 26), "guidance": 3.0}
    ours, theirs = (p("a ring", **call).images[0].astype(float) for p in (pipe, other))
    assert np.abs(ours - theirs).max() <= 1.0


def test_gate_cases_of_a_size_with_a_rest(sd1_bundle: Bundle, store: Store) -> None:
    """An export is judged at one, and so is each engine that takes it."""
    entry = build_engines(sd1_bundle, backend="ort-cpu", components=["unet"], store=store)["unet"].entry
    assert entry.gate["passed"]
    dims = [c["dims"] for c in entry.gate["cases"] if "dims" in c]
    cases = json_cases(sd1_bundle)
    assert any(d["height"] % 2 and d["width"] % 2 for d in [*dims, *cases])


def json_cases(bundle: Bundle) -> list[dict[str, int]]:
    """The dimensions of the UNet's cases in the bundle's reference."""
    import json

    from safetensors import safe_open

    with safe_open(bundle.folder / "reference.safetensors", "np") as file:
        cases = json.loads(file.metadata()["cases"])
    return [c["dims"] for name, c in cases.items() if name.startswith("unet/")]


def test_memory_of_odd_sizes_lies_between_their_neighbours(sd1_bundle: Bundle) -> None:
    peaks = [[s.total for s in predict(sd1_bundle, (w, w), 1)] for w in (32, 34, 36)]
    assert all(a <= b <= c for a, b, c in zip(*peaks, strict=True))
    assert peaks[0] != peaks[1] != peaks[2]


def test_a_size_of_no_whole_cells_is_refused(sd1_bundle: Bundle) -> None:
    from fewstep.engines import profiles_for

    assert profiles_for(sd1_bundle, sizes=[(18, 26)])["unet"][0].optimum["width"] == 9
    with pytest.raises(ArgumentError, match="multiples of 2"):
        profiles_for(sd1_bundle, sizes=[(33, 26)])
    engine = open_engine(sd1_bundle, "vae_decoder", backend="ort-cpu")
    assert engine.bind({"batch": 1, "height": 13, "width": 9}).outputs["image"].shape == (1, 26, 18, 3)
