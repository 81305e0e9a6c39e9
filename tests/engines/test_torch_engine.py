"""The torch engine on the CPU: precisions, layouts, refusals. What it does on CUDA is not run on a GPU."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fewstep.engines import Engine, RunOptions
from fewstep.errors import ArgumentError, CorruptError, MissingError
from fewstep.export.torch_engine import TorchEngine, open_torch_engine
from fewstep.export.trace.modules import build_model, wrap
from fewstep.families import find_family
from safetensors.torch import load_file, save_file

CONFIG: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "block_out_channels": (8, 16),
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
DIMS = {"rows": 2, "height": 8, "width": 12, "tokens": 5}


def engine(dtype: str = "float32", **options: Any) -> TorchEngine:
    torch.manual_seed(0)
    model = build_model("unet", CONFIG).to(getattr(torch, dtype))
    return TorchEngine(wrap("unet", model, CONFIG, dtype, find_family("sd1")), RunOptions(**options))


def evaluate(subject: TorchEngine) -> np.ndarray:
    rng = np.random.default_rng(1)
    binding = subject.bind(DIMS)
    addresses = {n: a.ctypes.data for n, a in (*binding.inputs.items(), *binding.outputs.items())}
    for name, array in binding.inputs.items():
        array[...] = 500.0 if name == "timestep" else rng.standard_normal(array.shape)
    binding.enqueue()
    assert addresses == {n: a.ctypes.data for n, a in (*binding.inputs.items(), *binding.outputs.items())}
    return np.array(binding.outputs["out"])


def distance(found: np.ndarray, true: np.ndarray) -> float:
    return float(np.linalg.norm(found - true) / np.linalg.norm(true))


def test_it_is_an_engine_that_a_callers_graph_can_hold() -> None:
    subject = engine()
    assert isinstance(subject, Engine)
    assert (subject.device, subject.capture, subject.backend) == ("cpu", "whole_request", "torch")


@pytest.mark.parametrize(("dtype", "limit"), [("bfloat16", 3e-2), ("float16", 4e-3)])
def test_half_precision_is_near_float32_and_not_it(dtype: str, limit: float) -> None:
    exact = evaluate(engine())
    error = distance(evaluate(engine(dtype)), exact)
    assert 1e-5 < error < limit


def test_models_built_side_by_side_have_their_own_precision() -> None:
    wanted = ["float16", "float32", "bfloat16", "float32"] * 4
    with ThreadPoolExecutor(max_workers=8) as pool:
        models = list(pool.map(lambda d: build_model("unet", CONFIG, d), wanted))
    for model, dtype in zip(models, wanted, strict=True):
        assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}


def test_channels_last_computes_the_same() -> None:
    subject = engine(channels_last=True)
    weights = [p for p in subject._module.parameters() if p.ndim == 4 and p.shape[2] > 1]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    assert distance(evaluate(subject), evaluate(engine())) < 1e-5


@pytest.mark.slow
def test_compiled_computes_the_same() -> None:
    assert distance(evaluate(engine(compile="default")), evaluate(engine())) < 1e-5


def test_a_stream_or_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ArgumentError, match="CUDA stream"):
        engine().bind(DIMS).enqueue(7)
    with pytest.raises(ArgumentError, match="compile is 'fast'"):
        RunOptions(compile="fast")
    if not torch.cuda.is_available():
        with pytest.raises(MissingError, match="no CUDA device"):
            engine(torch_device="cuda")


def test_weights_are_those_of_the_manifest_or_refused(tmp_path: Path) -> None:
    """A module keeps its random initial values where a file has none: that must not pass for a loaded model."""
    from fewstep.bundle import read_bundle
    from fewstep.export.embedded import embedded_bundle

    folder = Path(shutil.copytree(embedded_bundle("base")[0].folder, tmp_path / "bundle"))
    copied = read_bundle(folder)
    assert isinstance(open_torch_engine(copied, "unet", RunOptions()), Engine)
    name = copied.component("unet").weights
    weights = load_file(folder / name)
    save_file({k: v for k, v in weights.items() if k != sorted(weights)[0]}, folder / name)
    with pytest.raises(CorruptError, match=name):
        open_torch_engine(copied, "unet", RunOptions())
