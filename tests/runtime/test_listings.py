"""Each listing of the five articles, with the import alone changed: diffusers' pictures, or a refusal by name."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import diffusers
import fewstep
import numpy as np
import pytest
import torch
from checkpoints import BETAS, _vae, copy, psnr
from diffusers.utils import load_image, make_image_grid
from fewstep.errors import FewstepError, UnsupportedError
from fewstep.runtime import diffusers_adapter
from fewstep.runtime.diffusers_adapter import utils
from listings import (
    SCHEDULERS,
    align_your_steps,
    as_arrays,
    batches,
    compared_schedulers,
    first_picture,
    lightning,
    turbo_image,
    turbo_text,
)
from safetensors.torch import load_file, save_file
from test_tasks import drawing

LEAST = 75.0
PUBLISHED = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.21.4",
    **{**BETAS, "trained_betas": None, "skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1},
    "clip_sample": False,
}
"""SD 1.5's scheduler as an article prints it."""
TURBO = {**BETAS, "timestep_spacing": "trailing", "prediction_type": "epsilon", "steps_offset": 1, "clip_sample": False}


def alike(theirs: list[Any], ours: list[Any]) -> None:
    assert len(theirs) == len(ours)
    for expected, found in zip(as_arrays(theirs), as_arrays(ours), strict=True):
        assert expected.std() > 2, "the reference shows nothing"
        assert psnr(expected, found) >= LEAST


@pytest.fixture(scope="module")
def with_scheduler(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Any]]:
    """A checkpoint's folder under another scheduler, and its bundle with the same."""

    def make(checkpoint: Path, bundle: Any, config: dict[str, Any]) -> tuple[Path, Any]:
        folder = copy(checkpoint, tmp_path_factory.mktemp("scheduled") / checkpoint.name)
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
        index = json.loads((folder / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", config["_class_name"]]
        (folder / "model_index.json").write_text(json.dumps(index))
        return folder, fewstep.load(replace(bundle, scheduler=config))

    return make


@pytest.fixture(scope="module")
def sd15(tiny_sd1: Path, sd1_bundle: Any, with_scheduler: Any) -> tuple[Path, Any]:
    return with_scheduler(tiny_sd1, sd1_bundle, PUBLISHED)


def test_align_your_steps(tiny_sdxl: Path, sdxl_bundle: Any, tmp_path: Path) -> None:
    _vae(41, scaling_factor=0.13025, force_upcast=True).save_pretrained(tmp_path)
    theirs, evaluations = align_your_steps(diffusers, tiny_sdxl, tmp_path)
    ours, own = align_your_steps(diffusers_adapter, sdxl_bundle, tmp_path)
    alike(theirs, ours)
    assert (evaluations, own) == (10, 10), "the last timestep is where sampling ends"
    assert np.array_equal(
        np.asarray(utils.make_image_grid(ours[:4], 2, 2)), np.asarray(make_image_grid(ours[:4], 2, 2))
    )


def test_first_picture(sd15: tuple[Path, Any]) -> None:
    alike(first_picture(diffusers, sd15[0]), first_picture(diffusers_adapter, sd15[1]))


def test_batches(sd15: tuple[Path, Any], tmp_path: Path) -> None:
    _vae(42).save_pretrained(tmp_path)
    alike(batches(diffusers, sd15[0], tmp_path), batches(diffusers_adapter, sd15[1], tmp_path))


def test_schedulers_are_shown_as_theirs(sd15: tuple[Path, Any]) -> None:
    theirs = diffusers.DiffusionPipeline.from_pretrained(sd15[0])
    ours = diffusers_adapter.DiffusionPipeline.from_pretrained(sd15[1])
    assert repr(ours.scheduler) == repr(theirs.scheduler)
    assert set(ours.scheduler.compatibles) == set(theirs.scheduler.compatibles)
    assert ours.scheduler.config == theirs.scheduler.config
    assert ours.scheduler.config.beta_end == 0.012
    assert ours.scheduler is ours.scheduler


@pytest.fixture(scope="module")
def compared(sd15: tuple[Path, Any]) -> tuple[Any, Any]:
    theirs = diffusers.DiffusionPipeline.from_pretrained(sd15[0], torch_dtype=torch.float32, use_safetensors=True)
    ours = diffusers_adapter.DiffusionPipeline.from_pretrained(sd15[1], torch_dtype=torch.float32, use_safetensors=True)
    return theirs, ours


@pytest.mark.parametrize("name", SCHEDULERS)
def test_compared_schedulers(compared: tuple[Any, Any], name: str) -> None:
    """One after another on the same pipeline, as the article has it."""
    theirs, ours = compared
    alike(compared_schedulers(diffusers, theirs, name), compared_schedulers(diffusers_adapter, ours, name))


@pytest.mark.parametrize("name", ["FlaxStableDiffusionPipeline", "FlaxDPMSolverMultistepScheduler"])
def test_flax_is_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedError, match=name):
        getattr(diffusers_adapter, name)


def test_lightning(tiny_sdxl: Path, sdxl_bundle: Any, tmp_path: Path) -> None:
    stored = load_file(tiny_sdxl / "unet" / "diffusion_pytorch_model.safetensors")
    file = tmp_path / "sdxl_lightning_4step_unet.safetensors"
    save_file({k: v * 0.9 for k, v in stored.items()}, file)
    theirs = lightning(diffusers, tiny_sdxl, file, tiny_sdxl)
    alike(theirs, lightning(diffusers_adapter, tiny_sdxl, file, sdxl_bundle))


@pytest.mark.parametrize("family", ["sdxl", "sd2"])
def test_turbo(family: str, with_scheduler: Any, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    checkpoint, bundle = (request.getfixturevalue(n) for n in (f"tiny_{family}", f"{family}_bundle"))
    name = "EulerAncestralDiscreteScheduler" if family == "sdxl" else "EulerDiscreteScheduler"
    folder, pipeline = with_scheduler(checkpoint, bundle, {"_class_name": name, **TURBO})
    picture = tmp_path / "start.png"
    drawing(90, 60).save(picture)
    alike(turbo_text(diffusers, folder), turbo_text(diffusers_adapter, pipeline))
    theirs = turbo_image(diffusers, folder, picture, load_image)
    alike(theirs, turbo_image(diffusers_adapter, pipeline, picture, utils.load_image))


@pytest.mark.slow
def test_half_precision_from_a_variant(tiny_sd1: Path, tmp_path: Path) -> None:
    """A checkpoint itself, of which only the half-precision files are there, as most listings load theirs.

    Half precision is no exact match: pictures in it differ from float32's by 30 to 50 dB in either library.
    """
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tiny_sd1).to(torch.float16)
    theirs.save_pretrained(tmp_path / "half", variant="fp16")
    options = {"torch_dtype": torch.float16, "variant": "fp16", "use_safetensors": True}
    ours = diffusers_adapter.DiffusionPipeline.from_pretrained(str(tmp_path / "half"), **options)
    assert ours.dtype == torch.float16
    call: dict[str, Any] = {"num_inference_steps": 4}
    found = ours(prompt="a red circle", generator=torch.Generator().manual_seed(2), **call).images
    expected = theirs.to(torch.float32)(
        prompt="a red circle", generator=torch.Generator().manual_seed(2), **call
    ).images
    assert psnr(*as_arrays([*expected, *found])) > 30
    with pytest.raises(FewstepError, match="torch_dtype is float32"):
        diffusers_adapter.DiffusionPipeline.from_pretrained(ours.pipeline, torch_dtype=torch.float32)
