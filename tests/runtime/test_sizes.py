"""Sizes: whatever diffusers takes gives diffusers' own picture, and what a picture's size becomes is said."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import fewstep
import numpy as np
import pytest
from checkpoints import make_sd1, make_sdxl, randomise
from diffusers import AutoencoderKL, UNet2DConditionModel
from fewstep.bundle import Bundle
from fewstep.errors import ArgumentError, MismatchError
from fewstep.export import export_bundle
from fewstep.runtime import diffusers_adapter
from peers import generators, pipelines, pixels, psnr
from PIL import Image

LEAST_PSNR = 75.0
LEVELS = {"sd1": 4, "sdxl": 3}
"""Of the published UNets, whose VAEs make a cell of 8 pixels. SD 2.x halves as SD 1.x does."""
MAKERS = {"sd1": make_sd1, "sdxl": make_sdxl}


def drawing(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    made = np.stack([x * 255 // width, 255 * ((x // 3 + y // 5) % 2), y * 255 // height], -1)
    return Image.fromarray(made.astype(np.uint8))


def deepen(checkpoint: Path, levels: int) -> Path:
    """The checkpoint with a UNet of so many levels, attention at the last but one, and a VAE of factor 8.

    The VAE is one for all families, so that its graphs are traced once.
    """
    place = checkpoint / "unet"
    config = json.loads((place / "config.json").read_text())
    plain, attending = ["DownBlock2D"] * (levels - 2), ["UpBlock2D"] * (levels - 2)
    config |= {
        "block_out_channels": [8] * (levels - 2) + [16, 16],
        "down_block_types": [*plain, "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", *attending],
    }
    for key in ("attention_head_dim", "transformer_layers_per_block"):
        if isinstance(config[key], list):
            config[key] = [2] * levels
    randomise(UNet2DConditionModel.from_config(config), 21).save_pretrained(place)
    place = checkpoint / "vae"
    config = json.loads((place / "config.json").read_text())
    config |= {
        "block_out_channels": [8] * 4,
        "scaling_factor": 0.18215,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }
    randomise(AutoencoderKL.from_config(config), 22).save_pretrained(place)
    return checkpoint


@pytest.fixture(scope="module", params=["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def deep(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A checkpoint of a family with as many levels as the published one, in both libraries."""
    name = request.param
    checkpoint = deepen(MAKERS[name](tmp_path_factory.mktemp(name) / "deep"), LEVELS[name])
    bundle = export_bundle(checkpoint, checkpoint.parent / "bundle", gate=False)
    return {"bundle": bundle, "ours": fewstep.load(bundle), **pipelines(checkpoint, big=name == "sdxl")}


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl"])
def shallow(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The tests' own checkpoints, whose VAEs make a cell of 2 pixels: any picture is nearly its own size."""
    name = request.param
    checkpoint, bundle = request.getfixturevalue(f"tiny_{name}"), request.getfixturevalue(f"{name}_bundle")
    return {"bundle": bundle, "ours": fewstep.load(bundle), **pipelines(checkpoint, big=name == "sdxl")}


def expected_of(both: dict[str, Any], kind: str, **given: Any) -> np.ndarray:
    return pixels(both[kind](prompt="a ring", generator=generators([5]), output_type="np", **given))


@pytest.mark.parametrize("size", [(136, 136), (520, 512), pytest.param((912, 512), marks=pytest.mark.slow)])
def test_text_to_image_at_multiples_of_8(deep: dict[str, Any], size: tuple[int, int]) -> None:
    width, height = size
    theirs = expected_of(deep, "text", width=width, height=height, num_inference_steps=2, guidance_scale=3.0)
    ours = deep["ours"]("a ring", size=size, steps=2, guidance=3.0, seed=5).images
    assert theirs.std() > 5, "the reference shows nothing"
    assert psnr(ours, theirs) >= LEAST_PSNR


def test_text_to_image_at_any_latent(deep: dict[str, Any]) -> None:
    """Latents of 1 to 40 cells a side, all remainders of the levels' multiple among them, and both forms beside."""
    draw = np.random.default_rng(3)
    sizes = [(1, 1), (1, 9), (16, 16), (16, 17), *((8 * r + 9 - r, 8 + r) for r in range(1, 4))]
    for cells in [*sizes, *draw.integers(1, 40, (12, 2)).tolist()]:
        width, height = (8 * int(side) for side in cells)
        theirs = expected_of(deep, "text", width=width, height=height, num_inference_steps=2, guidance_scale=3.0)
        ours = deep["ours"]("a ring", size=(width, height), steps=2, guidance=3.0, seed=5).images
        assert psnr(ours, theirs) >= LEAST_PSNR, f"{width}x{height}"


def test_an_image_to_image_keeps_the_picture_s_own_size(shallow: dict[str, Any]) -> None:
    """Rounded down to the VAE's factor, as diffusers' image processor does; by the adapter too."""
    draw = np.random.default_rng(4)
    classes = {c.__name__: c for c in diffusers_adapter.PIPELINES}
    adapted = classes[type(shallow["image"]).__name__](shallow["ours"])
    for width, height in [(47, 37), (2, 2), (3, 64), *draw.integers(2, 60, (6, 2)).tolist()]:
        picture = drawing(int(width), int(height))
        call = {"image": picture, "strength": 0.8, "num_inference_steps": 4, "guidance_scale": 3.0}
        theirs = expected_of(shallow, "image", **call)
        ours = shallow["ours"]("a ring", image=picture, strength=0.8, steps=4, guidance=3.0, seed=5)
        assert ours.images.shape == theirs.shape
        assert psnr(ours.images, theirs) >= LEAST_PSNR, f"{width}x{height}"
        again = adapted("a ring", generator=generators([5]), **call).images[0]
        assert psnr(np.asarray(again)[None], theirs) >= LEAST_PSNR, f"{width}x{height} by the adapter"


def test_inpainting_at_odd_latents(deep: dict[str, Any]) -> None:
    picture, mask = drawing(48, 40), drawing(48, 40).convert("L")
    call = {"image": picture, "mask_image": mask, "width": 48, "height": 40, "strength": 1.0}
    theirs = expected_of(deep, "inpaint", **call, num_inference_steps=3, guidance_scale=3.0)
    adapted = getattr(diffusers_adapter, type(deep["inpaint"]).__name__)(deep["ours"])
    found = adapted("a ring", generator=generators([5]), **call, num_inference_steps=3, guidance_scale=3.0).images[0]
    assert psnr(np.asarray(found)[None], theirs) >= LEAST_PSNR
    own = deep["ours"]("a ring", image=picture, mask=mask, steps=3, seed=5)
    assert own.images.shape == (1, 40, 48, 3)


def test_an_odd_size_in_tiles(deep: dict[str, Any]) -> None:
    """A VAE in tiles of its sample size, 32 pixels, over 17 x 13 cells: put together as diffusers puts them."""
    tiled = fewstep.load(deep["bundle"], vae_tiling=True)
    deep["text"].vae.enable_tiling()
    try:
        theirs = expected_of(deep, "text", width=136, height=104, num_inference_steps=1, guidance_scale=1.0)
    finally:
        deep["text"].vae.disable_tiling()
    ours = tiled("a ring", size=(136, 104), steps=1, guidance=1.0, seed=5).images
    assert ours.shape == theirs.shape
    assert psnr(ours, theirs) >= 40.0  # at any size: tiles are cut to 0 to 255 and rounded before they are blended


def of_old(bundle: Bundle) -> Bundle:
    """The bundle as one says it whose UNet was traced for multiples of what its levels make."""
    return dataclasses.replace(bundle, latent=dataclasses.replace(bundle.latent, multiple=2))


def test_old_bundles_keep_to_their_multiples(sd1_bundle: Bundle) -> None:
    pipe = fewstep.load(of_old(sd1_bundle))
    with pytest.raises(ArgumentError, match=r"width is 46; expected a multiple of 4\. Use 44 or 48\. Exported again"):
        pipe.request("x", size=(46, 36))
    request = pipe.request("x", image=drawing(47, 36))
    assert (request.width, request.height, request.own_size) == (44, 36, True)
    assert request.warnings == (
        "the picture is 47x36 and becomes 44x36, in multiples of 4. Exported again, it takes multiples of 2.",
    )
    assert pipe.request("x", image=drawing(45, 36)).warnings == ()


def test_no_picture_is_stretched_in_silence(sd1_bundle: Bundle) -> None:
    """Whatever size a pipeline was loaded for; what a call asks for goes before it."""
    pipe = fewstep.load(sd1_bundle, size=(32, 32))
    for fit in ("stretch", "cover", "contain", "diffusers"):
        request = pipe.request("x", image=drawing(47, 37), fit=fit)
        assert (request.width, request.height, request.own_size, request.warnings) == (46, 36, True, ())
        asked = pipe.request("x", image=drawing(47, 37), fit=fit, size=(32, 32))
        assert (asked.width, asked.height, asked.own_size) == (32, 32, False)
    plain = pipe.request("x")
    assert (plain.width, plain.height, plain.own_size) == (32, 32, False)


def test_engines_of_exact_sizes_say_whose_size_they_refuse(sd1_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = fewstep.load(sd1_bundle)
    bind = type(pipe.engines["vae_decoder"]).bind

    def exact(engine: Any, dims: dict[str, int]) -> Any:
        if "rows" in dims and (dims["height"], dims["width"]) != (16, 16):
            raise MismatchError("the engine has the profiles height=16 width=16")
        return bind(engine, dims)

    monkeypatch.setattr(type(pipe.engines["unet"]), "bind", exact)
    with pytest.raises(MismatchError, match=r"own size of the picture, as none .* is 46x36, .*--size 46x36"):
        pipe("x", image=drawing(47, 37), steps=1, strength=1.0)
    with pytest.raises(MismatchError, match=r"^the engine has the profiles"):
        pipe("x", size=(46, 36), steps=1)
    assert pipe("x", image=drawing(47, 37), steps=1, strength=1.0, size=(32, 32)).images.shape[1:3] == (32, 32)
