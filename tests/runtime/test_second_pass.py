"""A second pass is what two calls do by hand, and seeds are turned as A1111's formula says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import fewstep
import numpy as np
import pytest
import torch
from fewstep.errors import ArgumentError, UnknownNameError
from fewstep.export.embedded import embedded_bundle
from fewstep.runtime.noise.seeds import TorchCpuGenerator
from fewstep.runtime.noise.turned import turned
from fewstep.runtime.pictures.upscale import enlarge_latents
from fewstep.runtime.second_pass import SecondPass, in_two_passes
from PIL import Image

PROMPT = "a red circle on a blue background"


@pytest.fixture(scope="module")
def pipe() -> fewstep.Pipeline:
    return fewstep.load(embedded_bundle("student")[0])


@pytest.mark.parametrize("upscaler", ["lanczos", "nearest"])
@pytest.mark.parametrize("given", [{"seed": 3}, {"seed": [3, 9], "sampler": "euler_ancestral"}], ids=["one", "two"])
def test_a_picture_made_larger_is_two_calls(pipe: fewstep.Pipeline, upscaler: str, given: Any) -> None:
    size, how = (96, 96), Image.Resampling.LANCZOS if upscaler == "lanczos" else Image.Resampling.NEAREST
    made = in_two_passes(pipe, PROMPT, second=SecondPass(scale=1.5, strength=0.6, upscaler=upscaler), **given)
    first = pipe(PROMPT, **given)
    larger = [picture.resize(size, how) for picture in first.to_pil()]
    by_hand = pipe(PROMPT, image=larger, strength=0.6, **given)
    np.testing.assert_array_equal(made.images, by_hand.images)
    assert made.images.shape[1:3] == (96, 96)
    assert made.parameters[0]["hires"] == {"scale": 1.5, "strength": 0.6, "upscaler": upscaler}
    assert (made.parameters[0]["width"], made.parameters[0]["seed"]) == (64, 3)


@pytest.mark.parametrize(("upscaler", "mode"), [("latent", "bilinear"), ("latent-nearest", "nearest")])
@pytest.mark.parametrize("size", [(16, 16), (13, 10), (8, 8)])
def test_latents_are_enlarged_as_torch_does(upscaler: str, mode: str, size: tuple[int, int]) -> None:
    latents = TorchCpuGenerator(1).randn((2, 4, 8, 8))
    expected = torch.nn.functional.interpolate(torch.from_numpy(latents), size[::-1], mode=mode).numpy()
    np.testing.assert_allclose(enlarge_latents(latents, size, upscaler), expected, atol=5e-6)


def test_a_latent_made_larger_is_denoised_as_by_hand(pipe: fewstep.Pipeline) -> None:
    """By hand: the program itself, run on the latent that torch enlarged, with the seed's noise at the larger size."""
    call: dict[str, Any] = {"steps": 4, "sampler": "euler", "schedule": "trailing", "seed": 5, "guidance": 0.0}
    second = SecondPass(size=(96, 128), strength=0.5, upscaler="latent")
    made = in_two_passes(pipe, PROMPT, second=second, **call)
    first = pipe(PROMPT, **call)
    cells = tuple(side // pipe.bundle.latent.factor for side in (128, 96))
    larger = torch.nn.functional.interpolate(torch.from_numpy(first.latents), cells, mode="bilinear").numpy()
    blank = np.zeros((128, 96, 3), np.uint8)
    request = pipe.request(PROMPT, image=blank, strength=0.5, **call)
    prepared = pipe.prepare(request)
    noise = TorchCpuGenerator(5).randn(larger.shape)
    prepared = replace(prepared, latents=larger, gaussians=noise)
    stream = pipe.make(prepared)
    while True:
        try:
            next(stream)
        except StopIteration as stop:
            by_hand = stop.value
            break
    error = np.mean((made.images.astype(float) - by_hand.images.astype(float)) ** 2)
    assert error == 0 or 10 * np.log10(255**2 / error) >= 80
    assert made.parameters[0]["hires"]["size"] == "96x128"


def test_a_second_pass_has_steps_of_its_own_and_tells_of_all(pipe: fewstep.Pipeline) -> None:
    told: list[tuple[int, int]] = []
    second = SecondPass(strength=0.5, steps=6)
    in_two_passes(pipe, PROMPT, second=second, seed=1, steps=2, on_step=lambda s: told.append((s.index, s.total)))
    assert told == [(i, 5) for i in range(5)]
    made = in_two_passes(pipe, [PROMPT, "a green ring"], second=SecondPass(), seed=1, images_per_prompt=2)
    assert made.images.shape == (4, 128, 128, 3)
    assert made.seeds == (1, 2, 3, 4)


def test_a_second_pass_is_decoded_in_tiles_when_asked() -> None:
    bundle = embedded_bundle("student")[0]
    tiled, whole = (fewstep.load(bundle, vae_tiling=when) for when in (True, False))
    call: dict[str, Any] = {"seed": 2, "second": SecondPass(scale=3)}
    images = in_two_passes(tiled, PROMPT, **call).images
    first = tiled(PROMPT, seed=2).to_pil()[0].resize((192, 192), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(images, tiled(PROMPT, seed=2, image=first, strength=0.5).images)
    assert not np.array_equal(images, in_two_passes(whole, PROMPT, **call).images)


def test_what_a_second_pass_refuses(pipe: fewstep.Pipeline) -> None:
    with pytest.raises(UnknownNameError, match="upscaler"):
        SecondPass(upscaler="R-ESRGAN 4x+")
    with pytest.raises(ArgumentError, match="scale"):
        SecondPass(scale=0.5)
    with pytest.raises(ArgumentError, match="leaves no step"):
        in_two_passes(pipe, PROMPT, seed=0, second=SecondPass(strength=0.1))


def slerp(share: float, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """The web UI's, of [C, h, w], written out in torch."""
    low_norm = low / torch.norm(low, dim=1, keepdim=True)
    high_norm = high / torch.norm(high, dim=1, keepdim=True)
    omega = torch.acos((low_norm * high_norm).sum(1))
    so = torch.sin(omega)
    return (torch.sin((1.0 - share) * omega) / so).unsqueeze(1) * low + (torch.sin(share * omega) / so).unsqueeze(
        1
    ) * high


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_noise_is_turned_as_the_formula_says(share: float) -> None:
    low, high = (torch.randn((4, 12, 8), generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    ours = turned(TorchCpuGenerator(1).randn((1, 4, 12, 8)), TorchCpuGenerator(2).randn((1, 4, 12, 8)), share)
    np.testing.assert_allclose(ours[0], slerp(share, low, high).numpy(), atol=3e-6)


def test_turned_noise_of_one_line_is_finite() -> None:
    flat = TorchCpuGenerator(1).randn((1, 4, 1, 8))
    assert np.isfinite(turned(flat, -flat, 0.5)).all()
    np.testing.assert_allclose(turned(flat, flat, 0.3), flat, atol=1e-6)


def test_a_variation_is_a_call_with_that_noise(pipe: fewstep.Pipeline) -> None:
    made = pipe(PROMPT, seed=7, variation_seed=11, variation=0.4, images_per_prompt=2)
    assert made.seeds == (7, 7)
    assert [p["variation_seed"] for p in made.parameters] == [11, 12]
    shape = made.latents.shape[1:]
    for image, other in zip(made.images, (11, 12), strict=True):
        pair = (torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in (7, other))
        np.testing.assert_array_equal(image, pipe(PROMPT, seed=7, latents=slerp(0.4, *pair)[None]).images[0])
    np.testing.assert_array_equal(pipe(PROMPT, seed=7, variation=0.0).images[0], pipe(PROMPT, seed=7).images[0])


def test_a_server_turns_noise_as_the_pipeline_does(pipe: fewstep.Pipeline) -> None:
    call: dict[str, Any] = {"seed": 7, "variation_seed": 11, "variation": 0.4}
    with fewstep.Server(pipe) as server:
        served = server.generate(PROMPT, **call)
    direct = pipe(PROMPT, **call)
    assert np.abs(served.images.astype(int) - direct.images).max() <= 1
    assert served.parameters[0]["variation_seed"] == 11


def test_variations_that_cannot_be(pipe: fewstep.Pipeline) -> None:
    for given, words in (
        ({"variation_seed": 3}, "without variation"),
        ({"variation": 1.5}, "variation is 1.5"),
        ({"variation": 0.5, "shared_stream": True}, "beside shared_stream"),
        ({"variation": 0.5, "variation_seed": [1, 2]}, "2 variation seeds for 1"),
    ):
        with pytest.raises(ArgumentError, match=words):
            pipe(PROMPT, seed=1, **given)
