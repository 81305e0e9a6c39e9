"""What presets say of distilled checkpoints, and what goes against them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import make_lora, write_lora
from fewstep.bundle import Bundle, read_bundle, read_defaults, write_manifest
from fewstep.errors import (
    ArgumentError,
    UnknownNameError,
)
from fewstep.export import export_bundle
from fewstep.presets import PRESETS, find_preset, preset_defaults, preset_warnings, recognise_preset
from fewstep.runtime.request import make_request
from refusals import refused


@pytest.mark.parametrize(
    ("name", "family", "preset"),
    [
        ("sdxl_lightning_4step_unet.safetensors", "sdxl", "sdxl-lightning-4"),
        ("sdxl_lightning_1step_unet_x0.safetensors", "sdxl", "sdxl-lightning-1"),
        ("sdxl_lightning_8step_lora.safetensors", "sdxl", "sdxl-lightning-8"),
        ("stabilityai/sdxl-turbo", "sdxl", "sdxl-turbo"),
        ("sd_xl_turbo_1.0_fp16.safetensors", "sdxl", "sdxl-turbo"),
        ("stabilityai/sd-turbo", "sd2", "sd-turbo"),
        ("models--latent-consistency--lcm-lora-sdv1-5", "sd1", "lcm-lora"),
        ("SimianLuo/LCM_Dreamshaper_v7", "sd1", "lcm"),
        ("h1t/TCD-SDXL-LoRA", "sdxl", "tcd-lora"),
        ("Hyper-SDXL-4steps-lora.safetensors", "sdxl", "hyper-sd-4"),
        ("Hyper-SDXL-12steps-CFG-lora.safetensors", "sdxl", "hyper-sd-cfg-12"),
        ("Hyper-SD15-8steps-CFG-lora.safetensors", "sd1", "hyper-sd-cfg-8"),
        ("Hyper-SDXL-1step-lora.safetensors", "sdxl", "hyper-sd-unified"),
        ("Hyper-SDXL-1step-Unet.safetensors", "sdxl", "hyper-sdxl-1-unet"),
        ("Hyper-SDXL-1step-Unet-Comfyui.fp16.safetensors", "sdxl", "hyper-sdxl-1-unet"),
        ("pcm_sd15_smallcfg_2step_converted.safetensors", "sd1", "pcm-2"),
        ("pcm_sdxl_smallcfg_16step_converted.safetensors", "sdxl", "pcm-16"),
        ("pcm_sdxl_normalcfg_4step_converted.safetensors", "sdxl", "pcm-cfg-4"),
        ("pcm_sd15_normalcfg_16step_converted.safetensors", "sd1", "pcm-cfg-16"),
        ("pcm_sd15_lcmlike_lora_converted.safetensors", "sd1", "pcm-lcmlike"),
        ("SDXL-Flash.safetensors", "sdxl", "sdxl-flash"),
        ("sd-community/sdxl-flash", "sdxl", "sdxl-flash"),
        ("nitrosd-realism_unet.safetensors", "sdxl", "nitrosd-realism"),
        ("nitrosd-vibrant_comfyui.safetensors", "sdxl", "nitrosd-vibrant"),
        ("models--IDKiro--sdxs-512-dreamshaper", "sd1", "sdxs-512"),
        ("IDKiro/sdxs-512-0.9", "sd2", "sdxs-512"),
        ("batch512_cfg4.54.54.5_t625_8380_v2.safetensors", "sd1", "sid-lsg"),
        ("batch512_sd21_cfg1.51.51.5_t625_9728_v2.safetensors", "sd2", "sid-lsg"),
        ("models--latent-consistency--lcm-lora-ssd-1b", "sdxl", "lcm-lora"),
        ("models--segmind--Segmind-VegaRT", "sdxl", "lcm-lora"),
        ("segmind/SSD-1B", "sdxl", None),
        ("segmind/Segmind-Vega", "sdxl", None),
        ("nota-ai/bk-sdm-small", "sd1", None),
        ("dmd2_sdxl_4step_lora_fp16.safetensors", "sdxl", "dmd2-4"),
        ("dmd2_sdxl_1step_unet_fp16.safetensors", "sdxl", "dmd2-1"),
        ("sdxl_lightning_4step_unet.safetensors", "sd1", None),
        ("stabilityai/stable-diffusion-xl-base-1.0", "sdxl", None),
    ],
)
def test_presets_are_told_by_names(name: str, family: str, preset: str | None) -> None:
    found = recognise_preset([name], family)
    assert (found and found.name) == preset


TIMESTEPS = {
    "sdxl-lightning-1": [999],
    "sdxl-lightning-2": [999, 499],
    "sdxl-lightning-4": [999, 749, 499, 249],
    "sdxl-lightning-8": [999, 874, 749, 624, 499, 374, 249, 124],
    "sdxl-turbo": [999],
    "sd-turbo": [999],
    "lcm-lora": [999, 759, 499, 259],
    "lcm": [999, 759, 499, 259],
    "tcd-lora": [999, 759, 499, 259],
    "hyper-sd-2": [999, 499],
    "hyper-sd-4": [999, 749, 499, 249],
    "hyper-sd-8": [999, 874, 749, 624, 499, 374, 249, 124],
    "hyper-sd-unified": [999, 759, 499, 259],
    "hyper-sdxl-1-unet": [800],
    "dmd2-4": [999, 749, 499, 249],
    "dmd2-1": [399],
    "hyper-sd-cfg-8": [999, 874, 749, 624, 499, 374, 249, 124],
    "hyper-sd-cfg-12": [999, 916, 832, 749, 666, 582, 499, 416, 332, 249, 166, 82],
    "pcm-2": [999, 499],
    "pcm-4": [999, 749, 499, 249],
    "pcm-8": [999, 874, 749, 624, 499, 374, 249, 124],
    "pcm-16": [999, 937, 874, 811, 749, 687, 624, 561, 499, 437, 374, 311, 249, 187, 124, 61],
    "pcm-cfg-4": [999, 749, 499, 249],
    "pcm-cfg-8": [999, 874, 749, 624, 499, 374, 249, 124],
    "pcm-cfg-16": [999, 937, 874, 811, 749, 687, 624, 561, 499, 437, 374, 311, 249, 187, 124, 61],
    "pcm-lcmlike": [999, 759, 499, 259],
    "sdxl-flash": [999, 856, 714, 571, 428, 285, 143],
    "nitrosd-realism": [249],
    "nitrosd-vibrant": [499],
    "sdxs-512": [1],
    "sid-lsg": [625],
}
"""SDXS takes its checkpoint's own scheduler, which is PNDM here."""


def preset_bundle(tiny: Any, name: str) -> Bundle:
    chosen = next(p for p in PRESETS if p.name == name)
    return replace(tiny, defaults=read_defaults(preset_defaults(chosen, 1024, 1024)))


@pytest.fixture(scope="module")
def leading(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle whose own scheduler has leading spacing, as SDXL's base has."""
    return export_bundle(tiny_sd1, tmp_path_factory.mktemp("leading") / "b", gate=False)


def test_every_preset_runs_its_published_timesteps(leading: Bundle) -> None:
    assert leading.scheduler.get("timestep_spacing", "leading") == "leading"
    assert set(TIMESTEPS) == {p.name for p in PRESETS}
    for name, timesteps in TIMESTEPS.items():
        request = make_request(preset_bundle(leading, name), "a red circle", seed=0, size=(32, 32))
        assert [float(t) for t in request.program.timesteps] == timesteps, name
        assert request.guidance == next(p.guidance for p in PRESETS if p.name == name)


def test_a_presets_prediction_replaces_the_schedulers(leading: Bundle) -> None:
    """A network that returns the image itself gives just that image after one step, noise or not."""
    request = make_request(preset_bundle(leading, "sdxl-lightning-1"), "a", seed=0, size=(32, 32))
    image = np.full((1, 4, 2, 2), 0.25)
    made = request.program.run(lambda x, t: image, np.ones_like(image), lambda: np.zeros_like(image))
    np.testing.assert_allclose(made, image, atol=1e-12)


def test_a_bundle_keeps_its_preset(tiny_sd1: Path, tmp_path: Path) -> None:
    file = write_lora(make_lora(tiny_sd1, text=False), tmp_path / "lcm-lora-sdv1-5.safetensors", "kohya")
    bundle = export_bundle(tiny_sd1, tmp_path / "b", loras=[(file, 1.0)], gate=False)
    assert read_bundle(tmp_path / "b").defaults == bundle.defaults
    assert (bundle.defaults.preset, bundle.defaults.sampler, bundle.defaults.steps) == ("lcm-lora", "lcm", 4)
    chosen = replace(bundle, defaults=read_defaults(preset_defaults(find_preset("dmd2-4", "sdxl"), 64, 64)))
    write_manifest(chosen)
    assert read_bundle(tmp_path / "b").defaults == chosen.defaults
    refused(tiny_sd1, tmp_path / "c", UnknownNameError, "lcm-lora", preset="lcm-lara")
    refused(tiny_sd1, tmp_path / "c", ArgumentError, "family sd1", preset="sdxl-turbo")


@pytest.mark.parametrize(
    ("preset", "asked", "words"),
    [
        ("sdxl-turbo", {"guidance": 7.5}, "without guidance"),
        ("sdxl-turbo", {"steps": 20}, "at most 4 steps"),
        ("sdxl-turbo", {"size": (1024, 1024)}, "512x512"),
        ("sdxl-lightning-4", {"steps": 8}, "4 steps, not 8"),
        ("sdxl-lightning-4", {"schedule": "leading"}, "trailing"),
        ("sdxl-lightning-4", {"sampler": "Euler Karras"}, "karras"),
        ("lcm-lora", {"guidance": 7.0}, "at most 2"),
        ("hyper-sd-cfg-8", {"guidance": 0.0}, "at least 5, not 0"),
        ("hyper-sd-cfg-8", {"guidance": 12.0}, "at most 8"),
        ("hyper-sd-cfg-12", {"steps": 4}, "12 steps"),
        ("pcm-4", {"guidance": 7.5}, "without guidance"),
        ("pcm-cfg-4", {"guidance": 9.0}, "at most 7.5"),
        ("sdxl-flash", {"guidance": 1.0}, "at least 2.5"),
        ("sdxl-flash", {"steps": 20}, "at most 9"),
        ("nitrosd-realism", {"guidance": 5.0}, "without guidance"),
        ("nitrosd-vibrant", {"steps": 8}, "at most 4"),
        ("sdxs-512", {"steps": 4}, "1 steps, not 4"),
        ("sdxs-512", {"size": (768, 768)}, "512x512"),
        ("sid-lsg", {"schedule": "leading"}, "sgm_uniform"),
        ("hyper-sd-cfg-8", {"guidance": 6.5, "steps": 8}, None),
        ("sdxl-flash", {"guidance": 3.5, "steps": 9}, None),
        ("sdxl-turbo", {"steps": 4, "guidance": 0.0, "size": (512, 512)}, None),
        ("sdxl-lightning-4", {"steps": 4, "sampler": "euler", "schedule": None}, None),
        ("lcm", {"guidance": 8.0}, None),
    ],
)
def test_what_goes_against_a_preset_is_said(
    leading: Bundle, preset: str, asked: dict[str, Any], words: str | None
) -> None:
    found = preset_warnings(preset_bundle(leading, preset), asked)
    assert len(found) == (words is not None)
    assert words is None or words in found[0]
    assert preset_warnings(leading, asked) == []


def initial(bundle: Bundle, **asked: Any) -> tuple[float, float]:
    """The factors of noise and picture at the start, and the noise level there."""
    program = make_request(bundle, "a", seed=0, size=(32, 32), **asked).program
    return float(program.init_noise), float(program.sigmas[0])


def test_a_preset_starts_where_diffusers_does(leading: Bundle) -> None:
    """Euler under trailing timesteps starts from sigma_max noise, Hyper-SD's DDIM from unit noise."""
    turbo = preset_bundle(leading, "sdxl-lightning-4")
    noise, sigma = initial(turbo)
    assert noise == pytest.approx(sigma / np.hypot(1.0, sigma))
    assert noise < 0.9977
    assert initial(turbo, timesteps=[999, 499]) == (noise, sigma)
    assert initial(preset_bundle(leading, "hyper-sd-4"))[0] == 1.0


def test_naming_the_presets_sampler_changes_nothing(leading: Bundle) -> None:
    turbo = preset_bundle(leading, "sdxl-lightning-4")
    own = make_request(turbo, "a", seed=0, size=(32, 32)).program
    for asked in ({"sampler": "euler", "schedule": "trailing"}, {"sampler": "Euler"}, {"compat": "diffusers"}):
        assert make_request(turbo, "a", seed=0, size=(32, 32), **asked).program.to_json() == own.to_json(), asked


@pytest.mark.parametrize("asked", [{"schedule": "kl_optimal"}, {"last_sigma": "sigma_min"}, {"sampler": "heun"}])
def test_what_diffusers_has_not_runs_in_fewsteps_conventions(leading: Bundle, asked: dict[str, Any]) -> None:
    assert initial(preset_bundle(leading, "sdxl-lightning-4"), steps=4, **asked)[0] == 1.0
