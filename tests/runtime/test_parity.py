"""The same seed gives diffusers' own picture: tiny random checkpoints of each family, at 75 dB and more in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fewstep
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from fewstep.runtime.prompts.syntax import Prompt
from fewstep.runtime.prompts.tokenizer import PromptTokenizer
from PIL import Image

FAMILIES = ("sd1", "sd2", "sdxl", "embedded")
SCHEDULERS = {"euler": EulerDiscreteScheduler, "ddim": DDIMScheduler, "dpmpp_2m": DPMSolverMultistepScheduler}
PROMPT = "a red circle, hello! Émile's café 🎉 ﬁn"
LONG = "a very long prompt with " + "many words and colours " * 50
LEAST_PSNR = 75.0


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> dict[str, Any]:
    """A family's bundle, loaded by fewstep, and its checkpoint, loaded by diffusers."""
    name = request.param
    if name == "embedded":
        from fewstep.export.embedded import embedded_bundle, embedded_checkpoint

        checkpoint, bundle = embedded_checkpoint("base"), embedded_bundle("base")[0]
    else:
        checkpoint, bundle = request.getfixturevalue(f"tiny_{name}"), request.getfixturevalue(f"{name}_bundle")
    big = name == "sdxl"
    text = (StableDiffusionXLPipeline if big else StableDiffusionPipeline).from_pretrained(
        checkpoint, torch_dtype=torch.float32
    )
    image = (StableDiffusionXLImg2ImgPipeline if big else StableDiffusionImg2ImgPipeline)(
        **text.components, **({} if big else {"requires_safety_checker": False})
    )
    for pipe in (text, image):
        pipe.set_progress_bar_config(disable=True)
    return {
        "ours": fewstep.load(bundle),
        "text": text,
        "image": image,
        "config": dict(text.scheduler.config),
        "size": bundle.defaults.width,
    }


def reference(
    family: dict[str, Any], kind: str, scheduler: str | None, seeds: list[int] | int, **given: Any
) -> np.ndarray:
    pipe = family[kind]
    original = pipe.scheduler
    if scheduler is not None:
        pipe.scheduler = SCHEDULERS[scheduler].from_config(family["config"])
    generator = (
        torch.Generator().manual_seed(seeds)
        if isinstance(seeds, int)
        else [torch.Generator().manual_seed(s) for s in seeds]
    )
    try:
        out = pipe(generator=generator, output_type="np", **given).images
    finally:
        pipe.scheduler = original
    return (out * 255).round().astype(np.uint8)


def spacing(family: dict[str, Any], scheduler: str) -> str:
    return str(SCHEDULERS[scheduler].from_config(family["config"]).config.timestep_spacing)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_text_to_image(family: dict[str, Any], scheduler: str, batch: int) -> None:
    seeds = [11 + i for i in range(batch)]
    negative = None if batch == 1 else "blurry, grey"
    theirs = reference(
        family,
        "text",
        scheduler,
        seeds,
        prompt=[PROMPT] * batch,
        num_inference_steps=6,
        guidance_scale=4.0,
        negative_prompt=None if negative is None else [negative] * batch,
    )
    result = family["ours"](
        PROMPT,
        negative=negative,
        steps=6,
        guidance=4.0,
        seed=seeds,
        sampler=scheduler,
        schedule=spacing(family, scheduler),
        compat="diffusers",
    )
    assert theirs.std() > 5, "the reference shows nothing"
    assert psnr(result.images, theirs) >= LEAST_PSNR


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("batch", [1, 3])
def test_image_to_image(family: dict[str, Any], scheduler: str, batch: int) -> None:
    size = family["size"]
    x = np.linspace(0, 255, size, dtype=np.uint8)
    picture = Image.fromarray(np.stack(np.broadcast_arrays(x[None], x[:, None], np.uint8(90)), -1))
    seeds = [3 + i for i in range(batch)]
    theirs = reference(
        family,
        "image",
        scheduler,
        seeds,
        prompt=[PROMPT] * batch,
        image=[picture] * batch,
        strength=0.6,
        num_inference_steps=7,
        guidance_scale=3.0,
    )
    result = family["ours"](
        PROMPT,
        image=picture,
        strength=0.6,
        steps=7,
        guidance=3.0,
        seed=seeds,
        sampler=scheduler,
        schedule=spacing(family, scheduler),
        compat="diffusers",
    )
    assert psnr(result.images, theirs) >= LEAST_PSNR


def test_the_checkpoints_own_scheduler_and_no_guidance(family: dict[str, Any]) -> None:
    theirs = reference(family, "text", None, [5], prompt=PROMPT, num_inference_steps=5, guidance_scale=1.0)
    result = (
        family["ours"](PROMPT, steps=5, guidance=1.0, seed=5, sampler=None)
        if family["ours"].bundle.defaults.sampler is None
        else None
    )
    if result is None:
        config = family["ours"].bundle.scheduler
        result = family["ours"](
            PROMPT,
            steps=5,
            guidance=1.0,
            seed=5,
            sampler=config["_class_name"],
            schedule=config["timestep_spacing"],
            compat="diffusers",
        )
    assert psnr(result.images, theirs) >= LEAST_PSNR


def test_one_generator_for_the_batch(family: dict[str, Any]) -> None:
    theirs = reference(family, "text", "euler", 21, prompt=[PROMPT] * 3, num_inference_steps=4, guidance_scale=3.0)
    result = family["ours"](
        [PROMPT] * 3,
        steps=4,
        guidance=3.0,
        seed=21,
        shared_stream=True,
        sampler="euler",
        schedule=spacing(family, "euler"),
        compat="diffusers",
    )
    assert psnr(result.images, theirs) >= LEAST_PSNR


@pytest.mark.parametrize(
    "prompt",
    ["", LONG, "🎉🎉 ünïcødé", "HELLO   World!\n\ttabs", "it's 3 o'clock, don't!", "a" * 300, "日本語 مرحبا", "!"],
)
def test_tokens_are_the_checkpoints_own(family: dict[str, Any], prompt: str) -> None:
    pipe = family["text"]
    other = getattr(pipe, "tokenizer_2", None)
    padded = [
        t(prompt, padding="max_length", max_length=77, truncation=True).input_ids for t in (pipe.tokenizer, other) if t
    ]
    bundle = family["ours"].bundle
    for record, expected, theirs in zip(bundle.tokenizers, padded, (pipe.tokenizer, other), strict=False):
        tokenizer = PromptTokenizer(bundle, record)
        (chunk,), cut = tokenizer.chunks(Prompt(text=prompt), prompt)
        assert tokenizer.wrap(chunk.tokens) == expected
        assert cut == (len(theirs(prompt).input_ids) > 77)


def test_another_size_and_other_prompts_in_one_batch(family: dict[str, Any]) -> None:
    size = family["size"]
    width, height = size + 32, size
    prompts = [PROMPT, "a green square"]
    theirs = reference(
        family,
        "text",
        "euler",
        [1, 2],
        prompt=prompts,
        num_inference_steps=3,
        guidance_scale=2.0,
        width=width,
        height=height,
    )
    result = family["ours"](
        prompts,
        steps=3,
        guidance=2.0,
        seed=[1, 2],
        size=(width, height),
        sampler="euler",
        schedule=spacing(family, "euler"),
        compat="diffusers",
    )
    assert result.images.shape == (2, height, width, 3)
    assert psnr(result.images, theirs) >= LEAST_PSNR


def test_bundle_path_is_enough(sd1_bundle: Any) -> None:
    result = fewstep.load(Path(sd1_bundle.folder))("x", steps=1, seed=0)
    assert result.images.dtype == np.uint8
