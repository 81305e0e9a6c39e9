"""The autoencoder: factor 4, four latent channels, latents of unit variance.

L1 + 0.5 MSE + KL, a vanishing hint that three latents follow the pooled colours, then the decoder alone on slightly
noised latents; last, the latents' mean and deviation are folded into quant_conv and post_quant_conv.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import AutoencoderKL
from scenes import random_scene, render, triples
from workers import Trainer

BATCH = 24


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        sample_size=64,
        latent_channels=4,
        scaling_factor=1.0,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        norm_num_groups=4,
    )


def _loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x - y).abs().mean() + 0.5 * (x - y).pow(2).mean()


def train_vae(options: argparse.Namespace) -> None:
    """Train for `options.minutes` and write `vae/` under `options.folder`."""
    folder: Path = options.folder
    rng = random.Random(options.seed * 97 + dist.get_rank())
    torch.manual_seed(options.seed)
    vae = new_vae()
    torch.manual_seed(options.seed * 1000 + dist.get_rank())
    kinds = triples(held_out=False)
    whole = Trainer(name="vae", folder=folder, parameters=vae.parameters(), minutes=options.minutes * 0.65, rate=2e-3)
    while whole.running:
        x = render([random_scene(rng, kinds) for _ in range(BATCH)])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).mean()
        hint = F.mse_loss(mean[:, :3], 1.5 * F.avg_pool2d(x, 4))
        fit = _loss(y.float(), x)
        whole.update(
            fit + 3e-4 * kl + 0.3 * max(0.0, 1 - 3 * whole.progress) * hint,
            fit=fit.item(),
            kl=kl.item(),
            hint=hint.item(),
        )
    whole.save()
    whole.use_ema()

    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    decoder = Trainer(
        name="vae-decoder", folder=folder, parameters=vae.parameters(), minutes=options.minutes * 0.35, rate=1e-3
    )
    spread = 0.06
    while decoder.running:
        x = render([random_scene(rng, kinds) for _ in range(BATCH)])
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                z = vae.encode(x).latent_dist.mean.float()
                z = z + spread * torch.rand(len(z), 1, 1, 1) * z.std() * torch.randn_like(z)
            y = vae.decode(z).sample
        fit = _loss(y.float(), x)
        decoder.update(fit, mse=(y.float() - x).pow(2).mean().item())
    decoder.save()
    decoder.use_ema()
    if dist.get_rank() == 0:
        fold_statistics(vae, rng)
        vae.to(torch.float16).save_pretrained(folder / "vae")


@torch.no_grad()
def fold_statistics(vae: AutoencoderKL, rng: random.Random) -> None:
    """Make every latent channel zero-mean and of unit deviation by rescaling the 1x1 convolutions at the bottleneck."""
    x = render([random_scene(rng, triples(held_out=False)) for _ in range(512)])
    z = torch.cat([vae.encode(part).latent_dist.mean for part in x.split(64)])
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    n = len(mean)
    before, after = vae.quant_conv, vae.post_quant_conv
    before.weight[:n] /= std.view(-1, 1, 1, 1)
    before.bias[:n] = (before.bias[:n] - mean) / std
    before.bias[n:] -= 2 * std.log()
    after.bias += (after.weight[:, :, 0, 0] * mean).sum(1)
    after.weight *= std.view(1, -1, 1, 1)
