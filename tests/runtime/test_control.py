"""Control pictures give diffusers' own images: ControlNets of each family, at 75 dB and more in float32."""

from __future__ import annotations

import copy
import shlex
from pathlib import Path
from typing import Any

import cv2
import diffusers
import fewstep
import numpy as np
import pytest
import torch
from adapters import SIDE, drawing, make_ip_adapter, make_xl_adapter
from checkpoints import make_sdxl, psnr
from fewstep.bundle import Bundle, read_bundle
from fewstep.errors import ArgumentError, UnknownNameError, UnsupportedError
from fewstep.export import export_bundle
from fewstep.families.control import controls_of
from fewstep.runtime import diffusers_adapter
from fewstep.runtime.pictures.parameters import command_line, read_parameters
from PIL import Image

PROMPT, NEGATIVE = "a red circle, hello!", "blurry"
LEAST = 75.0
SHOWS = 30.0
"""Pictures with and without control are further apart than this many dB."""


class Sides:
    """A family's bundle with networks beside its UNet, and the same by diffusers' pipelines."""

    def __init__(self, family: str, made: Any) -> None:
        checkpoint, controlnets, self.ip_adapter, self.bundle = made
        self.pipe = fewstep.load(self.bundle)
        stem = "StableDiffusionXL" if family == "sdxl" else "StableDiffusion"
        self.more = {} if family == "sdxl" else {"requires_safety_checker": False}
        self.plain = getattr(diffusers, f"{stem}Pipeline").from_pretrained(checkpoint)
        self.stem = stem
        self.nets = {n: diffusers.ControlNetModel.from_pretrained(p) for n, p in controlnets.items()}

    def reference(self, task: str = "", names: tuple[str, ...] = ("canny",), **given: Any) -> np.ndarray:
        """uint8 [B, H, W, 3] of diffusers' own pipeline; without names, of the one without control."""
        parts = {k: v for k, v in self.plain.components.items() if v is not None}
        parts["unet"] = copy.deepcopy(parts["unet"])  # an IP-Adapter would stay in it
        missing = {} if "XL" in self.stem else {"safety_checker": None, "feature_extractor": None}
        nets = [self.nets[n] for n in names]
        control = {"controlnet": nets if len(nets) > 1 else nets[0]} if nets else {}
        cls = getattr(diffusers, f"{self.stem}{'ControlNet' if nets else ''}{task}Pipeline")
        pipe = cls(**parts, **missing, **control, **self.more)
        pipe.set_progress_bar_config(disable=True)
        if "ip_adapter_image" in given:
            pipe.load_ip_adapter(str(self.ip_adapter.parent), subfolder="", weight_name=self.ip_adapter.name)
            pipe.set_ip_adapter_scale(given.pop("ip_adapter_scale", 1.0))
        seeds = given.pop("seed")
        generator = [torch.Generator().manual_seed(s) for s in seeds]
        out = pipe(PROMPT, num_images_per_prompt=len(seeds), generator=generator, output_type="np", **given).images
        return np.asarray((out * 255).round().astype(np.uint8))


@pytest.fixture(scope="module", params=["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def adapted(request: pytest.FixtureRequest) -> Sides:
    return Sides(request.param, request.getfixturevalue(f"adapted_{request.param}"))


@pytest.fixture(scope="module")
def pipe(adapted_sd1: Any) -> fewstep.Pipeline:
    return fewstep.load(adapted_sd1.bundle)


def call(**given: Any) -> dict[str, Any]:
    return {"steps": 5, "guidance": 4.0, "negative": NEGATIVE, "seed": [3], "size": (SIDE, SIDE), **given}


def theirs(**given: Any) -> dict[str, Any]:
    return {"num_inference_steps": 5, "guidance_scale": 4.0, "negative_prompt": NEGATIVE, "seed": [3], **given}


def test_one_control(adapted: Sides) -> None:
    """With guidance, and pictures of another size than the image, and of its own; and without any it is not there.

    That of depth of the second family pools what it adds, and so adds nothing to the negative prompt's row.
    """
    for name, picture in (("canny", drawing(1)), ("canny", drawing(2, (50, 41))), ("depth", drawing(3))):
        expected = adapted.reference(names=(name,), image=picture, **theirs(), width=SIDE, height=SIDE)
        made = adapted.pipe(PROMPT, control={name: picture}, **call()).images
        assert psnr(made, expected) >= LEAST
        plain = adapted.pipe(PROMPT, **call()).images
        assert psnr(made, plain) < SHOWS, "control changes nothing"
    assert psnr(plain, adapted.reference(names=(), **theirs(), width=SIDE, height=SIDE)) >= LEAST


def photograph() -> Image.Image:
    """A picture with edges strong and weak, no smaller than the image."""
    y, x = np.mgrid[0:72, 0:96].astype(np.float64)
    grey = 128 + 90 * np.sign((x - 48) ** 2 + (y - 36) ** 2 - 600) + 20 * np.sin(x / 7) * np.cos(y / 9)
    return Image.fromarray(np.stack([grey, grey * 0.8, 255 - grey], axis=-1).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("thresholds", [None, (30.0, 60.0)])
def test_edges_of_a_photograph(adapted: Sides, thresholds: tuple[float, float] | None) -> None:
    """As ControlNet's examples take them: OpenCV's of the picture at the image's size."""
    small = photograph().resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    edges = cv2.Canny(np.asarray(small), *(thresholds or (100, 200)))
    assert 20 < np.count_nonzero(edges) < edges.size / 2
    expected = adapted.reference(
        image=Image.fromarray(np.stack([edges] * 3, axis=-1)), **theirs(), width=SIDE, height=SIDE
    )
    canny = ["canny"] if thresholds is None else {"canny": thresholds}
    made = adapted.pipe(PROMPT, control={"canny": photograph()}, canny=canny, **call())
    assert psnr(made.images, expected) >= LEAST


def test_the_picture_tells_of_edges(pipe: fewstep.Pipeline, tmp_path: Path) -> None:
    photograph().save(tmp_path / "house.png")
    result = pipe(PROMPT, control={"canny": tmp_path / "house.png"}, canny={"canny": (30, 60.5)}, **call())
    (path,) = result.save(tmp_path / "out.png")
    words = shlex.split(command_line(read_parameters(path), "again.png"))
    assert "--canny=canny:30:60.5" in words
    assert "--control=canny=house.png" in words


def test_inpainting(adapted: Sides) -> None:
    """The steps that a picture leaves out are left out of the control's share too."""
    start, mask = drawing(7), Image.new("L", (SIDE, SIDE))
    mask.paste(255, (0, 0, SIDE // 2, SIDE))
    shared = {"strength": 0.8, "controlnet_conditioning_scale": 0.7, "control_guidance_end": 0.6}
    expected = adapted.reference(
        "Inpaint", image=start, mask_image=mask, control_image=drawing(1), **shared, **theirs(), width=SIDE, height=SIDE
    )
    made = adapted.pipe(PROMPT, image=start, mask=mask, control={"canny": drawing(1)}, **shared, **call())
    assert psnr(made.images, expected) >= LEAST


def test_without_guidance_and_with_a_scale(adapted: Sides) -> None:
    expected = adapted.reference(
        image=drawing(1), **theirs(guidance_scale=1.0), width=SIDE, height=SIDE, controlnet_conditioning_scale=0.4
    )
    made = adapted.pipe(
        PROMPT, control={"canny": drawing(1)}, controlnet_conditioning_scale=0.4, **call(guidance=1.0)
    ).images
    assert psnr(made, expected) >= LEAST


@pytest.mark.parametrize("guess", [False, True])
def test_several_by_scale_and_share_of_steps(adapted: Sides, guess: bool) -> None:
    """diffusers asks the first of several whether it pools, and takes the answer for all; here each has its own."""
    guess = guess or any(net.config.global_pool_conditions for net in adapted.nets.values())
    shares = {"canny": (0.5, 0.0, 0.7), "depth": (1.2, 0.3, 1.0)}
    scales, starts, ends = zip(*shares.values(), strict=True)
    pictures = [drawing(1), drawing(2)]
    names = tuple(shares)
    expected = adapted.reference(
        names=names,
        image=pictures,
        controlnet_conditioning_scale=list(scales),
        control_guidance_start=list(starts),
        control_guidance_end=list(ends),
        guess_mode=guess,
        **theirs(),
        width=SIDE,
        height=SIDE,
    )
    given = {
        "control": dict(zip(names, pictures, strict=True)),
        "controlnet_conditioning_scale": dict(zip(names, scales, strict=True)),
        "control_guidance_start": dict(zip(names, starts, strict=True)),
        "control_guidance_end": dict(zip(names, ends, strict=True)),
        "guess_mode": guess,
    }
    made = adapted.pipe(PROMPT, **given, **call()).images
    assert psnr(made, expected) >= LEAST
    throughout = adapted.pipe(PROMPT, **{**given, "control_guidance_end": None}, **call()).images
    assert psnr(made, throughout) < LEAST - 20, "the share of steps changes nothing"


def test_from_a_picture(adapted: Sides) -> None:
    """Shares of steps count from where the picture starts, as diffusers counts them."""
    given = {"image": drawing(4), "strength": 0.6, "controlnet_conditioning_scale": 0.8}
    expected = adapted.reference(
        "Img2Img", control_image=drawing(1), control_guidance_end=0.5, **given, **theirs(num_inference_steps=7)
    )
    made = adapted.pipe(
        PROMPT, control={"canny": drawing(1)}, control_guidance_end=0.5, **given, **call(steps=7)
    ).images
    assert psnr(made, expected) >= LEAST


@pytest.mark.parametrize(("size", "scale", "guidance"), [((50, 41), 1.0, 4.0), ((33, 80), 2.0, 1.0)])
def test_a_picture_as_prompt(adapted: Sides, size: tuple[int, int], scale: float, guidance: float) -> None:
    """Plain in the first family and plus in the other, with guidance and without, of pictures to be cut."""
    given = {"ip_adapter_image": drawing(5, size), "ip_adapter_scale": scale}
    expected = adapted.reference(names=(), **given, **theirs(guidance_scale=guidance), width=SIDE, height=SIDE)
    made = adapted.pipe(PROMPT, **given, **call(guidance=guidance)).images
    assert psnr(made, expected) >= LEAST
    assert psnr(made, adapted.pipe(PROMPT, **call(guidance=guidance)).images) < SHOWS, "the picture says nothing"


def test_a_picture_as_prompt_under_control(adapted: Sides) -> None:
    given = {"ip_adapter_image": drawing(5)}
    expected = adapted.reference(image=drawing(1), **given, **theirs(), width=SIDE, height=SIDE)
    made = adapted.pipe(PROMPT, control={"canny": drawing(1)}, **given, **call()).images
    assert psnr(made, expected) >= LEAST


@pytest.mark.parametrize("scale", [0.7, 8.0])
def test_a_t2i_adapter(adapted_sd1: Any, pipe: fewstep.Pipeline, scale: float) -> None:
    folder = adapted_sd1.controlnets["canny"].parent / "sketch"
    theirs_pipe = diffusers.StableDiffusionAdapterPipeline.from_pretrained(
        adapted_sd1.checkpoint, adapter=diffusers.T2IAdapter.from_pretrained(folder)
    )
    theirs_pipe.set_progress_bar_config(disable=True)
    given = {k: v for k, v in theirs(width=SIDE, height=SIDE).items() if k != "seed"}
    generator = torch.Generator().manual_seed(3)
    out = theirs_pipe(
        PROMPT, image=drawing(6), adapter_conditioning_scale=scale, generator=generator, output_type="np", **given
    ).images
    shown = {"control": {"sketch": drawing(6)}, "controlnet_conditioning_scale": scale}
    made = pipe(PROMPT, **shown, **call()).images
    assert psnr(made, (out * 255).round().astype(np.uint8)) >= LEAST
    assert psnr(made, pipe(PROMPT, **call()).images) < SHOWS + 20 / scale, "the adapter changes nothing"


THREE_LEVELS = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 1, 1],
    "attention_head_dim": [2, 4, 4],
}


def test_a_t2i_adapter_of_sdxl(made_once: Any) -> None:
    """Two cells a step, whose last tensor is the middle's: as StableDiffusionXLAdapterPipeline, at several sizes."""

    def make(folder: Path) -> None:
        checkpoint = make_sdxl(folder / "checkpoint", **THREE_LEVELS)
        sketch = make_xl_adapter(folder / "sketch", 43)
        export_bundle(checkpoint, folder / "bundle", controlnets={"sketch": sketch}, gate=False)

    folder = made_once("xl-adapter", make)
    pipe = fewstep.load(folder / "bundle")
    theirs_pipe = diffusers.StableDiffusionXLAdapterPipeline.from_pretrained(
        folder / "checkpoint", adapter=diffusers.T2IAdapter.from_pretrained(folder / "sketch")
    )
    theirs_pipe.set_progress_bar_config(disable=True)
    for (width, height), scale, factor in (((SIDE, SIDE), 1.0, 1.0), ((48, 32), 2.5, 0.6)):
        picture = drawing(6, (width, height))
        given = {k: v for k, v in theirs(width=width, height=height).items() if k != "seed"}
        out = theirs_pipe(
            PROMPT,
            image=picture,
            adapter_conditioning_scale=scale,
            adapter_conditioning_factor=factor,
            generator=torch.Generator().manual_seed(3),
            output_type="np",
            **given,
        ).images
        shown = {"control": {"sketch": picture}, "controlnet_conditioning_scale": scale, "control_guidance_end": factor}
        made = pipe(PROMPT, **shown, **call(size=(width, height))).images
        assert psnr(made, (out * 255).round().astype(np.uint8)) >= LEAST
        assert psnr(made, pipe(PROMPT, **call(size=(width, height))).images) < SHOWS + 10, "the adapter changes nothing"


def test_a_full_ip_adapter(made_once: Any, tiny_sd1: Path) -> None:
    """Every state of the image encoder is a token, as in those of whole faces."""

    def make(folder: Path) -> None:
        file = make_ip_adapter(tiny_sd1, folder / "ip", 37, kind="full")
        export_bundle(tiny_sd1, folder / "bundle", ip_adapter=file, quick_gate=True)

    folder = made_once("full-ip-adapter", make)
    sides = Sides("sd1", (tiny_sd1, {}, folder / "ip" / "ip-adapter.safetensors", read_bundle(folder / "bundle")))
    for scale in (1.0, 0.4):
        given = {"ip_adapter_image": drawing(5), "ip_adapter_scale": scale}
        expected = sides.reference(names=(), **given, **theirs(), width=SIDE, height=SIDE)
        made = sides.pipe(PROMPT, **given, **call()).images
        assert psnr(made, expected) >= LEAST
    assert psnr(made, sides.pipe(PROMPT, **call()).images) < SHOWS, "the picture says nothing"


def test_rows_with_and_without_control_share_a_tick(adapted: Sides) -> None:
    """Four images in one request: one control, none, the other, both for a part of the steps, two with a picture as
    prompt; each as it is alone.
    """
    pictures = {"canny": [drawing(1), None, None, drawing(3)], "depth": [None, None, drawing(2), drawing(2)]}
    ends = {"canny": 0.5, "depth": 1.0}
    seeds = [3, 4, 5, 6]
    prompts = [None, drawing(7), drawing(8), None]
    together = adapted.pipe(
        PROMPT, control=pictures, control_guidance_end=ends, ip_adapter_image=prompts, **call(seed=seeds)
    )
    assert len(together.timings["evaluations"]) == len(adapted.pipe(PROMPT, **call()).timings["evaluations"])
    for i, seed in enumerate(seeds):
        own = {n: p[i] for n, p in pictures.items() if p[i] is not None}
        shown: dict[str, Any] = {"control": own, "control_guidance_end": {n: ends[n] for n in own}} if own else {}
        shown["ip_adapter_image"] = prompts[i]
        alone = adapted.pipe(PROMPT, **shown, **call(seed=[seed])).images
        assert psnr(together.images[i : i + 1], alone) >= LEAST


@pytest.mark.parametrize("mode", ["latency", "shared"])
def test_on_a_torch_device(pipe: fewstep.Pipeline, mode: str) -> None:
    """Factors by step come from tables on the device, in recorded work too, and a replay for others reads theirs."""
    device = fewstep.load(pipe.bundle, backend="torch", device="cpu:torch", mode=mode, graphs=True)
    shown = {"canny": [drawing(1), None]}
    for share in (0.7, 1.0, 0.4, 1.0):
        given = {"control": shown, "control_guidance_end": share, **call(seed=[3, 4], steps=3, guidance=1.0)}
        assert psnr(device(PROMPT, **given).images, pipe(PROMPT, **given).images) >= LEAST
    counts = device.graph_counts
    assert counts["captures"] == 2, "with factors by step, and without"
    assert counts["replays"] >= 4
    assert not counts["failures"] + counts["invalidations"]


def test_in_diffusers_own_signature(adapted: Sides) -> None:
    """One call, both pipelines: pictures, scales and shares as lists in the order of the names."""
    names = ("canny", "depth")
    ours = getattr(diffusers_adapter, f"{adapted.stem}ControlNetPipeline").from_pretrained(adapted.pipe)
    listed = {
        "image": [drawing(1), drawing(2)],
        "controlnet_conditioning_scale": [0.5, 1.2],
        "control_guidance_start": [0.0, 0.3],
        "control_guidance_end": [0.7, 1.0],
        "guess_mode": True,
        "negative_prompt": NEGATIVE,
        "num_inference_steps": 4,
        "guidance_scale": 4.0,
    }
    if len(controls_of(adapted.bundle.component("unet").config)) == len(names):
        expected = adapted.reference(names=names, seed=[3], **listed)
        found = ours(PROMPT, generator=torch.Generator().manual_seed(3), **listed).images
        assert psnr(np.stack([np.asarray(p) for p in found]), expected) >= LEAST
    with pytest.raises(ArgumentError, match="a list of"):
        ours(PROMPT, image=drawing(1))


@pytest.mark.slow
def test_controlnets_given_to_from_pretrained(adapted_sd1: Any, tmp_path: Path) -> None:
    """A script of diffusers' as it is: modules, in their order, beside the checkpoint; kept for the next time."""
    sides = Sides("sd1", adapted_sd1)
    nets = [sides.nets["depth"], str(adapted_sd1.controlnets["canny"])]
    cls = diffusers_adapter.StableDiffusionControlNetPipeline
    ours = cls.from_pretrained(str(adapted_sd1.checkpoint), controlnet=nets, safety_checker=None)
    listed = {"image": [drawing(1), drawing(2)], "controlnet_conditioning_scale": [0.5, 1.2]}
    asked = {"num_inference_steps": 3, "guidance_scale": 4.0}
    expected = sides.reference(names=("depth", "canny"), seed=[3], **listed, **asked)
    found = ours(PROMPT, generator=torch.Generator().manual_seed(3), **listed, **asked).images
    assert psnr(np.stack([np.asarray(p) for p in found]), expected) >= LEAST
    again = cls.from_pretrained(str(adapted_sd1.checkpoint), controlnet=nets)
    assert again.pipeline.bundle.folder == ours.pipeline.bundle.folder
    with pytest.raises(UnsupportedError, match="traced with its UNet"):
        cls.from_pretrained(sides.bundle, controlnet=nets)
    with pytest.raises(UnsupportedError, match="a UNet2DConditionModel as controlnet"):
        cls.from_pretrained(str(adapted_sd1.checkpoint), controlnet=sides.plain.unet)


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"control": {"cany": drawing(1)}}, UnknownNameError, "canny"),
    ({"control": {"canny": [None]}}, ArgumentError, "no picture"),
    ({"control": drawing(1)}, ArgumentError, "pictures by name"),
    ({"control": {"canny": [drawing(1)] * 2}}, ArgumentError, "2 pictures of the control canny for 1 images"),
    ({"guess_mode": True}, ArgumentError, "without control"),
    ({"ip_adapter_scale": 0.5}, ArgumentError, "without ip_adapter_image"),
    ({"ip_adapter_image": [None]}, ArgumentError, "no picture"),
    ({"ip_adapter_image": drawing(1), "ip_adapter_scale": [1.0]}, ArgumentError, "or one"),
    ({"controlnet_conditioning_scale": 0.5}, ArgumentError, "without control"),
    ({"control": {"canny": drawing(1)}, "controlnet_conditioning_scale": {"depth": 1.0}}, ArgumentError, "no picture"),
    ({"control": {"canny": drawing(1)}, "controlnet_conditioning_scale": float("nan")}, ArgumentError, "finite"),
    (
        {"control": {"canny": drawing(1)}, "control_guidance_start": 0.9, "control_guidance_end": 0.1},
        ArgumentError,
        "end",
    ),
    ({"control": {"canny": drawing(1)}, "guess_mode": "no"}, ArgumentError, "True or False"),
    ({"canny": ["canny"]}, ArgumentError, "without control"),
    ({"control": {"canny": drawing(1)}, "canny": ["depth"]}, ArgumentError, "no picture"),
    ({"control": {"canny": drawing(1)}, "canny": "canny"}, ArgumentError, "names of controls"),
    ({"control": {"canny": drawing(1)}, "canny": {"canny": 100}}, ArgumentError, "two thresholds"),
    ({"control": {"canny": drawing(1)}, "canny": {"canny": (200, 100)}}, ArgumentError, "lower one first"),
    ({"control": {"canny": drawing(1)}, "canny": {"canny": (-1, 100)}}, ArgumentError, "low threshold"),
]


@pytest.mark.parametrize(("given", "error", "words"), REFUSED)
def test_what_is_refused(pipe: fewstep.Pipeline, given: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        pipe(PROMPT, **given, **call())


def test_a_bundle_without_controls_says_how_to_get_them(sd1_bundle: Bundle) -> None:
    with pytest.raises(UnsupportedError, match="--controlnet NAME=PATH"):
        fewstep.load(sd1_bundle)(PROMPT, control={"canny": drawing(1)}, steps=1)
    with pytest.raises(UnsupportedError, match="--ip-adapter FILE"):
        fewstep.load(sd1_bundle)(PROMPT, ip_adapter_image=drawing(1), steps=1)
