"""Clips against diffusers' own pipeline: float32, the same seed, on both devices, alone and in company."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import fewstep
import numpy as np
import pytest
import torch
from checkpoints import psnr
from clips import by_diffusers, photograph
from diffusers import StableVideoDiffusionPipeline
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import _resize_with_antialiasing
from fewstep.errors import ArgumentError, CancelledError, MissingError, UnsupportedError
from fewstep.runtime.pictures.antialias import antialiased_pixels
from fewstep.runtime.pipeline import Pipeline
from PIL import Image
from transformers import CLIPImageProcessor

LEAST, LEAST_OF_LATENTS = 75.0, 100.0
"""dB: of frames in 8 bits, and of latents against their largest number."""
PICTURE = photograph(50, 40)
SMALL = {"size": (16, 24), "steps": 3, "frames": 4}


def latent_psnr(ours: np.ndarray, theirs: np.ndarray) -> float:
    error = float(np.mean((ours.astype(np.float64) - theirs) ** 2))
    return float(10 * np.log10(np.abs(theirs).max() ** 2 / error)) if error else float("inf")


@pytest.fixture(scope="module")
def theirs(tiny_svd: Any) -> Any:
    return StableVideoDiffusionPipeline.from_pretrained(tiny_svd.checkpoint)


@pytest.fixture(scope="module")
def pipe(tiny_svd: Any) -> Pipeline:
    return fewstep.load(tiny_svd.bundle, backend="ort-cpu", device="cpu")


@pytest.fixture(scope="module")
def recorded(tiny_svd: Any) -> Pipeline:
    return fewstep.load(tiny_svd.bundle, backend="torch", device="cpu:torch", graphs=True)


CALLS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"steps": 3}, {"num_inference_steps": 3}),
    (
        {"steps": 4, "frames": 9, "size": (40, 24), "decode_chunk": 4, "fps": 12, "motion_bucket": 40},
        {"num_inference_steps": 4, "num_frames": 9, "width": 40, "decode_chunk_size": 4, "fps": 12}
        | {"motion_bucket_id": 40},
    ),
    (
        {"steps": 3, "frames": 5, "noise_augmentation": 0.5, "min_guidance": 2.0, "guidance": 1.5, "decode_chunk": 1},
        {"num_inference_steps": 3, "num_frames": 5, "noise_aug_strength": 0.5, "decode_chunk_size": 1}
        | {"min_guidance_scale": 2.0, "max_guidance_scale": 1.5},
    ),
    (
        {"steps": 3, "frames": 3, "guidance": 1.0, "noise_augmentation": 0.0},
        {"num_inference_steps": 3, "num_frames": 3, "max_guidance_scale": 1.0, "noise_aug_strength": 0.0},
    ),
]


@pytest.mark.parametrize(("ours", "named"), CALLS, ids=["plain", "chunks", "falling", "unguided"])
def test_frames_are_those_of_diffusers(pipe: Pipeline, theirs: Any, ours: Any, named: Any) -> None:
    size = {"width": 24, "height": 24} | {k: v for k, v in named.items() if k == "width"}
    named = {**named, **size}
    expected = by_diffusers(theirs, PICTURE, 7, **named)
    latents = by_diffusers(theirs, PICTURE, 7, output_type="latent", **named)
    result = pipe(image=PICTURE, seed=7, **{"size": (24, 24), **ours})
    assert result.frames.shape == expected.shape
    assert result.frames.dtype == np.uint8
    assert latent_psnr(result.latents, latents) >= LEAST_OF_LATENTS
    assert psnr(result.frames, expected) >= LEAST


@pytest.mark.slow
def test_another_architecture_is_too(other_svd: Any) -> None:
    assert other_svd.bundle.latent.frames == 6
    reference = StableVideoDiffusionPipeline.from_pretrained(other_svd.checkpoint)
    expected = by_diffusers(reference, PICTURE, 3, width=16, height=40, num_inference_steps=4, decode_chunk_size=4)
    pipe = fewstep.load(other_svd.bundle, backend="ort-cpu")
    made = pipe(image=PICTURE, seed=3, size=(16, 40), steps=4, decode_chunk=4)
    assert made.frames.shape == (1, 6, 40, 16, 3)
    assert psnr(made.frames, expected) >= LEAST


def test_clips_of_one_stream_and_of_several(pipe: Pipeline, theirs: Any) -> None:
    call = {"width": 24, "height": 16, "num_inference_steps": 3, "num_frames": 4}
    ours = {"size": (24, 16), "steps": 3, "frames": 4}
    together = by_diffusers(theirs, PICTURE, 5, num_videos_per_prompt=2, **call)
    assert psnr(pipe(image=PICTURE, seed=5, images_per_prompt=2, shared_stream=True, **ours).frames, together) >= LEAST
    pictures = [PICTURE, photograph(30, 60, 1)]
    each = by_diffusers(theirs, [p.resize((50, 40)) for p in pictures], [8, 9], **call)
    made = pipe(image=[p.resize((50, 40)) for p in pictures], seed=[8, 9], **ours)
    assert psnr(made.frames, each) >= LEAST
    np.testing.assert_array_equal(made.frames[:1], pipe(image=pictures[0], seed=8, **ours).frames)


def test_noise_that_is_given_is_started_from(pipe: Pipeline, theirs: Any) -> None:
    given = np.random.default_rng(0).standard_normal((1, 4, 4, 12, 8)).astype(np.float32)
    call = {"width": 16, "height": 24, "num_inference_steps": 3, "num_frames": 4, "noise_aug_strength": 0.0}
    expected = by_diffusers(theirs, PICTURE, 5, latents=torch.from_numpy(given), **call)
    assert psnr(pipe(image=PICTURE, latents=given, noise_augmentation=0.0, **SMALL).frames, expected) >= LEAST


@pytest.mark.parametrize("graphs", [False, True])
def test_the_torch_device_makes_the_same(tiny_svd: Any, pipe: Pipeline, graphs: bool) -> None:
    device = fewstep.load(tiny_svd.bundle, backend="torch", device="cpu:torch", graphs=graphs)
    for _ in range(2):  # what was recorded is replayed
        made = device(image=PICTURE, seed=7, **SMALL)
    assert latent_psnr(made.latents, pipe(image=PICTURE, seed=7, **SMALL).latents) >= LEAST_OF_LATENTS
    assert bool(device.graph_counts["replays"]) == graphs


@pytest.mark.parametrize("where", ["pipe", "recorded"])
def test_clips_of_different_lengths_share_ticks(request: pytest.FixtureRequest, where: str) -> None:
    made: Pipeline = request.getfixturevalue(where)
    asked = [
        {"seed": 1, "steps": 3, "sampler": "euler", "schedule": "ays_svd"},
        {"seed": 2, "steps": 5, "guidance": [1.0, 4.0, 0.5, 2.0]},
        {"seed": 3, "steps": 4, "guidance": 1.0, "sampler": "dpmpp_2m", "schedule": "karras"},
    ]
    requests = [made.request(image=PICTURE, size=(16, 24), frames=4, **a) for a in asked]
    alone = [made.run(r).latents[0] for r in requests]
    prepared = [made.prepare(r) for r in requests]
    slots = made.make_slots(prepared[0].shape, 3)
    places = [slots.admit(p.samplings[0], p.gaussians[0]) for p in prepared]
    ticks = 0
    while any(not slots.sampling(s).done for s in places):
        going = [s for s in places if not slots.sampling(s).done]
        assert len(slots.share(going)) == 1
        slots.tick(going)
        ticks += 1
    assert ticks == 5
    for slot, expected in zip(places, alone, strict=True):
        out = np.empty(prepared[0].shape, np.float32)
        slots.result(slot, out)
        assert latent_psnr(out, expected) >= LEAST_OF_LATENTS


def test_previews_and_cancelling(pipe: Pipeline) -> None:
    stream = pipe.stream(pipe.request(image=PICTURE, seed=1, decode_chunk=3, **SMALL), previews=True)
    first = next(stream)
    assert first.preview().shape == (1, 4, 24, 16, 3)
    assert first.latents().shape == (1, 4, 4, 12, 8)
    stream.close()
    stop = threading.Event()

    def after_one(step: Any) -> None:
        stop.set()

    with pytest.raises(CancelledError, match="after 1 of 3"):
        pipe(image=PICTURE, cancel=stop, on_step=after_one, **SMALL)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "ddim"])
def test_the_published_table_by_name(pipe: Pipeline, sampler: str) -> None:
    request = pipe.request(image=PICTURE, size=(16, 24), frames=3, sampler=sampler, schedule="ays_svd", steps=4)
    sigmas = request.program.sigmas
    assert sigmas[0] == pytest.approx(700.0)
    steps = request.program.timesteps if sampler != "heun" else request.program.timesteps[::2]
    assert steps[0] == pytest.approx(np.log(700.0) / 4)
    assert pipe.request(image=PICTURE, schedule="ays", sampler=sampler, steps=4).program.sigmas[0] == sigmas[0]
    made = pipe.run(request)
    assert made.frames.std() > 5


def test_more_steps_of_the_table_come_nearer(pipe: Pipeline) -> None:
    """All four go to one end: the answer of the same differential equation."""
    call: dict[str, Any] = {"image": PICTURE, "seed": 4, "size": (8, 16), "frames": 2, "schedule": "ays_svd"}
    true = pipe(sampler="heun", steps=50, **call).latents
    for sampler in ("euler", "heun", "dpmpp_2m", "ddim"):
        few, many = (latent_psnr(pipe(sampler=sampler, steps=n, **call).latents, true) for n in (5, 30))
        assert many > few + 3, (sampler, few, many)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"image": None}, "no image"),
    ({"prompt": "a cat"}, "prompt for a model that makes clips"),
    ({"negative": "a cat"}, "negative for a model"),
    ({"strength": 0.5}, "strength for a model"),
    ({"mask": PICTURE}, "mask for a model"),
    ({"clip_skip": 1}, "clip_skip for a model"),
    ({"prompt_embeds": np.zeros((1, 1, 24), np.float32)}, "prompt_embeds for a model"),
    ({"loras": {"x": 1.0}}, "loras for a model"),
    ({"control": {"canny": PICTURE}}, "control for a model"),
    ({"original_size": (64, 64)}, "original_size for a model"),
    ({"fps": 0}, "fps is 0"),
    ({"fps": 2000}, "fps is 2000"),
    ({"fps": 7.5}, "fps is 7.5"),
    ({"frames": 15}, "frames is 15"),
    ({"frames": 1}, "frames is 1"),
    ({"motion_bucket": -1}, "motion_bucket is -1"),
    ({"motion_bucket": 1024}, "motion_bucket is 1024"),
    ({"noise_augmentation": float("nan")}, "noise_augmentation is nan"),
    ({"noise_augmentation": 11}, "noise_augmentation is 11"),
    ({"decode_chunk": 0}, "decode_chunk is 0"),
    ({"min_guidance": -1.0}, "min_guidance is -1"),
    ({"guidance": [1.0, 2.0, 3.0, 4.0, 5.0]}, "5 numbers for 14 frames"),
    ({"guidance": [1.0] * 14, "min_guidance": 1.0}, "min_guidance beside guidance by frame"),
    ({"guidance": [*[1.0] * 13, float("inf")]}, "guidance is inf"),
    ({"guidance": "high"}, "guidance is 'high'"),
    ({"seed": [1, 2], "image": [PICTURE] * 3}, "2 seeds for 3 images"),
    ({"image": Image.new("RGB", (1, 1))}, "the picture is 1x1"),
    ({"latents": np.zeros((1, 3, 4, 8, 8), np.float32)}, "latents has shape"),
    ({"size": (17, 24)}, "width is 17"),
    ({"eta": 0.5}, "eta"),
]


@pytest.mark.parametrize(("given", "match"), WRONG, ids=[m for _, m in WRONG])
def test_what_is_wrong_is_said(pipe: Pipeline, given: dict[str, Any], match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        pipe.request(**{"image": PICTURE, "size": (16, 24), "steps": 2, **given})


def test_what_is_of_clips_is_refused_of_pictures(sd1_bundle: Any, tiny_svd: Any) -> None:
    pictures = fewstep.load(sd1_bundle, backend="ort-cpu")
    for name in ("frames", "fps", "motion_bucket", "noise_augmentation", "min_guidance", "decode_chunk"):
        with pytest.raises(ArgumentError, match=f"{name} for a model that makes pictures"):
            pictures.request("x", **{name: 3})
    with pytest.raises(ArgumentError, match="frames of pictures"):
        _ = pictures("x", steps=1, size=(16, 16)).frames
    with pytest.raises(ArgumentError, match="guidance is"):
        pictures.request("x", guidance=[1.0, 2.0])
    for name in ("vae_tiling", "vae_slicing"):
        with pytest.raises(ArgumentError, match=f"{name} is True for a model that makes clips"):
            fewstep.load(tiny_svd.bundle, backend="ort-cpu", **{name: True})
    for source in (tiny_svd.bundle, tiny_svd.bundle.folder):
        with pytest.raises(UnsupportedError, match="makes clips"):
            fewstep.Server(source)
    with pytest.raises(MissingError, match="no component 'text_encoder'"):
        tiny_svd.bundle.component("text_encoder")


def test_a_picture_of_any_kind_is_read_alike(pipe: Pipeline, tmp_path: Any) -> None:
    clear = PICTURE.convert("RGBA")
    clear.putalpha(Image.new("L", PICTURE.size, 9))
    PICTURE.save(tmp_path / "first.png")
    expected = pipe(image=PICTURE, seed=2, **SMALL)
    for given in (clear, tmp_path / "first.png", np.asarray(PICTURE)):
        np.testing.assert_array_equal(pipe(image=given, seed=2, **SMALL).frames, expected.frames)
    stretched = pipe(image=PICTURE, seed=2, fit="cover", **SMALL)
    assert np.abs(stretched.latents - expected.latents).max() > 1e-3


def test_engines_are_warm_before_a_request(pipe: Pipeline) -> None:
    pipe.warm_up(size=(16, 24))


@pytest.mark.parametrize("size", [(50, 40), (300, 224), (1024, 577), (224, 224), (2, 900)])
def test_the_encoders_picture_is_diffusers(size: tuple[int, int]) -> None:
    picture = photograph(*size)
    values = torch.from_numpy(np.asarray(picture, np.float32) / 255).permute(2, 0, 1)[None]
    resized = (_resize_with_antialiasing(values * 2 - 1, (224, 224)) + 1) / 2
    steps = {"do_center_crop": False, "do_resize": False, "do_rescale": False}
    expected = CLIPImageProcessor()(images=resized, return_tensors="pt", **steps).pixel_values[0].numpy()
    np.testing.assert_allclose(antialiased_pixels(picture, 224), expected, atol=2e-5)


def test_a_grid_of_clips_is_a_clip(tiny_svd: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Cells side by side, frame by frame: each is the clip that its own call makes."""
    import json

    from fewstep.cli import main
    from PIL import Image

    PICTURE.save(tmp_path / "first.png")
    asked = ("--image", str(tmp_path / "first.png"), "--size", "24x24", "--frames", "3", "--seed", "7")
    target = tmp_path / "grid"
    columns = ("--sampler", "ddim", "--steps", "4", "--columns", "schedule=ays,karras", "--cell", "24")
    code = main(["grid", "--json", str(tiny_svd.bundle.folder), *asked, *columns, "--output", str(target)])
    shown = json.loads(capsys.readouterr().out)
    assert (code, shown["columns"]) == (0, ["ays", "karras"])
    sheets = [np.asarray(Image.open(f)) for f in sorted(target.iterdir())]
    assert len(sheets) == 3
    pipe = fewstep.load(tiny_svd.bundle, backend="ort-cpu")
    for i, schedule in enumerate(("ays", "karras")):
        call = {"size": (24, 24), "frames": 3, "steps": 4, "sampler": "ddim", "schedule": schedule}
        clip = pipe(image=PICTURE, seed=7, **call).frames[0]
        for sheet, frame in zip(sheets, clip, strict=True):
            gap = 6
            right = sheet.shape[1] - (2 - i) * (24 + gap)
            cell = sheet[-(24 + gap) : -gap, right : right + 24]
            np.testing.assert_array_equal(cell, frame)
    assert main(["grid", str(tiny_svd.bundle.folder), *asked, *columns, "--output", str(tmp_path / "g.png")]) == 2
