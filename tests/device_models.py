"""Tiny random models for the device's tests, made in memory: a UNet and a VAE decoder on the torch engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from fewstep.engines import RunOptions
from fewstep.export.torch_engine import TorchEngine
from fewstep.export.trace.modules import build_model, wrap
from fewstep.runtime.device.numpy_slots import Tenant
from fewstep.runtime.noise.seeds import TorchCpuGenerator
from fewstep.runtime.prompts.encoders import Embedding
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


def engine(kind: str, config: dict[str, Any], seed: int = 0, **options: Any) -> TorchEngine:
    torch.manual_seed(seed)
    return TorchEngine(wrap(kind, build_model(kind, config), config, "float32"), RunOptions(**options))


def unet(**options: Any) -> TorchEngine:
    return engine("unet", UNET, **options)


def decoder(**options: Any) -> TorchEngine:
    return engine("vae_decoder", VAE, 1, **options)


def program(sampler: str = "euler", steps: int = 4, **options: Any) -> Program:
    return compile_program(sampler, steps=steps, noise=NOISE, **options)


def embedding(seed: int, tokens: int = TOKENS) -> Embedding:
    rng = np.random.default_rng([7, seed])
    hidden = rng.standard_normal((tokens, WIDTH)).astype(np.float32)
    return Embedding(hidden=hidden, pooled=rng.standard_normal(POOLED).astype(np.float32))


@dataclass(frozen=True)
class Image:
    """What one image is asked to be; `tenant` makes it anew for every set of slots."""

    program: Program
    seed: int
    guidance: float = 1.0
    tokens: int = TOKENS
    extra: bool = False

    def tenant(self) -> tuple[Tenant, np.ndarray, np.ndarray]:
        noise = TorchCpuGenerator(self.seed)
        gaussian = noise.randn(SHAPE)
        made = Tenant(
            program=self.program,
            noise=noise,
            positive=embedding(self.seed, self.tokens),
            negative=embedding(1000 + self.seed, self.tokens) if self.guidance > 1 else None,
            guidance=self.guidance,
            time_ids=np.array([64, 64, 0, self.seed, 64, 64], np.float32) if self.extra else None,
            guidance_vector=np.linspace(-1, 1, 12, dtype=np.float32) * self.seed if self.extra else None,
        )
        latent = np.random.default_rng([9, self.seed]).standard_normal(SHAPE).astype(np.float32)
        return made, gaussian, latent


def psnr(found: np.ndarray, true: np.ndarray) -> float:
    error = float(np.mean((found.astype(np.float64) - true) ** 2))
    return 200.0 if error == 0 else float(10 * np.log10(np.abs(true).max() ** 2 / error))
