"""The autoencoder in tiles and slices against diffusers, and text encoders that are let go of."""

from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import fewstep
import numpy as np
import pytest
from fewstep.errors import ArgumentError, NonFiniteError
from fewstep.runtime.pictures.tiles import Tiling
from peers import generators, pipelines, pixels, psnr
from test_tasks import drawing

LEAST_PSNR = 50.0
"""Decoders give 8 bits, of which seams are blended; diffusers blends floats. Single levels apart."""
WIDTH, HEIGHT = 88, 56
"""Of the tiny autoencoder, whose tile is 32 pixels: four tiles across and three down, the last ones smaller."""


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def both(request: pytest.FixtureRequest) -> dict[str, Any]:
    name = request.param
    checkpoint, bundle = request.getfixturevalue(f"tiny_{name}"), request.getfixturevalue(f"{name}_bundle")
    made = pipelines(checkpoint, big=name == "sdxl")
    made["text"].vae.enable_tiling()
    made["text"].vae.enable_slicing()
    return {"ours": fewstep.load(bundle, vae_tiling=True, vae_slicing=True), "bundle": bundle, **made}


def test_tiles_are_blended_as_in_diffusers(both: dict[str, Any]) -> None:
    out = both["text"](
        ["a circle"] * 2,
        width=WIDTH,
        height=HEIGHT,
        num_inference_steps=2,
        guidance_scale=1.0,
        generator=generators([1, 2]),
        output_type="np",
    )
    call = {"size": (WIDTH, HEIGHT), "steps": 2, "guidance": 1.0, "seed": [1, 2]}
    tiled = both["ours"]("a circle", **call).images
    assert psnr(tiled, pixels(out)) >= LEAST_PSNR
    whole = fewstep.load(both["bundle"], vae_tiling=False)("a circle", **call).images
    assert psnr(whole, tiled) < LEAST_PSNR, "tiles must show in the comparison"


def test_pictures_are_encoded_in_tiles(both: dict[str, Any]) -> None:
    picture = drawing(WIDTH, HEIGHT)
    out = both["image"](
        "a circle",
        image=picture,
        strength=0.5,
        num_inference_steps=4,
        guidance_scale=1.0,
        generator=generators([3]),
        output_type="np",
    )
    call = {"image": picture, "size": (WIDTH, HEIGHT), "strength": 0.5, "steps": 4, "guidance": 1.0, "seed": 3}
    assert psnr(both["ours"]("a circle", **call).images, pixels(out)) >= LEAST_PSNR


def test_a_broken_tile_is_an_error(both: dict[str, Any]) -> None:
    latents = np.zeros((2, 4, HEIGHT // 2, WIDTH // 2), np.float32)
    latents[1, :, -1, -1] = np.nan
    with pytest.raises(NonFiniteError, match="image 1"):
        both["ours"].vae.decode(latents)


def test_when_pictures_are_tiled(both: dict[str, Any]) -> None:
    tiling = Tiling.of({"sample_size": 512}, 8)
    assert (tiling.cells, tiling.pixels) == (64, 512)
    assert not tiling.wanted("auto", 192, 192)
    assert tiling.wanted("auto", 192, 200)
    assert tiling.wanted(True, 64, 72)
    assert not tiling.wanted(True, 64, 64)
    assert not tiling.wanted(False, 999, 999)
    for given in ({"vae_tiling": "always"}, {"vae_slicing": 2}):
        with pytest.raises(ArgumentError, match="'auto', True or False"):
            fewstep.load(both["bundle"], **given)


def test_slices_give_the_images_of_the_batch(both: dict[str, Any]) -> None:
    call = {"steps": 1, "guidance": 1.0, "seed": [1, 2, 3]}
    images = [fewstep.load(both["bundle"], vae_slicing=s)("a circle", **call).images for s in (True, False, "auto")]
    assert np.abs(images[0].astype(int) - images[1]).max() <= 1
    assert np.abs(images[1].astype(int) - images[2]).max() <= 1


def test_text_encoders_are_let_go_of(both: dict[str, Any]) -> None:
    call = {"steps": 1, "seed": 1, "guidance": 1.0}
    kept = fewstep.load(both["bundle"])("a circle", **call)
    pipe = fewstep.load(both["bundle"], keep_text_encoders=False)
    assert not {"text_encoder", "text_encoder_2"} & set(pipe.engines)
    opened: list[weakref.ref[Any]] = []
    real = pipe._opened.open

    def watched(names: Any, **more: Any) -> Any:
        made = real(names, **more)
        opened.extend(weakref.ref(engine._session) for engine in made.values())
        return made

    pipe._opened.open = watched  # type: ignore[method-assign]
    np.testing.assert_array_equal(pipe("a circle", **call).images, kept.images)
    encoders = len(both["bundle"].tokenizers)
    gc.collect()
    assert len(opened) == encoders
    assert not any(ref() for ref in opened), "an engine outlived its prompt"
    pipe("a circle", **call)
    assert len(opened) == encoders, "a known prompt needs no encoder"
    pipe("a square", **call)
    assert len(opened) == 2 * encoders
