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


def test_group_norms_keep_the_layout_where_convolutions_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    bundle = exported(make_sd2, tmp_path, "unet")
    dims = {"rows": 2, "height": 8, "width": 8, "tokens": 77}

    def norms(run: RunOptions) -> set[str]:
        modules = open_torch_engine(bundle, "unet", run)._module.modules()
        return {type(m).__name__ for m in modules if "GroupNorm" in type(m).__name__}

    def evaluated(run: RunOptions) -> torch.Tensor:
        binding = open_torch_engine(bundle, "unet", run).bind(dims)
        for index, array in enumerate(binding.inputs.values()):
            array.normal_(generator=torch.Generator().manual_seed(index))
        binding.enqueue()
        return binding.outputs["out"].clone()

    last = replace(CUDA, channels_last=True)
    with stand_in_cuda(monkeypatch):
        assert norms(RunOptions(torch_device="cuda")) == norms(last) == {"FusedGroupNorm"}
        for plain in (CUDA, replace(last, fused_norms=False), replace(last, compile="default"), RunOptions()):
            assert norms(plain) == {"GroupNorm"}
        exact = replace(last, torch_dtype="float32")
        fused, plain_out = evaluated(exact), evaluated(replace(exact, fused_norms=False))
        half = evaluated(last)
    assert float((fused - plain_out).abs().max() / plain_out.abs().max()) < 2e-5
    assert float((half - plain_out).abs().max() / plain_out.abs().max()) < 2e-2
