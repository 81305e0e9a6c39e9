"""DeepFloyd-IF's stages beside diffusers' own pipelines, floats against floats: what both make before it is rounded."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import fewstep
import fewstep.export
import numpy as np
import pytest
import torch
from diffusers import IFPipeline, IFSuperResolutionPipeline
from fewstep.bundle import Bundle, read_bundle
from fewstep.engines import BuildOptions, Store, build_engines
from fewstep.errors import ArgumentError, UnsupportedError
from fewstep.export import export_bundle
from fewstep.runtime import Cascade
from fewstep.runtime.device.base import VARIANCE
from fewstep.runtime.pictures.told import enlarge
from PIL import Image
from pixel_checkpoints import generators, make_second

LEAST = 75.0
PROMPTS = ["A Red circle, hello! ", "rings of GLASS  and 7 stars?"]
NEGATIVE = "a small house"


class Stage(NamedTuple):
    checkpoint: Path
    bundle: Bundle
    theirs: Any
    ours: fewstep.Pipeline


def psnr(ours: np.ndarray, theirs: Any) -> float:
    """Of pixels from -1 to 1, or beyond."""
    expected = np.asarray(theirs, np.float64)
    error = float(np.mean((ours.astype(np.float64) - expected) ** 2))
    peak = 2 * max(1.0, float(np.abs(expected).max()))
    return 200.0 if error == 0 else float(10 * np.log10(peak**2 / error))


def stage(checkpoint: Path, bundle: Bundle, cls: Any) -> Stage:
    theirs = cls.from_pretrained(checkpoint, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    return Stage(checkpoint, bundle, theirs, fewstep.load(bundle))


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    diffusers.utils.logging.set_verbosity_error()


@pytest.fixture(scope="module")
def first(deepfloyd: Path) -> Stage:
    return stage(deepfloyd / "if-i", read_bundle(deepfloyd / "first"), IFPipeline)


@pytest.fixture(scope="module")
def second(deepfloyd: Path) -> Stage:
    return stage(deepfloyd / "if-ii", read_bundle(deepfloyd / "second"), IFSuperResolutionPipeline)


def small(first: Stage) -> np.ndarray:
    """What the first stage makes, float32 [2, 3, 16, 16]."""
    return first.ours(PROMPTS, steps=3, seed=[8, 9]).latents


def test_the_gate_compared_everything(first: Stage, second: Stage) -> None:
    """Of the second stage; the first is exported without it, to be quick."""
    assert second.bundle.gate["status"] == "passed"
    assert {c["status"] for c in second.bundle.gate["components"].values()} == {"passed"}
    assert list(second.bundle.gate["pictures"]) == ["upscaled"]
    for one in (first, second):
        assert [s.name for s in one.bundle.component("unet").outputs] == ["out", VARIANCE]
        assert one.bundle.latent.channels == 3
        assert "vae_encoder" not in one.bundle.components


@pytest.mark.parametrize("guidance", [1.0, 7.0])
def test_the_first_stage_is_diffusers_own(first: Stage, guidance: float) -> None:
    """As it is shipped: learned variance, thresholding; two prompts, not square, and a negative prompt."""
    call = {"negative_prompt": [NEGATIVE] * 2} if guidance > 1 else {}
    theirs = first.theirs(
        PROMPTS, num_inference_steps=6, guidance_scale=guidance, generator=generators([3, 4]), output_type="pt",
        height=16, width=24, **call,
    ).images  # fmt: skip
    ours = first.ours(PROMPTS, negative=NEGATIVE, steps=6, guidance=guidance, seed=[3, 4], size=(24, 16))
    assert psnr(ours.latents, theirs) >= LEAST
    assert (np.abs(ours.latents) < 0.99).mean() > 0.2, "a picture of nothing but the bounds shows no mistake"
    expected = ((theirs / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy().astype(np.uint8)
    assert np.abs(ours.images.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("level", [None, 40, 999])
def test_the_second_stage_is_diffusers_own(first: Stage, second: Stage, level: int | None) -> None:
    image = small(first)
    theirs = second.theirs(
        PROMPTS, image=torch.from_numpy(image), num_inference_steps=5, generator=generators([5, 6]), output_type="pt",
        height=40, width=56, **({} if level is None else {"noise_level": level}),
    ).images  # fmt: skip
    ours = second.ours(PROMPTS, image=image, steps=5, seed=[5, 6], size=(56, 40), noise_level=level)
    assert psnr(ours.latents, theirs) >= LEAST
    other = second.ours(PROMPTS, image=image, steps=5, seed=[5, 6], size=(56, 40), noise_level=500)
    assert psnr(other.latents, ours.latents) < 40


def test_one_stream_and_several_images_of_a_picture(first: Stage, second: Stage) -> None:
    picture = Image.fromarray(np.random.default_rng(3).integers(0, 256, (12, 20, 3), dtype=np.uint8))
    theirs = second.theirs(
        PROMPTS[0], image=picture, num_inference_steps=3, num_images_per_prompt=2,
        generator=torch.Generator().manual_seed(11), output_type="pt",
    ).images  # fmt: skip
    ours = second.ours(PROMPTS[0], image=picture, steps=3, seed=11, images_per_prompt=2, shared_stream=True)
    assert psnr(ours.latents, theirs) >= LEAST


SCHEDULERS: list[tuple[str, dict[str, Any], dict[str, Any], float]] = [
    ("DDIMScheduler", {}, {"sampler": "ddim"}, LEAST),
    ("DDPMScheduler", {"variance_type": "fixed_large"}, {"sampler": "ddpm", "variance_type": "fixed_large"}, LEAST),
    ("DPMSolverMultistepScheduler", {}, {"sampler": "dpmpp_2m"}, LEAST),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {"sampler": "dpmpp_2m_sde"}, LEAST),
    ("UniPCMultistepScheduler", {}, {"sampler": "unipc_2"}, LEAST),
    ("DEISMultistepScheduler", {}, {"sampler": "deis_2"}, LEAST),
    # steps from a state that rows recover by 150 times what float32 rounds, under cosine betas
    ("DPMSolverSinglestepScheduler", {"lower_order_final": True}, {"sampler": "dpmpp_2s"}, 55.0),
]


@pytest.mark.parametrize(("name", "config", "asked", "least"), SCHEDULERS)
def test_every_scheduler_that_thresholds(
    first: Stage, second: Stage, name: str, config: dict[str, Any], asked: dict[str, Any], least: float
) -> None:
    image, cls = small(first)[:1], getattr(diffusers, name)
    for one, told in ((first, {}), (second, {"image": torch.from_numpy(image)})):
        shipped = one.theirs.scheduler
        one.theirs.scheduler = cls.from_config({**shipped.config, "variance_type": None, **config})
        assert one.theirs.scheduler.config.thresholding
        try:
            theirs = one.theirs(
                PROMPTS[0], num_inference_steps=6, generator=generators([7]), output_type="pt", **told
            ).images
        finally:
            one.theirs.scheduler = shipped
        ours = one.ours(PROMPTS[0], steps=6, seed=7, compat="diffusers", **asked, **({"image": image} if told else {}))
        assert psnr(ours.latents, theirs) >= least


@pytest.mark.slow
def test_a_scheduler_that_ignores_what_the_network_says(tmp_path: Path) -> None:
    """A multistep scheduler in the checkpoint itself, with the variance that the network says left out."""
    # leading: from the last timestep of cosine betas on, x0 is what float32 leaves of numbers 20000 times larger
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2", thresholding=True, sample_max_value=1.5, timestep_spacing="leading"
    )
    levels = ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D")
    config: dict[str, Any] = {
        "block_out_channels": (8, 12, 16), "down_block_types": levels,
        "up_block_types": tuple(n.replace("Downsample", "Upsample").replace("Down", "Up") for n in reversed(levels)),
        "cross_attention_norm": None, "addition_embed_type": None, "class_embed_type": None,
    }  # fmt: skip
    checkpoint = make_second(tmp_path / "checkpoint", scheduler, **config)
    one = stage(checkpoint, export_bundle(checkpoint, tmp_path / "made", gate=False), IFSuperResolutionPipeline)
    assert [c.name for c in one.bundle.conditions] == ["encoder_hidden_states", "low_resolution"]
    image = np.random.default_rng(5).uniform(-1, 1, (1, 3, 9, 7)).astype(np.float32)
    theirs = one.theirs(
        PROMPTS[1], image=torch.from_numpy(image), num_inference_steps=4, generator=generators([2]), output_type="pt",
        height=24, width=32,
    ).images  # fmt: skip
    ours = one.ours(PROMPTS[1], image=image, steps=4, seed=2, size=(32, 24))
    assert psnr(ours.latents, theirs) >= LEAST


def test_align_your_steps_by_its_name(first: Stage) -> None:
    table = [995, 920, 811, 686, 555, 418, 315, 174, 109, 12]
    theirs = first.theirs(PROMPTS[0], timesteps=table, generator=generators([1]), output_type="pt").images
    ours = first.ours(PROMPTS[0], sampler="ddpm", schedule="ays_if", steps=10, seed=1, compat="diffusers")
    assert psnr(ours.latents, theirs) >= LEAST
    for name in ("ays_if", "ays"):  # the family's own
        request = first.ours.request(PROMPTS[0], sampler="dpmpp_2m", schedule=name, steps=10)
        assert np.abs(request.program.timesteps - table).max() < 0.35
        assert request.program.clip is not None
    assert np.isfinite(first.ours(PROMPTS[0], sampler="dpmpp_2m", schedule="ays_if", steps=7, seed=1).latents).all()


@pytest.mark.parametrize("device", ["cpu", "cpu:torch"])
def test_pictures_of_different_lengths_share_ticks(first: Stage, second: Stage, device: str) -> None:
    """And are what they are alone: one thresholds and is spread, one neither, one steps from older x0."""
    options: dict[str, Any] = {"backend": "torch", "device": device} if device != "cpu" else {}
    image = small(first)
    for one, told in ((first, {}), (second, {"image": image[:1]})):
        pipe = fewstep.load(one.bundle, **options)
        calls: list[dict[str, Any]] = [
            {"steps": 5, "seed": 1, "guidance": 6.0},
            {"steps": 3, "seed": 2, "guidance": 1.0, "sampler": "ddim", "thresholding": False},
            {"steps": 4, "seed": 3, "guidance": 3.0, "sampler": "dpmpp_2m"},
        ]
        prepared = [pipe.prepare(pipe.request(PROMPTS[0], **told, **call)) for call in calls]
        alone = [pipe(PROMPTS[0], **told, **call).latents[0] for call in calls]
        numpy = [one.ours(PROMPTS[0], **told, **call).latents[0] for call in calls]
        slots = pipe.make_slots(prepared[0].shape, 3)
        held = [slots.admit(p.samplings[0], p.gaussians[0]) for p in prepared]
        previews = {s: np.zeros(slots.shape, np.float32) for s in held}
        while active := [s for s in held if not slots.sampling(s).done]:
            slots.tick(active, previews)
            assert np.abs(previews[held[0]]).max() <= 1.0
        for slot, lone, reference in zip(held, alone, numpy, strict=True):
            made = np.empty(slots.shape, np.float32)
            slots.result(slot, made)
            assert psnr(made, lone) >= 90
            assert psnr(made, reference) >= 80


def test_a_cascade_hands_on_floats_and_embeddings(first: Stage, second: Stage) -> None:
    theirs = first.theirs(PROMPTS, num_inference_steps=4, generator=generators([5, 6]), output_type="pt").images
    theirs = second.theirs(
        PROMPTS, image=theirs, num_inference_steps=3, generator=generators([5, 6]), output_type="pt"
    ).images
    stages = [fewstep.load(first.bundle), fewstep.load(second.bundle, keep_text_encoders=False)]
    cascade, seen = Cascade(stages), list[tuple[int, int]]()
    results = cascade.run(
        PROMPTS, steps=4, seed=[5, 6], later=[{"steps": 3}], on_step=lambda s: seen.append((s.index, s.total))
    )
    assert psnr(results[-1].latents, theirs) >= LEAST
    assert seen == [(i, 7) for i in range(7)]
    assert (stages[0].text.misses, stages[0].text.hits) == (3, 5), "texts are encoded once"
    last = cascade(PROMPTS[0], steps=4, seed=5, images_per_prompt=2, later=[{"steps": 3, "size": (24, 32)}])
    assert last.images.shape == (2, 32, 24, 3)
    assert last.parameters[0]["then"] == [f"{second.bundle.name},steps=3,size=24x32"]


def test_what_is_no_cascade(first: Stage, second: Stage) -> None:
    for stages, words in (
        ([first.ours], "two or more"),
        ([second.ours, second.ours], "begins with DeepFloyd-IF's second stage"),
        ([first.ours, first.ours], "as a later stage"),
    ):
        with pytest.raises(ArgumentError, match=words):
            Cascade(stages)
    cascade = Cascade([fewstep.load(first.bundle), fewstep.load(second.bundle, keep_text_encoders=False)])
    for later, words in (
        ([{"seed": 3}], "seed for a later stage"),
        ([{}, {}], "2 later stages"),
        ([{"noise_level": 1000}], "noise_level is 1000"),
    ):
        with pytest.raises(ArgumentError, match=words):
            cascade(PROMPTS[0], steps=1, later=later)


def test_wrong_input_is_named(first: Stage, second: Stage) -> None:
    picture = np.zeros((8, 8, 3), np.uint8)
    clear = Image.new("RGBA", (8, 8))
    refused: list[tuple[fewstep.Pipeline, dict[str, Any], str]] = [
        (first.ours, {"image": picture}, "image for DeepFloyd-IF, which makes pictures of texts alone"),
        (first.ours, {"noise_level": 3}, "noise_level for DeepFloyd-IF"),
        (first.ours, {"strength": 0.5}, "strength for DeepFloyd-IF"),
        (first.ours, {"long_prompts": "chunk"}, "long_prompts='chunk'"),
        (first.ours, {"clip_skip": 1}, "clip_skip"),
        (second.ours, {}, "no image for DeepFloyd-IF's second stage.*--then STAGE2"),
        (second.ours, {"image": []}, "empty list"),
        (second.ours, {"image": picture, "strength": 0.5}, "strength for"),
        (second.ours, {"image": picture, "mask": picture}, "mask for"),
        (second.ours, {"image": clear}, "transparency"),
        (second.ours, {"image": [picture, picture[:4]]}, "several sizes"),
        (second.ours, {"image": [picture] * 3, "seed": [1, 2]}, "3 pictures for 2 images|2 seeds for 3 images"),
        (second.ours, {"image": np.full((3, 8, 8), np.nan, np.float32)}, "NaN"),
        (second.ours, {"image": np.zeros((4, 8, 8), np.float32)}, "shape"),
        *((second.ours, {"image": picture, "noise_level": n}, "noise_level is") for n in (-1, 1000, 2.5, "a")),
    ]
    for pipe, given, words in refused:
        with pytest.raises((ArgumentError, UnsupportedError), match=words):
            pipe.request(PROMPTS[0], steps=2, **given)
    for name in ("euler", "heun", "plms"):
        with pytest.raises(UnsupportedError, match=f"{name}.*thresholding.*one of ddim"):
            first.ours.request(PROMPTS[0], steps=4, sampler=name)
        assert first.ours.request(PROMPTS[0], steps=4, sampler=name, thresholding=False).program.clip is None
    with pytest.raises(ArgumentError, match=r"shape \[1, 50, 32\]"):
        first.ours.request(prompt_embeds=np.zeros((1, 50, 32), np.float32))


def test_a_text_is_cut_at_one_pass(first: Stage, caplog: pytest.LogCaptureFixture) -> None:
    long = "a red circle of glass, " * 40
    with caplog.at_level(logging.WARNING):
        result = first.ours(long, steps=2, seed=1, prompt_syntax="a1111")
    assert result.truncated == (True,)
    embeds, _ = first.theirs.encode_prompt(long, do_classifier_free_guidance=False)
    ours = first.ours.text.encode([long])[0].arrays["encoder_hidden_states"]
    np.testing.assert_allclose(ours, embeds[0].numpy(), rtol=1e-4, atol=1e-5)


def test_embeddings_of_texts_are_diffusers_own(first: Stage) -> None:
    for text in (*PROMPTS, "", "  Łódź, 東京 №7 \t x", "<extra_id_3> a"):
        embeds, _ = first.theirs.encode_prompt(text, do_classifier_free_guidance=False)
        ours = first.ours.text.encode([text])[0].arrays["encoder_hidden_states"]
        np.testing.assert_allclose(ours, embeds[0].numpy(), rtol=1e-4, atol=1e-5, err_msg=text)


@pytest.mark.parametrize(("shape", "size"), [((3, 16, 12), (64, 40)), ((3, 5, 7), (3, 2)), ((3, 1, 4), (9, 1))])
def test_enlarging_is_torchs(shape: tuple[int, ...], size: tuple[int, int]) -> None:
    picture = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(picture)[None], size[::-1], mode="bilinear", align_corners=True
    )
    np.testing.assert_allclose(enlarge(picture, *size), theirs[0].numpy(), atol=2e-6)


def test_a_server_makes_both_stages(first: Stage, second: Stage) -> None:
    image = small(first)[:1]
    for one, call, size in ((first, {}, (16, 16)), (second, {"image": image}, (32, 32))):
        expected = one.ours(PROMPTS[0], steps=3, seed=4, **call).images
        with fewstep.Server(one.ours, sizes=[size], most_slots=2, buckets=[4]) as server:
            served = server.generate(PROMPTS[0], steps=3, seed=4, **call).images
        assert np.abs(served.astype(int) - expected).max() <= 1


def test_every_component_builds_for_tensorrt_rtx(second: Stage, tmp_path: Path) -> None:
    """T5, a UNet of two outputs that is told of a picture, and a decoder without weights; no GPU is needed."""
    pytest.importorskip("tensorrt_rtx")
    made = build_engines(
        second.bundle,
        backend="tensorrt-rtx",
        components=list(second.bundle.components),
        store=Store(tmp_path / "engines"),
        options=BuildOptions(compute_capabilities=("8.9",)),
    )
    assert set(made) == {"text_encoder", "unet", "vae_decoder"}
    assert all(one.entry.length > 10_000 for one in made.values())
