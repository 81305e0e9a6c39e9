"""diffusers' pipelines on the tests' checkpoints, as the other side of a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)

LEAST_PSNR = 75.0


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def pipelines(checkpoint: Path, *, big: bool) -> dict[str, Any]:
    """diffusers' pipelines of a checkpoint by task, on one set of weights."""
    text = (StableDiffusionXLPipeline if big else StableDiffusionPipeline).from_pretrained(
        checkpoint, torch_dtype=torch.float32
    )
    rest = {} if big else {"requires_safety_checker": False}
    made = {
        "text": text,
        "image": (StableDiffusionXLImg2ImgPipeline if big else StableDiffusionImg2ImgPipeline)(
            **text.components, **rest
        ),
        "inpaint": (StableDiffusionXLInpaintPipeline if big else StableDiffusionInpaintPipeline)(
            **text.components, **rest
        ),
    }
    for pipe in made.values():
        pipe.set_progress_bar_config(disable=True)
    return made


def generators(seeds: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(s) for s in seeds]


def pixels(out: Any) -> np.ndarray:
    return (np.asarray(out.images) * 255).round().astype(np.uint8)


def euler(pipe: Any) -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler.from_config(dict(pipe.scheduler.config))
