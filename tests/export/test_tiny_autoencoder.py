"""Tiny autoencoders (TAESD's class) in place of a checkpoint's VAE, under the same contract."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fewstep
import numpy as np
import pytest
import torch
from checkpoints import make_tiny_vae, psnr
from diffusers import AutoencoderTiny, EulerDiscreteScheduler, StableDiffusionPipeline
from fewstep.engines.backends.ort import OrtEngine
from fewstep.errors import ArgumentError, UnsupportedError
from fewstep.export import export_bundle
from fewstep.export.checkpoint.compose import compose_checkpoint

LEAST_PSNR = 75.0


@pytest.fixture(scope="module")
def tiny_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_vae(tmp_path_factory.mktemp("taesd") / "tiny-taesd")


@pytest.fixture(scope="module")
def bundle(tiny_sd1: Path, sd1_bundle: Any, tiny_vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return export_bundle(tiny_sd1, tmp_path_factory.mktemp("b") / "b", vae=tiny_vae)


def test_it_passes_the_gate_and_is_recorded(bundle: Any) -> None:
    assert bundle.gate["status"] == "passed"
    assert bundle.components["vae_decoder"].config["_class_name"] == "AutoencoderTiny"
    assert bundle.components["vae_decoder"].source["files"][0]["file"] == "diffusion_pytorch_model.safetensors"
    assert (bundle.latent.channels, bundle.latent.factor) == (4, 2)


def test_the_picture_is_diffusers_own(bundle: Any, tiny_sd1: Path, tiny_vae: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd1, vae=AutoencoderTiny.from_pretrained(tiny_vae))
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    pipe.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 4, "guidance_scale": 4.0, "height": 32, "width": 32, "output_type": "np"}
    theirs = pipe("a red circle", generator=[torch.Generator().manual_seed(5)], **given).images
    theirs = (theirs * 255).round().astype(np.uint8)
    ours = fewstep.load(bundle)(
        "a red circle",
        steps=4,
        guidance=4.0,
        seed=[5],
        sampler="euler",
        schedule="trailing",
        compat="diffusers",
        size=(32, 32),
    ).images
    assert theirs.std() > 5
    assert psnr(ours, theirs) >= LEAST_PSNR


def test_encoding_gives_diffusers_latents_without_noise(bundle: Any, tiny_vae: Path) -> None:
    part = bundle.components["vae_encoder"]
    engine = OrtEngine.from_onnx(bundle.path(part.graph), inputs=part.inputs, outputs=part.outputs)
    image = np.random.default_rng(0).uniform(-1, 1, (2, 3, 16, 24)).astype(np.float32)
    binding = engine.bind({"batch": 2, "height": 8, "width": 12})
    np.copyto(binding.inputs["image"], image)
    binding.enqueue()
    model = AutoencoderTiny.from_pretrained(tiny_vae)
    with torch.no_grad():
        expected = model.encode(torch.from_numpy(image)).latents * model.config.scaling_factor
    np.testing.assert_allclose(binding.outputs["mean"], expected.numpy(), atol=1e-5)
    assert not np.any(binding.outputs["std"])


def test_a_single_file_is_taken_for_taesds_own_configuration(tiny_sd1: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = AutoencoderTiny()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "taesd.safetensors")
    part = compose_checkpoint(tiny_sd1, vae=tmp_path / "taesd.safetensors").parts["vae"]
    assert (part.class_name, part.layout) == ("AutoencoderTiny", "diffusers")
    assert part.config["encoder_block_out_channels"] == [64, 64, 64, 64]


def test_autoencoders_that_do_not_fit(tiny_sd1: Path, tiny_vae: Path, tmp_path: Path) -> None:
    def edited(**changes: Any) -> Path:
        place = tmp_path / "-".join(changes)
        place.mkdir()
        config = json.loads((tiny_vae / "config.json").read_text())
        (place / "config.json").write_text(json.dumps({**config, **changes}))
        name = "diffusion_pytorch_model.safetensors"
        (place / name).write_bytes((tiny_vae / name).read_bytes())
        return place

    with pytest.raises(ArgumentError, match=r"latents of 16 channels.*expected 4"):
        compose_checkpoint(tiny_sd1, vae=edited(latent_channels=16))
    with pytest.raises(UnsupportedError, match="upsamples 4 times"):
        compose_checkpoint(tiny_sd1, vae=edited(upsampling_scaling_factor=4))
    with pytest.raises(UnsupportedError, match="'AsymmetricAutoencoderKL'"):
        compose_checkpoint(tiny_sd1, vae=edited(_class_name="AsymmetricAutoencoderKL"))
