"""In which precisions the torch engine runs on CUDA: on a stand-in, CPU tensors where it asks for CUDA."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import make_sd2, make_sdxl
from fewstep.bundle import Bundle
from fewstep.engines import RunOptions
from fewstep.export import export_bundle
from fewstep.export.torch_engine import open_torch_engine
from fewstep.export.trace.modules import UpcastAttention
from standin_cuda import stand_in_cuda

CUDA = RunOptions(torch_device="cuda", channels_last=False)


def exported(make: Callable[[Path], Path], folder: Path, part: str, **keys: bool) -> Bundle:
    """A tiny checkpoint in float16, with these keys in one part's configuration."""
    checkpoint = make(folder / "checkpoint")
    config = checkpoint / part / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **keys}))
    return export_bundle(checkpoint, folder / "bundle", dtype="float16", gate=False)


def dtypes(bundle: Bundle, name: str, run: RunOptions) -> set[torch.dtype]:
    return {p.dtype for p in open_torch_engine(bundle, name, run)._module.parameters()}


def test_a_vae_that_overflows_float16_runs_in_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = exported(make_sdxl, tmp_path, "vae", force_upcast=True)
    assert (bundle.component("unet").dtype, bundle.component("vae_decoder").dtype) == ("float16", "float32")
    on_cpu = RunOptions()
    assert dtypes(bundle, "vae_decoder", on_cpu) == {torch.float32}
    with stand_in_cuda(monkeypatch):
        for name in ("vae_decoder", "vae_encoder"):
            assert dtypes(bundle, name, CUDA) == {torch.bfloat16}
        assert dtypes(bundle, "unet", CUDA) == {torch.float16}
        assert dtypes(bundle, "vae_decoder", replace(CUDA, vae_float32=True)) == {torch.float32}
        assert dtypes(bundle, "vae_decoder", replace(CUDA, torch_dtype="float32")) == {torch.float32}
        engine = open_torch_engine(bundle, "vae_decoder", CUDA)
        binding = engine.bind({"batch": 1, "height": 8, "width": 8})
        binding.inputs["latent"].normal_(generator=torch.Generator().manual_seed(0))
        binding.enqueue()
        image = binding.outputs["image"].clone()
    exact = open_torch_engine(bundle, "vae_decoder", on_cpu).bind({"batch": 1, "height": 8, "width": 8})
    exact.inputs["latent"][...] = binding.inputs["latent"].numpy()
    exact.enqueue()
    error = (image.float() - torch.from_numpy(exact.outputs["image"]).float()).square().mean()
    assert 10 * torch.log10(255**2 / error) > 35


def test_attention_is_upcast_where_scores_are_written_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = exported(make_sd2, tmp_path, "unet", upcast_attention=True)

    def processors(run: RunOptions) -> set[type]:
        (model,) = (
            m for m in open_torch_engine(bundle, "unet", run)._module.modules() if hasattr(m, "set_attn_processor")
        )
        return {type(p) for p in model.attn_processors.values()}

    assert processors(RunOptions()) == {UpcastAttention}
    with stand_in_cuda(monkeypatch):
        assert UpcastAttention not in processors(CUDA)
