"""Presets whose networks are the family's own, run on one bundle, against diffusers with the authors' settings.

That each is known by its published files' names is `test_presets.py`'s; here its program is compared, and its picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import fewstep
import numpy as np
import pytest
import torch
from checkpoints import copy, psnr
from diffusers import (
    AutoPipelineForImage2Image,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverSinglestepScheduler,
    LCMScheduler,
)
from diffusers.utils.torch_utils import randn_tensor
from fewstep.bundle import read_defaults
from fewstep.errors import ArgumentError
from fewstep.export import export_bundle
from fewstep.presets import find_preset, preset_defaults
from fewstep.runtime.request import make_request
from PIL import Image
from safetensors.torch import load_file, save_file

PROMPT = "a red circle, hello! Émile's café"
WIDTH, HEIGHT = 40, 32
LEAST = 75.0


class Told(LCMScheduler):
    """LCM whose network is told other timesteps, as NitroFusion's page has it; its own steps, with nothing inherited.

    `shifted` for 1000, floored; x0 is read there, and the next state is noised to its own level.
    """

    shifted = 0

    def set_timesteps(self, *given: Any, **named: Any) -> None:
        super().set_timesteps(*given, **named)
        self.own = [int(t) for t in self.timesteps]
        self.timesteps = torch.tensor([t * self.shifted // 1000 for t in self.own])

    def step(self, output: Any, timestep: Any, sample: Any, generator: Any = None, **_: Any) -> Any:
        tau, i = int(timestep), self.timesteps.tolist().index(int(timestep))
        signal = float(self.alphas_cumprod[tau])
        x0 = (sample - math.sqrt(1 - signal) * output) / math.sqrt(signal)
        x0 = 10 * tau / math.hypot(10 * tau, 0.5) * x0 + 0.25 / ((10 * tau) ** 2 + 0.25) * sample
        if i + 1 < len(self.own):
            left = float(self.alphas_cumprod[self.own[i + 1]])
            x0 = math.sqrt(left) * x0 + math.sqrt(1 - left) * randn_tensor(x0.shape, generator=generator)
        return (x0,)


def told(shifted: int) -> Callable[[Any], Any]:
    def make(config: Any) -> Any:
        made = Told.from_config(config, original_inference_steps=4)
        made.shifted = shifted
        return made

    return make


def trailing(config: Any) -> Any:
    return DDIMScheduler.from_config(config, timestep_spacing="trailing")


@dataclass(frozen=True)
class Case:
    """A preset's scheduler as its authors' page makes it from the base's, and what a call is told."""

    scheduler: Callable[[Any], Any]
    steps: int
    guidance: float = 0.0
    family: str = "sd1"
    more: tuple[int, ...] = ()
    call: dict[str, Any] = field(default_factory=dict)


CASES = {
    "hyper-sd-cfg-8": Case(trailing, 8, 5.0),
    "hyper-sd-cfg-12": Case(trailing, 12, 5.0, family="sdxl"),
    "pcm-2": Case(trailing, 2),
    "pcm-4": Case(trailing, 4, family="sdxl"),
    "pcm-8": Case(trailing, 8),
    "pcm-16": Case(trailing, 16),
    "pcm-cfg-4": Case(trailing, 4, 7.5),
    "pcm-cfg-8": Case(trailing, 8, 7.5, family="sdxl"),
    "pcm-cfg-16": Case(trailing, 16, 7.5),
    "pcm-lcmlike": Case(lambda config: LCMScheduler(), 4),
    "sdxl-flash": Case(
        lambda c: DPMSolverSinglestepScheduler.from_config(c, timestep_spacing="trailing"),
        7,
        3.0,
        family="sdxl",
        more=(6, 9),
    ),
    "nitrosd-realism": Case(told(250), 1, family="sdxl", more=(2, 3, 4)),
    "nitrosd-vibrant": Case(told(500), 1, family="sdxl", more=(2, 3, 4)),
    "sid-lsg": Case(lambda c: DDPMScheduler.from_config(c, clip_sample=False), 1, call={"timesteps": [625]}),
}
"""By preset. `more`: other numbers of steps that the page allows."""


def quiet(source: Path, target: Path) -> Path:
    """A checkpoint whose network says less.

    Sixteen steps under guidance of the tiny random one amplify float32's rounding until diffusers is at 56 dB of itself
    in float64.
    """
    file = copy(source, target) / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({k: v * (0.1 if k.startswith("conv_out.") else 1) for k, v in load_file(file).items()}, file)
    return target


@pytest.fixture(scope="module")
def both(tiny_sd1: Path, tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    """By family, diffusers' pipeline and the bundle of the same checkpoint."""
    root = tmp_path_factory.mktemp("quiet")
    made = {}
    for name, source in (("sd1", tiny_sd1), ("sdxl", tiny_sdxl)):
        folder = quiet(source, root / name)
        pipe = DiffusionPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        made[name] = (pipe, export_bundle(folder, root / f"{name}-bundle", gate=False))
    return made


def with_preset(bundle: Any, name: str) -> Any:
    preset = find_preset(name, bundle.family)
    return replace(bundle, defaults=read_defaults(preset_defaults(preset, WIDTH, HEIGHT)))


def asked_of(bundle: Any, **given: Any) -> Any:
    return make_request(bundle, PROMPT, seed=7, size=(WIDTH, HEIGHT), **given)


def timesteps(bundle: Any, **given: Any) -> list[float]:
    return asked_of(bundle, **given).program.timesteps.tolist()


def noise() -> torch.Tensor:
    return torch.randn((1, 4, HEIGHT // 2, WIDTH // 2), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("name", CASES)
def test_a_preset_is_what_its_authors_run(name: str, both: dict[str, tuple[Any, Any]]) -> None:
    case = CASES[name]
    pipe, bundle = both[case.family]
    bundle, own = with_preset(bundle, name), pipe.scheduler
    ours = fewstep.load(bundle)
    try:
        pipe.scheduler = case.scheduler(own.config)
        for steps in (None, *case.more):
            call = {"num_inference_steps": steps or case.steps} if "timesteps" not in case.call else dict(case.call)
            if name == "sid-lsg":  # the noise of the level where it begins, and no signal
                call["latents"] = noise() * float(1 - pipe.scheduler.alphas_cumprod[625]) ** 0.5
            call |= {"width": WIDTH, "height": HEIGHT, "guidance_scale": case.guidance, "output_type": "np"}
            shown = pipe(PROMPT, generator=[torch.Generator().manual_seed(7)], **call).images
            assert shown.std() > 0.02, "the reference shows nothing"
            asked = {} if steps is None else {"steps": steps}
            result = ours(PROMPT, seed=[7], size=(WIDTH, HEIGHT), **asked)
            agreement = psnr((shown * 255).round().astype(np.uint8), np.asarray(result.images))
            assert agreement >= LEAST
            request = asked_of(bundle, **asked)
            assert not request.warnings
            assert request.program.timesteps.tolist() == [float(t) for t in pipe.scheduler.timesteps]
            if hasattr(pipe.scheduler, "sigmas"):
                np.testing.assert_allclose(request.program.sigmas, pipe.scheduler.sigmas.numpy(), rtol=1e-5)
    finally:
        pipe.scheduler = own


def test_a_presets_schedule_gives_way_and_its_sampler_does_not(both: dict[str, tuple[Any, Any]]) -> None:
    """NitroFusion's shift is of its sampler and stays; its spacing's steps go with the spacing."""
    ours = with_preset(both["sdxl"][1], "nitrosd-realism")
    assert timesteps(ours, timesteps=[999, 499]) == [249, 124]
    assert timesteps(ours, schedule="trailing", steps=8) == [249, 218, 187, 156, 124, 93, 62, 31]
    assert timesteps(ours, sampler="euler", steps=2) == [999, 499]
    assert timesteps(ours, steps=2, shifted_timestep=500) == [499, 249]
    with pytest.raises(ArgumentError, match="at most its 4 steps"):
        timesteps(ours, steps=5)


def test_from_a_picture_the_states_own_level_counts(both: dict[str, tuple[Any, Any]]) -> None:
    """A picture is noised to the level of the state, whatever the network is told of it."""
    pipe, bundle = both["sdxl"]
    y, x = np.mgrid[:HEIGHT, :WIDTH] * 6
    picture = Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8))
    ours = fewstep.load(with_preset(bundle, "nitrosd-vibrant"))

    class Noised(Told):
        shifted = 500

        def add_noise(self, original: Any, noise: Any, timesteps: Any) -> Any:
            own = [self.own[self.timesteps.tolist().index(int(t))] for t in timesteps]
            return super().add_noise(original, noise, torch.tensor(own))

    own = pipe.scheduler
    try:
        image = AutoPipelineForImage2Image.from_pipe(pipe)
        image.set_progress_bar_config(disable=True)
        image.scheduler = Noised.from_config(own.config, original_inference_steps=4)
        given = {"image": picture, "strength": 0.5, "num_inference_steps": 4, "guidance_scale": 0.0}
        theirs = image(PROMPT, generator=[torch.Generator().manual_seed(7)], **given).images
        made = ours(PROMPT, image=picture, strength=0.5, steps=4, seed=[7]).images
        assert psnr(np.stack([np.asarray(p) for p in theirs]), np.asarray(made)) >= LEAST
    finally:
        pipe.scheduler = own
