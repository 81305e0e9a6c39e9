"""UNets with fewer blocks than their family's: SDXS-512, BK-SDM, SSD-1B and Segmind-Vega, against diffusers' pipelines.

The checkpoints are tiny and random, of the structure that the published configurations state.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fewstep
import numpy as np
import pytest
import torch
from checkpoints import (
    copy,
    make_lora,
    make_sd1,
    make_sdxl,
    make_tiny_vae,
    psnr,
    randomise,
    write_lora,
    write_original,
)
from diffusers import DiffusionPipeline, LCMScheduler, UNet2DConditionModel
from fewstep.bundle import read_bundle
from fewstep.errors import CorruptError, UnsupportedError
from fewstep.export import export_bundle
from refusals import refused

SLOW = pytest.mark.slow

PROMPT = "a red circle, hello! Émile's café"
WIDTH, HEIGHT = 40, 24
LEAST = 75.0
CROSS, PLAIN = "CrossAttn{}Block2D", "{}Block2D"


def blocks(*down: str) -> dict[str, Any]:
    """A UNet's block types, the ascent being the descent turned round."""
    return {
        "down_block_types": [b.format("Down") for b in down],
        "up_block_types": [b.format("Up") for b in reversed(down)],
    }


SD1: dict[str, dict[str, Any]] = {
    # https://github.com/Nota-NetsPresso/BK-SDM: src/unet_config; its base has `layers_per_block` 1, as all of these
    "bk-sdm-small": blocks(CROSS, PLAIN) | {"mid_block_type": None},
    "bk-sdm-tiny": blocks(CROSS, CROSS) | {"mid_block_type": None},
    # https://huggingface.co/IDKiro/sdxs-512-dreamshaper: unet/config.json
    "sdxs-512": blocks(PLAIN, CROSS) | {"mid_block_type": None},
}
SDXL: dict[str, dict[str, Any]] = {
    # segmind/SSD-1B: the middle without attention, another depth at each attention
    "ssd-1b": {
        "mid_block_type": "UNetMidBlock2D",
        "layers_per_block": 2,
        "transformer_layers_per_block": [1, [2, 1]],
        "reverse_transformer_layers_per_block": [[1, 1, 2], 1],
    },
    # segmind/Segmind-Vega: the same, one depth a level
    "segmind-vega": {"mid_block_type": "UNetMidBlock2D", "transformer_layers_per_block": [1, 1]},
}


def with_unet(checkpoint: Path, **changes: Any) -> Path:
    """The checkpoint with a UNet of another configuration and of new random weights."""
    config = json.loads((checkpoint / "unet" / "config.json").read_text())
    made = UNet2DConditionModel.from_config({**config, **changes})
    assert {k: v for k, v in changes.items() if json.loads(json.dumps(made.config.get(k))) != v} == {}
    randomise(made, 77).save_pretrained(checkpoint / "unet")
    return checkpoint


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint's folder by name, made once."""
    root = tmp_path_factory.mktemp("pruned")

    def make(name: str) -> Path:
        folder = root / name
        if folder.is_dir():
            return folder
        if name in SDXL:
            return with_unet(make_sdxl(folder), **SDXL[name])
        with_unet(make_sd1(folder), **SD1[name])
        if name == "sdxs-512":
            tiny = make_tiny_vae(root / "tiny-vae")
            for file in (folder / "vae").iterdir():
                file.unlink()
            for file in tiny.iterdir():
                (folder / "vae" / file.name).write_bytes(file.read_bytes())
            index = json.loads((folder / "model_index.json").read_text())
            (folder / "model_index.json").write_text(json.dumps({**index, "vae": ["diffusers", "AutoencoderTiny"]}))
        return folder

    return make


def theirs(pipe: Any, steps: int, guidance: float, **given: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": steps, "guidance_scale": guidance, "width": WIDTH, "height": HEIGHT, **given}
    out = pipe(PROMPT, generator=[torch.Generator().manual_seed(7)], output_type="np", **call).images
    assert out.std() > 0.02, "the reference shows nothing"
    return np.asarray((out * 255).round().astype(np.uint8))


def ours(bundle: Any, **given: Any) -> np.ndarray:
    return np.asarray(fewstep.load(bundle)(PROMPT, seed=[7], size=(WIDTH, HEIGHT), **given).images)


@pytest.mark.parametrize(
    "name", ["bk-sdm-tiny", "ssd-1b", *(pytest.param(n, marks=SLOW) for n in ("bk-sdm-small", "segmind-vega"))]
)
def test_pictures_are_diffusers(name: str, pruned: Callable[[str], Path], tmp_path: Path) -> None:
    folder = pruned(name)
    bundle = export_bundle(folder, tmp_path / "b", gate=False)
    assert bundle.defaults.preset is None
    expected = theirs(DiffusionPipeline.from_pretrained(folder), 3, 5.0)
    assert psnr(ours(read_bundle(bundle.folder), steps=3, guidance=5.0), expected) >= LEAST
    stated = bundle.component("unet").config
    wanted = SDXL.get(name) or SD1[name]
    assert {k: stated.get(k) for k in wanted} == wanted


def test_sdxs_is_one_step_with_a_tiny_decoder(pruned: Callable[[str], Path], tmp_path: Path) -> None:
    """Its folder's name alone tells the preset: the checkpoint's own scheduler, one step, no guidance, 512 pixels."""
    folder = pruned("sdxs-512")
    bundle = export_bundle(folder, tmp_path / "b", gate=False)
    own = bundle.defaults
    assert (own.preset, own.sampler, own.steps, own.guidance, own.width) == ("sdxs-512", None, 1, 0.0, 512)
    assert bundle.component("vae_decoder").config["_class_name"] == "AutoencoderTiny"
    expected = theirs(DiffusionPipeline.from_pretrained(folder), 1, 0.0)
    assert psnr(ours(bundle), expected) >= LEAST


def test_a_scheduler_that_a_preset_leaves_in_place_must_run(pruned: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy(pruned("sdxs-512"), tmp_path / "sdxs-512")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prediction_type": "sample"}))
    refused(folder, tmp_path / "b", UnsupportedError, "scheduler cannot be run")


@pytest.mark.parametrize(
    ("name", "file", "style"),
    [
        ("ssd-1b", "lcm-lora-ssd-1b", "diffusers"),
        pytest.param("segmind-vega", "Segmind-VegaRT", "kohya", marks=SLOW),
    ],
)
def test_their_lcm_loras(name: str, file: str, style: str, pruned: Callable[[str], Path], tmp_path: Path) -> None:
    """The published files are all called `pytorch_lora_weights`: their repository's name tells what they are."""
    pytest.importorskip("peft")
    folder, place = pruned(name), tmp_path / file
    place.mkdir()
    lora = write_lora(make_lora(folder, text=False), place / "pytorch_lora_weights.safetensors", style)
    bundle = export_bundle(folder, tmp_path / "b", loras=[(lora, 1.0)], gate=False)
    assert bundle.defaults.preset == "lcm-lora"
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.load_lora_weights(str(place), weight_name=lora.name)
    pipe.fuse_lora()
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    assert psnr(ours(bundle), theirs(pipe, 4, 1.0)) >= LEAST


def test_a_lora_of_the_whole_family_is_refused(pruned: Callable[[str], Path], tiny_sdxl: Path, tmp_path: Path) -> None:
    lora = write_lora(make_lora(tiny_sdxl, text=False), tmp_path / "lcm-lora-sdxl.safetensors", "kohya")
    refused(pruned("segmind-vega"), tmp_path / "b", CorruptError, "match no weight", loras=[(lora, 1.0)])


def test_a_single_file_over_its_folder(pruned: Callable[[str], Path], tmp_path: Path) -> None:
    """SSD-1B's A1111 file takes its configuration from its own folder."""
    folder = pruned("ssd-1b")
    file = write_original(folder, tmp_path / "SSD-1B-A1111.safetensors")
    bundle = export_bundle(file, tmp_path / "b", base=folder, gate=False)
    plain = export_bundle(folder, tmp_path / "plain", gate=False)
    assert np.array_equal(ours(bundle, steps=2, guidance=3.0), ours(plain, steps=2, guidance=3.0))
