"""What the listings of five articles on few-step diffusion do, each as one function of the library it imports from.

Each is given `lib`, which is `diffusers` or `fewstep.runtime.diffusers_adapter`, and what the articles name as
repositories; it gives back the pictures that it makes. `cuda` is the CPU here, and checkpoints are tiny and random.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler as StockSolver
from safetensors.torch import load_file

DEVICE = "cpu"
PUBLISHED = [999, 845, 730, 587, 443, 310, 193, 116, 53, 13, 0]
CHIEF = "portrait of an old chief"


class DPMSolverMultistepScheduler(StockSolver):
    """diffusers' class taught to take timesteps: the levels are those of the table, the last of them the end."""

    def set_timesteps(self, num_inference_steps: Any = None, device: Any = None, timesteps: Any = None) -> None:
        if timesteps is None:
            super().set_timesteps(num_inference_steps, device)
            return
        levels = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()
        self.sigmas = levels[timesteps].cpu()
        self.timesteps = torch.tensor(timesteps[:-1], dtype=torch.int64, device=device)
        self.num_inference_steps = len(timesteps)
        self.model_outputs = [None] * self.config.solver_order
        self.lower_order_nums = 0
        self._step_index = self._begin_index = None


def align_your_steps(lib: Any, base: Any, vae_folder: Path) -> tuple[list[Any], int]:
    """SDXL with another VAE and a subclassed solver, under its default schedule and the published one.

    Also gives the number of evaluations under the published one.
    """
    vae = lib.AutoencoderKL.from_pretrained(vae_folder, torch_dtype=torch.float32)
    pipe = lib.StableDiffusionXLPipeline.from_pretrained(
        base, torch_dtype=torch.float32, use_safetensors=True, vae=vae, add_watermarker=False
    ).to(DEVICE)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    seed, steps = 20, 10
    prompts = {"negative_prompt": "blurred", "num_images_per_prompt": 2}
    torch.manual_seed(seed)
    default = pipe("a goddess, pink and white", **prompts, num_inference_steps=steps).images
    torch.manual_seed(seed)
    seen: list[int] = []

    def count(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        seen.append(int(timestep))
        return kwargs

    published = pipe("a goddess, pink and white", **prompts, timesteps=PUBLISHED, callback_on_step_end=count).images
    return [*default, *published], len(seen)


def first_picture(lib: Any, model: Any) -> list[Any]:
    """A pipeline whose class the checkpoint tells, on the device, with a seeded generator and the default steps."""
    pipeline = lib.DiffusionPipeline.from_pretrained(model, use_safetensors=True)
    pipeline = pipeline.to(DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    return list(pipeline(CHIEF, generator=generator).images)


def batches(lib: Any, model: Any, vae_folder: Path) -> list[Any]:
    """A faster solver, batches with a generator an image, attention slicing, a better VAE, prompts of one seed."""
    pipeline = lib.DiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32, use_safetensors=True).to(DEVICE)
    pipeline.scheduler = lib.DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    generator = torch.Generator(DEVICE).manual_seed(0)
    made = list(pipeline(CHIEF, generator=generator, num_inference_steps=20).images)

    def inputs(count: int = 1) -> dict[str, Any]:
        generators = [torch.Generator(DEVICE).manual_seed(i) for i in range(count)]
        return {"prompt": count * [CHIEF], "generator": generators, "num_inference_steps": 20}

    made += pipeline(**inputs(2)).images
    pipeline.enable_attention_slicing()
    made += pipeline(**inputs(3)).images
    pipeline.vae = lib.AutoencoderKL.from_pretrained(vae_folder, torch_dtype=torch.float32).to(DEVICE)
    made += pipeline(**inputs(2)).images
    prompts = [f"portrait of {who}, blue on red" for who in ("the oldest chief", "an old chief", "a young chief")]
    generators = [torch.Generator(DEVICE).manual_seed(1) for _ in prompts]
    return [*made, *pipeline(prompt=prompts, generator=generators, num_inference_steps=25).images]


SCHEDULERS = {
    "DDIMScheduler": {},
    "LMSDiscreteScheduler": {},
    "EulerDiscreteScheduler": {"num_inference_steps": 30},
    "EulerAncestralDiscreteScheduler": {"num_inference_steps": 30},
    "DPMSolverMultistepScheduler": {"num_inference_steps": 20},
}


def compared_schedulers(lib: Any, pipeline: Any, name: str) -> list[Any]:
    """Another scheduler from the configuration of the one before."""
    pipeline.scheduler = getattr(lib, name).from_config(pipeline.scheduler.config)
    generator = torch.Generator(device=DEVICE).manual_seed(8)
    return list(pipeline("an astronaut on a horse", generator=generator, **SCHEDULERS[name]).images)


def lightning(lib: Any, base: Path, weights: Path, model: Any) -> list[Any]:
    """SDXL with a distilled UNet: its configuration from the base, its weights from one file; a web page's function."""
    unet = lib.UNet2DConditionModel.from_config(base, subfolder="unet").to(DEVICE, torch.float32)
    unet.load_state_dict(load_file(weights, device=DEVICE))
    pipe = lib.StableDiffusionXLPipeline.from_pretrained(model, unet=unet, torch_dtype=torch.float32).to(DEVICE)
    pipe.scheduler = lib.EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")

    def on_click(prompt: str) -> Any:
        return pipe(prompt, num_inference_steps=4, guidance_scale=0).images[0]

    torch.manual_seed(4)
    return [on_click("a girl who smiles"), on_click("a sunset")]


def turbo_text(lib: Any, model: Any) -> list[Any]:
    """One step without guidance, from torch's global generator."""
    pipe = lib.AutoPipelineForText2Image.from_pretrained(model, torch_dtype=torch.float32)
    pipe.to(DEVICE)
    torch.manual_seed(5)
    return list(pipe(prompt="a racoon in a robe", num_inference_steps=1, guidance_scale=0.0).images)


def turbo_image(lib: Any, model: Any, picture: Path, load_image: Any) -> list[Any]:
    """Half of two steps, from a picture whose width is no multiple of eight: 913 x 512 in the article, smaller here."""
    pipe = lib.AutoPipelineForImage2Image.from_pretrained(model, torch_dtype=torch.float32)
    pipe.to(DEVICE)
    start = load_image(str(picture)).resize((73, 40))
    torch.manual_seed(6)
    return list(pipe("a model of a city", image=start, num_inference_steps=2, strength=0.5, guidance_scale=0.0).images)


def as_arrays(pictures: list[Any]) -> list[np.ndarray]:
    return [np.asarray(p) for p in pictures]
