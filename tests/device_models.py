"""Tiny random models for the device's tests, made in memory: a UNet and a VAE decoder on the torch engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from fewstep.engines import RunOptions
from fewstep.export.torch_engine import TorchEngine
from fewstep.export.trace.modules import build_model, wrap
from fewstep.families import find_family
from fewstep.runtime.conditioning import Conditioning
from fewstep.runtime.device.base import Sampling
from fewstep.runtime.noise.seeds import TorchCpuGenerator
from fewstep.runtime.pictures.inpaint import make_blend
from fewstep.schedules import NoiseSchedule, Program, compile_program

SHAPE = (4, 8, 8)
TOKENS, WIDTH, POOLED = 5, 16, 24
NOISE = NoiseSchedule.scaled_linear()
UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "block_out_channels": (8, 16),
    "attention_head_dim": 2,
    "cross_attention_dim": WIDTH,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
SDXL = {
    **UNET,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + POOLED,
    "time_cond_proj_dim": 12,
}
VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}


def engine(kind: str, config: dict[str, Any], seed: int = 0, family: str = "sdxl", **options: Any) -> TorchEngine:
    torch.manual_seed(seed)
    traceable = wrap(kind, build_model(kind, config), config, "float32", find_family(family))
    return TorchEngine(traceable, RunOptions(**options))


def unet(**options: Any) -> TorchEngine:
    return engine("unet", UNET, **options)


def unet_of_variance(**options: Any) -> TorchEngine:
    """A UNet that says its variance too; its texts have 77 tokens."""
    return engine("unet", {**UNET, "out_channels": 8}, family="if", **options)


def decoder(**options: Any) -> TorchEngine:
    return engine("vae_decoder", VAE, 1, **options)


def program(sampler: str = "euler", steps: int = 4, **options: Any) -> Program:
    return compile_program(sampler, steps=steps, noise=NOISE, **options)


def told(seed: int, tokens: int, *, extra: bool, number: int) -> dict[str, np.ndarray]:
    """A row's arrays for `UNET`, or with `extra` for `SDXL`."""
    rng = np.random.default_rng([7, seed])
    hidden = rng.standard_normal((tokens, WIDTH)).astype(np.float32)
    if not extra:
        return {"encoder_hidden_states": hidden}
    return {
        "encoder_hidden_states": hidden,
        "text_embeds": rng.standard_normal(POOLED).astype(np.float32),
        "time_ids": np.array([64, 64, 0, number, 64, 64], np.float32),
        "timestep_cond": np.linspace(-1, 1, 12, dtype=np.float32) * number,
    }


@dataclass(frozen=True)
class Image:
    """What one image is asked to be; `sampling` makes it anew for every set of slots."""

    program: Program
    seed: int
    guidance: float = 1.0
    tokens: int = TOKENS
    extra: bool = False
    number: int | None = None
    masked: str = ""

    def sampling(self) -> tuple[Sampling, np.ndarray, np.ndarray]:
        noise = TorchCpuGenerator(self.seed)
        gaussian = noise.randn(SHAPE)
        latent = np.random.default_rng([9, self.seed]).standard_normal(SHAPE).astype(np.float32)
        shared: dict[str, Any] = {"extra": self.extra, "number": self.seed if self.number is None else self.number}
        made = Sampling(
            program=self.program,
            noise=noise,
            conditioning=Conditioning(
                positive=told(self.seed, self.tokens, **shared),
                negative=told(1000 + self.seed, self.tokens, **shared) if self.guidance > 1 else None,
                tokens=self.tokens,
            ),
            guidance=self.guidance,
            blend=make_blend(self.program, mask(self.masked), latent, gaussian) if self.masked else None,
        )
        return made, gaussian, latent


def mask(kind: str) -> np.ndarray:
    """float32 [h, w]: `"binary"`, the right half made anew; `"soft"`, from left to right more and more of it."""
    ramp = np.tile(np.linspace(0, 1, SHAPE[2], dtype=np.float32), (SHAPE[1], 1))
    return ramp if kind == "soft" else (ramp > 0.5).astype(np.float32)


def psnr(found: np.ndarray, true: np.ndarray) -> float:
    error = float(np.mean((found.astype(np.float64) - true) ** 2))
    return 200.0 if error == 0 else float(10 * np.log10(np.abs(true).max() ** 2 / error))
