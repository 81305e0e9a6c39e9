"""Inpainting, pictures of any size, several pictures and images: against diffusers' pipelines at 50 dB."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import fewstep
import numpy as np
import pytest
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from fewstep.errors import ArgumentError, FewstepError, UnknownNameError, UnsupportedError
from fewstep.runtime.pictures.inpaint import to_latent_mask
from fewstep.runtime.pictures.resize import fit_picture
from peers import LEAST_PSNR, generators, pipelines, pixels, psnr
from PIL import Image

SIZE = 32
SCHEDULERS = {
    "euler": EulerDiscreteScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
    "ddim": DDIMScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "heun": HeunDiscreteScheduler,
    "unipc_2": UniPCMultistepScheduler,
    "lcm": LCMScheduler,
}


def drawing(width: int = SIZE, height: int = SIZE, shift: int = 0) -> Image.Image:
    x, y = np.linspace(0, 255, width), np.linspace(0, 255, height)
    made = np.stack(np.broadcast_arrays(x[None], y[:, None], 90.0 + shift), -1)
    return Image.fromarray(made.astype(np.uint8))


def disc(width: int = SIZE, height: int = SIZE) -> Image.Image:
    """A soft-edged white disc, off the middle."""
    y, x = np.mgrid[:height, :width]
    away = np.hypot(x - 0.4 * width, y - 0.55 * height) / (0.3 * min(width, height))
    return Image.fromarray((255 * np.clip(1.6 - away, 0, 1)).astype(np.uint8))


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def both(request: pytest.FixtureRequest) -> dict[str, Any]:
    name = request.param
    checkpoint, bundle = request.getfixturevalue(f"tiny_{name}"), request.getfixturevalue(f"{name}_bundle")
    return {"name": name, "ours": fewstep.load(bundle), **pipelines(checkpoint, big=name == "sdxl")}


def theirs(both: dict[str, Any], kind: str, scheduler: str, seeds: list[int], **given: Any) -> np.ndarray:
    pipe = both[kind]
    before = pipe.scheduler
    pipe.scheduler = SCHEDULERS[scheduler].from_config(before.config)
    try:
        return pixels(pipe(generator=generators(seeds), output_type="np", **given))
    finally:
        pipe.scheduler = before


def ours(both: dict[str, Any], scheduler: str, **given: Any) -> np.ndarray:
    spacing = SCHEDULERS[scheduler].from_config(both["text"].scheduler.config).config
    schedule = None if scheduler == "lcm" else spacing.get("timestep_spacing")
    return both["ours"]("a red circle", sampler=scheduler, schedule=schedule, compat="diffusers", **given).images


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_inpainting(both: dict[str, Any], scheduler: str, strength: float) -> None:
    expected = theirs(
        both,
        "inpaint",
        scheduler,
        [4],
        prompt="a red circle",
        image=drawing(),
        mask_image=disc(),
        strength=strength,
        num_inference_steps=6,
        guidance_scale=3.0,
        height=SIZE,
        width=SIZE,
    )
    call = {"steps": 6, "guidance": 3.0, "seed": 4, "size": (SIZE, SIZE), "strength": strength}
    found = ours(both, scheduler, image=drawing(), mask=disc(), **call)
    assert psnr(found, expected) >= LEAST_PSNR
    assert psnr(ours(both, scheduler, image=drawing(), **call), expected) < LEAST_PSNR


def test_inpainting_a_batch(both: dict[str, Any]) -> None:
    expected = theirs(
        both,
        "inpaint",
        "euler_ancestral",
        [4, 9],
        prompt=["a red circle"] * 2,
        image=[drawing(), drawing(shift=90)],
        mask_image=disc(),
        strength=0.8,
        num_inference_steps=5,
        guidance_scale=3.0,
        height=SIZE,
        width=SIZE,
    )
    found = ours(
        both,
        "euler_ancestral",
        image=[drawing(), drawing(shift=90)],
        mask=disc(),
        strength=0.8,
        steps=5,
        guidance=3.0,
        seed=[4, 9],
        size=(SIZE, SIZE),
    )
    assert psnr(found, expected) >= LEAST_PSNR


def test_what_the_mask_keeps_is_kept(both: dict[str, Any]) -> None:
    """All black: the picture comes back through the VAE. All white: text to image, but for strength."""
    pipe, call = both["ours"], {"steps": 3, "seed": 1, "sampler": "euler", "guidance": 1.0}
    nothing = pipe("x", image=drawing(), mask=np.zeros((SIZE, SIZE), bool), **call)
    prepared = pipe.prepare(pipe.request("x", image=drawing(), **{**call, "strength": 1.0}))
    np.testing.assert_allclose(nothing.latents, prepared.latents, atol=1e-5)
    whole = np.ones((SIZE, SIZE), np.float32)
    request = pipe.request("x", image=drawing(), mask=whole, **call)
    gaussians = pipe.prepare(request).gaussians
    all_new = pipe("x", image=drawing(), mask=whole, **call)
    np.testing.assert_array_equal(all_new.latents, pipe("x", latents=gaussians, **call).latents)


@pytest.mark.parametrize("strength", [1.0, 0.99, 0.5])
def test_image_to_image_keeps_of_the_picture_what_diffusers_keeps(both: dict[str, Any], strength: float) -> None:
    """At strength 1 too, where noise of the highest level is added to the picture rather than put in its place."""
    expected = theirs(
        both,
        "image",
        "euler",
        [4],
        prompt="a red circle",
        image=drawing(),
        strength=strength,
        num_inference_steps=5,
        guidance_scale=3.0,
    )
    found = ours(both, "euler", image=drawing(), strength=strength, steps=5, guidance=3.0, seed=4, size=(SIZE, SIZE))
    assert psnr(found, expected) >= LEAST_PSNR


@pytest.mark.parametrize(("fit", "mode"), [("stretch", "default"), ("cover", "crop"), ("contain", "fill")])
@pytest.mark.parametrize("size", [(47, 37), (30, 90), (90, 30), (SIZE, 48)])
def test_fits_are_those_of_diffusers(fit: str, mode: str, size: tuple[int, int]) -> None:
    from diffusers.image_processor import VaeImageProcessor

    picture = drawing(*size)
    theirs = VaeImageProcessor(vae_scale_factor=1).resize(picture, 48, SIZE, resize_mode=mode)
    found = np.asarray(fit_picture(picture, SIZE, 48, fit)).astype(int)
    assert found.shape == (48, SIZE, 3)
    if fit == "contain":  # theirs stretches the edge from an empty box; compare where the picture is
        inside = np.asarray(fit_picture(picture, SIZE, 48, fit))
        top = 48 // 2 - min(48, size[1] * SIZE // size[0]) // 2
        left = SIZE // 2 - min(SIZE, size[0] * 48 // size[1]) // 2
        box = (slice(top, 48 - top - 1), slice(left, SIZE - left - 1))
        np.testing.assert_array_equal(inside[box], np.asarray(theirs)[box])
    else:
        np.testing.assert_array_equal(found, np.asarray(theirs))


def test_masks_come_in_many_forms(tmp_path: Path) -> None:
    import torch
    from diffusers.image_processor import VaeImageProcessor
    from fewstep.runtime.pictures.inpaint import open_mask

    grey = np.asarray(disc())
    disc().save(tmp_path / "mask.png")
    forms = [
        disc(),
        disc().convert("RGB"),
        str(tmp_path / "mask.png"),
        grey,
        grey[..., None],
        grey / 255.0,
        grey >= 128,
    ]
    made = [to_latent_mask(open_mask(f), 2, 0.5) for f in forms]
    processor = VaeImageProcessor(2, do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    theirs = torch.nn.functional.interpolate(processor.preprocess(disc()), size=(SIZE // 2, SIZE // 2))[0, 0].numpy()
    for mask in made:
        np.testing.assert_array_equal(mask, theirs)
    soft = to_latent_mask(disc(), 2, None)
    np.testing.assert_allclose(soft, grey.reshape(16, 2, 16, 2).mean((1, 3)) / 255.0, atol=1e-6)
    for bad in (
        np.zeros((2, 2), np.int64),
        np.full((2, 2), 2.0),
        np.zeros((2, 2, 3), np.uint8),
        np.zeros((0, 2), bool),
    ):
        with pytest.raises(ArgumentError, match="the mask is"):
            open_mask(bad)


def test_soft_masks(both: dict[str, Any]) -> None:
    """Exact where samplers remember nothing of older states (their reference loop agrees), refused where they do."""
    pipe = both["ours"]
    call = {"image": drawing(), "mask": disc(), "mask_threshold": None, "steps": 4, "seed": 2, "guidance": 1.0}
    with pytest.raises(UnsupportedError, match=r"soft mask with heun.*black and white"):
        pipe("x", sampler="heun", **call)
    request = pipe.request("x", sampler="dpmpp_2m", **call)
    prepared = pipe.prepare(request)
    mask = prepared.samplings[0].blend.mask
    assert ((mask > 0) & (mask < 1)).mean() > 0.05
    sharp = pipe("x", sampler="dpmpp_2m", **{**call, "mask_threshold": 0.5})
    soft = pipe("x", sampler="dpmpp_2m", **call)
    assert np.abs(sharp.latents - soft.latents).max() > 0.05
    kept = mask[0] == 0
    np.testing.assert_allclose(soft.latents[0][:, kept], prepared.latents[0][:, kept], atol=1e-5)


def test_pictures_prompts_and_images(both: dict[str, Any]) -> None:
    pipe, call = both["ours"], {"steps": 2, "strength": 0.5, "sampler": "euler"}
    first, second = drawing(), drawing(shift=90)
    many = pipe(["a", "b"], image=[first, second], images_per_prompt=2, seed=0, **call)
    assert len(many.images) == 4
    one = pipe("b", image=second, seed=2, **call)
    assert psnr(many.images[2], one.images[0]) >= LEAST_PSNR
    assert len(pipe("a", image=[first, second, first], seed=0, **call).images) == 3
    with pytest.raises(ArgumentError, match="2 pictures for 3 images"):
        pipe(["a", "b", "c"], image=[first, second], **call)


BAD: list[tuple[dict[str, Any], type[FewstepError], str]] = [
    ({"mask": disc()}, ArgumentError, "a mask without an image"),
    ({"image": drawing(), "fit": "squeeze"}, UnknownNameError, "squeeze"),
    ({"image": drawing(), "mask": [disc(), disc()]}, ArgumentError, "2 masks for 1 images"),
    ({"image": drawing(40, 30), "mask": disc(), "fit": "cover"}, ArgumentError, "mask is 32x32 and the picture 40x30"),
    ({"image": drawing(1, 30_000), "fit": "cover", "size": (64, 64)}, ArgumentError, "picture of 1x30000 for 64x64"),
    ({"image": [drawing(4, 4)] * 1025}, ArgumentError, "1025 pictures"),
    ({"image": drawing(3, 1), "fit": "diffusers"}, ArgumentError, "at least 2x2"),
    ({"image": drawing(), "latents": np.zeros((1, 4, 16, 16))}, ArgumentError, "latents beside an image"),
    ({"latents": np.zeros((1, 4, 16, 15))}, ArgumentError, "latents has shape"),
    ({"image": drawing(), "mask": disc(), "mask_threshold": 2}, ArgumentError, "mask_threshold is 2"),
]


@pytest.mark.parametrize(("given", "kind", "words"), BAD, ids=[f"{i}-{list(g)[-1]}" for i, (g, _, _) in enumerate(BAD)])
def test_what_does_not_fit_is_refused(
    sd1_bundle: Any, given: dict[str, Any], kind: type[FewstepError], words: str
) -> None:
    with pytest.raises(kind, match=words):
        fewstep.load(sd1_bundle).request("x", **given)


def test_a_request_holds_its_pictures(both: dict[str, Any]) -> None:
    pipe = both["ours"]
    request = pipe.request("x", image=drawing(), mask=disc(), steps=2, seed=0)
    assert request.has_image
    stream = pipe.stream(request)
    while True:
        try:
            next(stream)
        except StopIteration as stop:
            images = stop.value.images
            break
    np.testing.assert_array_equal(images, pipe("x", image=drawing(), mask=disc(), steps=2, seed=0).images)


def test_a_server_inpaints_and_takes_long_prompts(sd1_bundle: Any) -> None:
    """Requests of every kind share its evaluations and come out as they do alone."""
    from fewstep.serving import Server

    pipe = fewstep.load(sd1_bundle, size=(SIZE, SIZE))
    plain = {"steps": 4, "guidance": 3.0, "sampler": "dpmpp_2m"}
    asked: list[dict[str, Any]] = [
        {"prompt": "a", "seed": 1, "image": drawing(), "mask": disc(), "strength": 0.9},
        {"prompt": "a (red:1.3) BREAK circle", "seed": 2, "prompt_syntax": "a1111"},
        {"prompt": "b", "seed": 3, "image": drawing(), "strength": 0.5, "seed_device": "cuda"},
    ]
    alone = [pipe(**a, **plain) for a in asked]
    with Server(pipe, most_slots=4, most_rows=8, queue=16) as server:
        tickets = [server.submit(**a, **plain) for a in asked]
        results = [t.result(timeout=60) for t in tickets]
    for mine, expected in zip(results, alone, strict=True):
        assert psnr(mine.images, expected.images) >= LEAST_PSNR
