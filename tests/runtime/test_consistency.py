"""Latent consistency models from pictures: diffusers' class for them spaces all steps by the strength."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import diffusers
import fewstep
import numpy as np
import pytest
import torch
from checkpoints import BETAS, copy, make_sd1, psnr
from commandline import call
from fewstep.bundle import read_bundle
from fewstep.errors import ArgumentError, CorruptError, UnsupportedError
from fewstep.export import export_bundle
from fewstep.export.gate.pictures import TASKS
from fewstep.runtime import diffusers_adapter
from fewstep.serving.live import LiveSettings
from PIL import Image
from test_tasks import disc, drawing

LEAST = 75.0
PROMPT = "a red circle"
DROPPED, SPACED = "StableDiffusionImg2ImgPipeline", "LatentConsistencyModelImg2ImgPipeline"
CASES: list[dict[str, Any]] = [
    {"num_inference_steps": 4, "strength": 0.5},
    {"num_inference_steps": 3, "strength": 0.2},
    {"num_inference_steps": 1, "strength": 0.8},
    {"num_inference_steps": 4, "strength": 1.0},
    {"num_inference_steps": 5, "strength": 0.7, "original_inference_steps": 20},
    {"timesteps": [959, 719, 479, 239], "strength": 0.6},
    {"guidance_scale": 1.0},
    {"num_images_per_prompt": 2},
]


def consistent(folder: Path, source: Path, **index: Any) -> Path:
    """A checkpoint under LCM's scheduler, with changes to its index."""
    made = copy(source, folder)
    (made / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": "LCMScheduler", **BETAS}))
    stated = json.loads((made / "model_index.json").read_text())
    stated |= {"scheduler": ["diffusers", "LCMScheduler"], **index}
    (made / "model_index.json").write_text(json.dumps(stated))
    return made


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose UNet takes guidance as an embedding, and whose index names the class for that."""
    root = tmp_path_factory.mktemp("consistent")
    plain = make_sd1(root / "plain", time_cond_proj_dim=8)
    return consistent(root / "checkpoint", plain, _class_name="LatentConsistencyModelPipeline")


@pytest.fixture(scope="module")
def bundle(distilled: Path) -> Any:
    return export_bundle(distilled, distilled.parent / "bundle")


@pytest.fixture(scope="module")
def loaded(bundle: Any) -> fewstep.Pipeline:
    return fewstep.load(bundle)


@pytest.fixture(scope="module")
def theirs(distilled: Path) -> Any:
    return quiet(diffusers.AutoPipelineForImage2Image.from_pretrained(distilled))


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(pipe: Any, **given: Any) -> np.ndarray:
    asked = {"prompt": PROMPT, "image": drawing(), "generator": torch.Generator().manual_seed(7), **given}
    made = np.stack([np.asarray(p) for p in pipe(**asked).images])
    assert made.std() > 2, "it shows nothing"
    return made


def test_the_class_is_the_one_that_the_index_names(distilled: Path, loaded: fewstep.Pipeline, tmp_path: Path) -> None:
    """As diffusers chooses it, for loading and from another pipeline, whatever the UNet takes."""
    names = ("AutoPipelineForText2Image", "AutoPipelineForImage2Image", "DiffusionPipeline")
    for name in names:
        theirs = getattr(diffusers, name).from_pretrained(distilled)
        ours = getattr(diffusers_adapter, name).from_pretrained(loaded)
        assert type(ours).__name__ == type(theirs).__name__
    for library, source in ((diffusers, distilled), (diffusers_adapter, loaded)):
        plain = library.StableDiffusionPipeline.from_pretrained(source)
        assert type(library.AutoPipelineForImage2Image.from_pipe(plain)).__name__ == DROPPED
        spaced = library.DiffusionPipeline.from_pretrained(source)
        assert type(library.AutoPipelineForImage2Image.from_pipe(spaced)).__name__ == SPACED
    with pytest.raises(ValueError, match="AutoPipeline"):
        diffusers.AutoPipelineForInpainting.from_pretrained(distilled)
    with pytest.raises(UnsupportedError, match="StableDiffusionInpaintPipeline"):
        diffusers_adapter.AutoPipelineForInpainting.from_pretrained(loaded)


@pytest.mark.parametrize("given", CASES, ids=str)
def test_pictures_are_the_librarys(given: dict[str, Any], theirs: Any, loaded: fewstep.Pipeline) -> None:
    ours = diffusers_adapter.AutoPipelineForImage2Image.from_pretrained(loaded)
    assert psnr(pictures(theirs, **given), pictures(ours, **given)) >= LEAST


def test_prompts_alone(distilled: Path, loaded: fewstep.Pipeline) -> None:
    theirs = quiet(diffusers.DiffusionPipeline.from_pretrained(distilled))
    ours = diffusers_adapter.DiffusionPipeline.from_pretrained(loaded)
    for given in ({}, {"original_inference_steps": 30, "num_inference_steps": 3, "guidance_scale": 2.0}):
        asked = {"image": None, "width": 32, "height": 32, **given}
        del asked["image"]
        both = [
            np.asarray(p(PROMPT, generator=torch.Generator().manual_seed(7), **asked).images[0]) for p in (theirs, ours)
        ]
        assert psnr(*both) >= LEAST


def test_the_other_class_leaves_steps_out(distilled: Path, loaded: fewstep.Pipeline, tmp_path: Path) -> None:
    """`StableDiffusionImg2ImgPipeline` hands no strength to `set_timesteps`, whatever scheduler and UNet it has."""
    given = {"num_inference_steps": 4, "strength": 0.5}
    theirs = quiet(diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(distilled))
    ours = diffusers_adapter.StableDiffusionImg2ImgPipeline.from_pretrained(loaded)
    expected = pictures(theirs, **given)
    assert psnr(expected, pictures(ours, **given)) >= LEAST
    spaced = diffusers_adapter.AutoPipelineForImage2Image.from_pretrained(loaded)
    other = pictures(spaced, guidance_scale=7.5, **given)
    assert psnr(expected, other) < 40


def test_a_checkpoint_that_names_the_plain_class(tiny_sd1: Path, sd1_bundle: Any, tmp_path: Path) -> None:
    """LCM's scheduler alone, as after fusing a LoRA: the first steps are left out."""
    folder = consistent(tmp_path / "checkpoint", tiny_sd1)
    pipe = fewstep.load(export_bundle(folder, tmp_path / "bundle", gate=False))
    theirs = quiet(diffusers.AutoPipelineForImage2Image.from_pretrained(folder))
    given = {"num_inference_steps": 4, "strength": 0.5, "guidance_scale": 3.0}
    expected = pictures(theirs, **given)
    assert (
        psnr(expected, pictures(diffusers_adapter.AutoPipelineForImage2Image.from_pretrained(pipe), **given)) >= LEAST
    )
    ours = pipe(PROMPT, image=drawing(), steps=4, strength=0.5, guidance=3.0, seed=7).images
    assert psnr(expected, ours) >= LEAST


@pytest.mark.parametrize("asked", [{}, {"sampler": "lcm", "compat": "diffusers"}], ids=str)
def test_library(asked: dict[str, Any], theirs: Any, loaded: fewstep.Pipeline) -> None:
    expected = pictures(theirs, num_inference_steps=3, strength=0.3, guidance_scale=4.0)
    result = loaded(PROMPT, image=drawing(), steps=3, strength=0.3, guidance=4.0, seed=7, **asked)
    assert psnr(expected, result.images) >= LEAST


def test_its_preset_spaces_as_its_scheduler_does(distilled: Path, theirs: Any, tmp_path: Path) -> None:
    pipe = fewstep.load(export_bundle(distilled, tmp_path / "bundle", gate=False, preset="lcm"))
    expected = pictures(theirs, strength=0.5, guidance_scale=8.0)
    assert psnr(expected, pipe(PROMPT, image=drawing(), strength=0.5, seed=7).images) >= LEAST


def test_command_line(theirs: Any, bundle: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawing().save(tmp_path / "in.png")
    asked = ["--steps", "3", "--strength", "0.3", "--guidance", "4", "--seed", "7"]
    files = ["--image", str(tmp_path / "in.png"), "--output", str(tmp_path / "out.png")]
    assert call(capsys, "run", str(bundle.folder), "--prompt", PROMPT, *asked, *files)[0] == 0
    expected = pictures(theirs, num_inference_steps=3, strength=0.3, guidance_scale=4.0)
    assert psnr(expected[0], np.asarray(Image.open(tmp_path / "out.png"))) >= LEAST


def test_a_set_timesteps_of_ones_own_is_handed_the_strength(theirs: Any, loaded: fewstep.Pipeline) -> None:
    class Lower(diffusers.LCMScheduler):
        def set_timesteps(self, *given: Any, strength: float = 1.0, **named: Any) -> None:
            super().set_timesteps(*given, strength=strength * 0.9, **named)

    ours = diffusers_adapter.AutoPipelineForImage2Image.from_pretrained(loaded)
    theirs = quiet(diffusers.AutoPipelineForImage2Image.from_pipe(theirs))
    for pipe in (theirs, ours):
        pipe.scheduler = Lower.from_config(pipe.scheduler.config)
    given = {"num_inference_steps": 4, "strength": 0.5}
    assert psnr(pictures(theirs, **given), pictures(ours, **given)) >= LEAST


def test_what_the_class_cannot_do_is_refused(loaded: fewstep.Pipeline, sd1_bundle: Any) -> None:
    """diffusers fails in the same places, with errors of Python's."""
    ours = diffusers_adapter.AutoPipelineForImage2Image.from_pretrained(loaded)
    with pytest.raises(ArgumentError, match="leaves 5 of the 50 timesteps"):
        pictures(ours, num_inference_steps=6, strength=0.1)
    for value in (0, 1001, 2.5, "x"):
        with pytest.raises(ArgumentError, match="original_inference_steps"):
            pictures(ours, original_inference_steps=value)
    ours.scheduler = diffusers.EulerDiscreteScheduler.from_config(ours.scheduler.config)
    with pytest.raises(UnsupportedError, match="EulerDiscreteScheduler in Latent"):
        pictures(ours)
    plain = diffusers_adapter.LatentConsistencyModelImg2ImgPipeline.from_pretrained(fewstep.load(sd1_bundle))
    with pytest.raises(UnsupportedError, match="time_cond_proj_dim"):
        pictures(plain)
    with pytest.raises(ArgumentError, match="strength 0"):
        loaded(PROMPT, image=drawing(), strength=0.0)


def test_inpainting_leaves_steps_out(distilled: Path, loaded: fewstep.Pipeline) -> None:
    """diffusers has no class for it beside the plain one."""
    theirs = quiet(diffusers.StableDiffusionInpaintPipeline.from_pretrained(distilled))
    given = {"num_inference_steps": 4, "strength": 0.6, "mask_image": disc(), "height": 32, "width": 32}
    expected = pictures(theirs, guidance_scale=4.0, **given)
    asked = {"image": drawing(), "mask": disc(), "steps": 4, "strength": 0.6, "guidance": 4.0, "size": (32, 32)}
    assert psnr(expected, loaded(PROMPT, seed=7, **asked).images) >= LEAST


def test_a_live_frame_takes_the_steps_that_were_asked_for(loaded: fewstep.Pipeline) -> None:
    for strength in (0.1, 0.5, 1.0):
        for sampler in (None, "euler"):
            settings = LiveSettings(prompt=PROMPT, steps=3, strength=strength, sampler=sampler)
            request = settings.request(loaded, image=True)
            assert request.program.evaluations == 3
            assert request.steps == (3 if sampler is None else max(3, np.ceil(3 / strength)))


def test_the_manifest_names_the_class(bundle: Any, sd1_bundle: Any, tmp_path: Path) -> None:
    assert bundle.pipeline == "LatentConsistencyModelPipeline"
    assert {t: bundle.gate["pictures"][t]["status"] for t in TASKS} == dict.fromkeys(TASKS, "passed")
    assert sd1_bundle.pipeline == "StableDiffusionPipeline"
    file = copy(bundle.folder, tmp_path / "bundle") / "bundle.json"
    stated = json.loads(file.read_text())
    for name, respaces in (("StableDiffusionImg2ImgPipeline", False), (None, True)):
        file.write_text(json.dumps({**stated, "pipeline": name}))
        assert read_bundle(file.parent).respaces is respaces
    file.write_text(json.dumps({k: v for k, v in stated.items() if k != "pipeline"}))
    assert read_bundle(file.parent).respaces, "older bundles are told by their UNet"
    for name in ("StableDiffusionXLPipeline", "os.system", 5, []):
        file.write_text(json.dumps({**stated, "pipeline": name}))
        with pytest.raises(CorruptError, match="pipeline"):
            read_bundle(file.parent)
