"""A VAE that states a mean and a standard deviation: SDXL's inpainting reads them as it decodes alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import fewstep
import numpy as np
import pytest
import torch
from checkpoints import copy, psnr
from corpus import MEAN, STD
from fewstep.export import export_bundle
from fewstep.runtime import diffusers_adapter
from PIL import Image

LEAST = 75.0
PROMPT, SIDE = "a red circle", 32


@pytest.fixture(scope="module")
def checkpoint(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy(tiny_sdxl, tmp_path_factory.mktemp("statistics") / "checkpoint")
    file = folder / "vae" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "latents_mean": MEAN, "latents_std": STD}))
    return folder


@pytest.fixture(scope="module")
def ours(checkpoint: Path, sdxl_bundle: Any) -> fewstep.Pipeline:
    return fewstep.load(export_bundle(checkpoint, checkpoint.parent / "bundle", gate=False))


@pytest.fixture(scope="module")
def theirs(checkpoint: Path) -> Any:
    pipe = diffusers.StableDiffusionXLInpaintPipeline.from_pretrained(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn() -> tuple[Image.Image, Image.Image]:
    """A picture, and a mask of its right half."""
    y, x = np.mgrid[:SIDE, :SIDE]
    picture = np.stack([x * 8, y * 8, (x + y) * 4], -1).astype(np.uint8)
    return Image.fromarray(picture), Image.fromarray(np.where(x < SIDE // 2, 0, 255).astype(np.uint8))


@pytest.mark.parametrize("strength", [0.5, 0.9999, 1.0])
def test_inpainting(strength: float, ours: fewstep.Pipeline, theirs: Any) -> None:
    """Several images of one picture, from its latents and from noise, by the library and by the adapter."""
    image, mask = drawn()
    asked = {"prompt": PROMPT, "num_inference_steps": 4, "strength": strength, "guidance_scale": 3.0}
    asked |= {"image": image, "mask_image": mask, "width": SIDE, "height": SIDE, "num_images_per_prompt": 2}
    adapted = diffusers_adapter.StableDiffusionXLInpaintPipeline.from_pretrained(ours)
    both = []
    for pipe in (theirs, adapted):
        made = pipe(generator=torch.Generator().manual_seed(7), **asked).images
        both.append(np.stack([np.asarray(p) for p in made]))
    assert both[0].std() > 3, "the reference shows nothing"
    assert psnr(*both) >= LEAST
    one = theirs(**{**asked, "num_images_per_prompt": 1}, generator=torch.Generator().manual_seed(7)).images[0]
    call = {"image": image, "mask": mask, "strength": strength, "steps": 4, "guidance": 3.0, "size": (SIDE, SIDE)}
    assert psnr(np.asarray(one), ours(PROMPT, seed=7, **call).images[0]) >= LEAST


def test_image_to_image_reads_them_both_ways(checkpoint: Path, ours: fewstep.Pipeline) -> None:
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    asked = {"prompt": PROMPT, "image": drawn()[0], "num_inference_steps": 4, "strength": 0.5, "guidance_scale": 3.0}
    expected = pipe(generator=torch.Generator().manual_seed(7), **asked).images[0]
    made = ours(PROMPT, image=drawn()[0], strength=0.5, steps=4, guidance=3.0, seed=7).images[0]
    assert psnr(np.asarray(expected), made) >= LEAST
