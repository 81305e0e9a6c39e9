"""The UNet and the text encoder, trained together on the autoencoder's latents with v-prediction.

Noise levels are drawn where a 16x16 latent decides what it shows: ln sigma ~ N(0.6, 1.1), with a fifth uniform over
the timesteps. A tenth of the captions is dropped, so that guidance has its other half.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, UNet2DConditionModel
from scenes import TEMPLATES, random_scene, render, triples
from text import LENGTH, new_text_encoder, write_tokenizer
from transformers import CLIPTokenizer
from workers import Trainer

BATCH = 64
SCENES = 32_000
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
}


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=8,
        cross_attention_dim=96,
    )


def alpha_bar() -> torch.Tensor:
    """Cumulative products of the scaled-linear schedule, float32 [1000]."""
    betas = torch.linspace(SCHEDULE["beta_start"] ** 0.5, SCHEDULE["beta_end"] ** 0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).float()


def draw_timesteps(count: int, ab: torch.Tensor) -> torch.Tensor:
    """Timesteps int64 [count]: ln sigma normal for four fifths, uniform for the rest."""
    ln_sigma = 0.5 * ((1 - ab) / ab).log()
    wanted = 0.6 + 1.1 * torch.randn(count)
    t = torch.searchsorted(ln_sigma, wanted).clamp(0, 999)
    return torch.where(torch.rand(count) < 0.2, torch.randint(0, 1000, (count,)), t)


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    return tokenizer(captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids


@torch.no_grad()
def encode_scenes(folder: Path, tokenizer: CLIPTokenizer, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This worker's latents float16 [N, 4, 16, 16] and its captions' ids int16 [N, templates, 77], kept on disk."""
    path = folder / f"latents-{rank}.pt"
    if path.exists():
        kept = torch.load(path, weights_only=True)
        return kept["latents"], kept["ids"]
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32).eval()
    rng = random.Random(seed * 31 + rank)
    kinds = triples(held_out=False)
    scenes = [random_scene(rng, kinds) for _ in range(SCENES)]
    latents = []
    for at in range(0, SCENES, 64):
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(render(scenes[at : at + 64])).latent_dist
        latents.append(posterior.sample().to(torch.float16))
    ids = torch.stack([token_ids(tokenizer, [s.caption(t) for s in scenes]).to(torch.int16) for t in TEMPLATES], 1)
    kept = {"latents": torch.cat(latents), "ids": ids}
    torch.save(kept, path)
    return kept["latents"], kept["ids"]


def train_unet(options: argparse.Namespace) -> None:
    """Train for `options.minutes` and write `unet/`, `text_encoder/`, `tokenizer/` and `scheduler/`."""
    folder: Path = options.folder
    rank = dist.get_rank()
    if rank == 0:
        write_tokenizer(folder / "tokenizer")
    dist.barrier()
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    torch.manual_seed(options.seed)
    unet, encoder = new_unet(), new_text_encoder(tokenizer)
    torch.manual_seed(options.seed * 1000 + rank)
    latents, ids = encode_scenes(folder, tokenizer, rank, options.seed)
    empty = token_ids(tokenizer, [""]).squeeze(0)
    ab = alpha_bar()
    trainer = Trainer(
        name="unet",
        folder=folder,
        parameters=[*unet.parameters(), *encoder.parameters()],
        minutes=options.minutes,
        rate=1.5e-3,
        ema=0.998,
    )
    while trainer.running:
        at = torch.randint(0, len(latents), (BATCH,))
        z = latents[at].float()
        words = ids[at, torch.randint(0, len(TEMPLATES), (BATCH,))].long()
        words[torch.rand(BATCH) < 0.1] = empty
        t = draw_timesteps(BATCH, ab)
        alpha, sigma = ab[t].sqrt().view(-1, 1, 1, 1), (1 - ab[t]).sqrt().view(-1, 1, 1, 1)
        eps = torch.randn_like(z)
        out = unet(alpha * z + sigma * eps, t, encoder(words).last_hidden_state, return_dict=False)[0]
        each = (out - (alpha * eps - sigma * z)).pow(2).mean((1, 2, 3))
        high = t > 700
        trainer.update(each.mean(), high=float(each[high].mean().detach()), low=float(each[~high].mean().detach()))
    trainer.save()
    trainer.use_ema()
    if rank == 0:
        unet.to(torch.float16).save_pretrained(folder / "unet")
        encoder.to(torch.float16).save_pretrained(folder / "text_encoder")
