"""What is not exported is refused by its name, whether it comes as a folder or as a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import copy, write_original
from fewstep.errors import UnsupportedError
from fewstep.export import open_checkpoint
from fewstep.export.checkpoint.compose import compose_checkpoint
from safetensors.numpy import load_file, save_file


def folder_of(pipeline: str, path: Path, **parts: Any) -> Path:
    path.mkdir()
    (path / "model_index.json").write_text(json.dumps({"_class_name": pipeline, **parts}))
    return path


@pytest.mark.parametrize(
    ("pipeline", "words"),
    [
        ("IFPipeline", "has no unet"),
        ("IFImg2ImgPipeline", "DeepFloyd-IF"),
        ("IFImg2ImgSuperResolutionPipeline", "IFImg2ImgSuperResolution"),
        ("IFInpaintingPipeline", "DeepFloyd-IF"),
        ("IFSuperResolutionPipeline", "has no unet"),
        ("StableDiffusion3Pipeline", "Stable Diffusion 3"),
        ("StableDiffusion3Img2ImgPipeline", "Stable Diffusion 3"),
        ("FluxPipeline", "is Flux"),
        ("StableDiffusionControlNetPipeline", "ControlNet"),
        ("StableDiffusionXLControlNetPipeline", "ControlNet"),
        ("StableDiffusionXLControlNetImg2ImgPipeline", "ControlNet"),
        ("StableDiffusionUpscalePipeline", "upscaler"),
        ("StableDiffusionDepth2ImgPipeline", "depth-to-image"),
    ],
)
def test_pipelines(pipeline: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=words):
        open_checkpoint(folder_of(pipeline, tmp_path / "x"))


def test_the_refiner(tmp_path: Path) -> None:
    """Its index says StableDiffusionXLImg2ImgPipeline, and that there is no first text encoder."""
    parts = {"text_encoder": [None, None], "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}
    with pytest.raises(UnsupportedError, match="SDXL refiner"):
        open_checkpoint(folder_of("StableDiffusionXLImg2ImgPipeline", tmp_path / "x", **parts))


def test_a_controlnets_own_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "ControlNetModel"}))
    with pytest.raises(UnsupportedError, match=r"a ControlNet \(ControlNetModel\)"):
        open_checkpoint(tmp_path)


def test_inpainting_unets(tiny_sd1: Path, tmp_path: Path) -> None:
    bad = copy(tiny_sd1, tmp_path / "bad")
    config = json.loads((bad / "unet" / "config.json").read_text())
    (bad / "unet" / "config.json").write_text(json.dumps({**config, "in_channels": 9}))
    with pytest.raises(UnsupportedError, match=r"9 channels.*inpainting"):
        open_checkpoint(bad)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight", "is SD 3"),
        ("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "is Flux"),
        ("double_blocks.0.img_attn.qkv.weight", "is Flux"),
        ("transformer_blocks.0.attn.add_k_proj.weight", "SD 3 or Flux"),
        ("control_model.input_hint_block.0.weight", "a ControlNet"),
        ("controlnet_cond_embedding.conv_in.weight", "a ControlNet"),
        ("input_hint_block.0.weight", "a ControlNet"),
        ("conditioner.embedders.0.model.ln_final.weight", "the SDXL refiner"),
        ("model.diffusion_model.input_blocks.1.0.time_stack.in_layers.0.weight", "Stable Video Diffusion"),
        ("encoder_pooling.1.weight", "DeepFloyd-IF"),
    ],
)
def test_files(key: str, words: str, tiny_sd1: Path, tmp_path: Path) -> None:
    save_file({key: np.ones((2, 2), np.float32)}, tmp_path / "m.safetensors")
    for given in ({"source": tmp_path / "m.safetensors", "base": tiny_sd1}, {"source": tiny_sd1, "unet": ""}):
        given |= {"unet": tmp_path / "m.safetensors"} if "unet" in given else {}
        with pytest.raises(UnsupportedError, match=words):
            compose_checkpoint(given.pop("source"), **given)


def marked(original: Path, target: Path, *marks: str) -> Path:
    save_file({**load_file(original), **{m: np.zeros(0, np.float32) for m in marks}}, target)
    return target


def test_markers_of_v_prediction(tiny_sd1: Path, tmp_path: Path) -> None:
    """Fine-tunes say by empty tensors what their scheduler must be; a file without them keeps the base's."""
    file = write_original(tiny_sd1, tmp_path / "plain.safetensors")
    base = open_checkpoint(tiny_sd1).scheduler
    assert compose_checkpoint(file, base=tiny_sd1).scheduler == base
    found = compose_checkpoint(marked(file, tmp_path / "v.safetensors", "v_pred"), base=tiny_sd1).scheduler
    assert found == {**base, "prediction_type": "v_prediction"}
    both = marked(file, tmp_path / "both.safetensors", "v_pred", "ztsnr")
    found = compose_checkpoint(both, base=tiny_sd1).scheduler
    assert found["_class_name"] == "EulerDiscreteScheduler", "PNDM cannot rescale its betas"
    assert (found["rescale_betas_zero_snr"], found["timestep_spacing"]) == (True, "trailing")


@pytest.mark.parametrize(("mark", "words"), [("edm_mean", "Playground v2.5"), ("edm_vpred.sigma_max", "EDM model")])
def test_edm_is_refused(mark: str, words: str, tiny_sd1: Path, tmp_path: Path) -> None:
    file = write_original(tiny_sd1, tmp_path / "plain.safetensors")
    with pytest.raises(UnsupportedError, match=words):
        compose_checkpoint(marked(file, tmp_path / "m.safetensors", mark), base=tiny_sd1)
