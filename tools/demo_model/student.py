"""The few-step student: it learns where the guided teacher's trajectories end.

The teacher turns noise into image latents (DPM++ 2M, guidance 3). The student, started from the teacher's weights,
regresses that end point from states on the straight line from noise to it, at the four timesteps of Euler under
trailing spacing; a part of the states is made from the student's own first guess, as sampling will meet them.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel
from scenes import TEMPLATES, random_scene, triples
from transformers import CLIPTextModel, CLIPTokenizer
from unet import BATCH, SCHEDULE, alpha_bar, token_ids
from workers import Trainer

TIMESTEPS = (999, 749, 499, 249)
GUIDANCE = 3.0
TEACHER_STEPS = 12


def train_student(options: argparse.Namespace) -> None:
    """Two fifths of `options.minutes` for the teacher's pairs, the rest for the student; writes `student/unet`."""
    folder: Path = options.folder
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval().requires_grad_(False)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
    pairs = make_pairs(folder, tokenizer, encoder, unet, minutes=0.4 * options.minutes, seed=options.seed)
    dist.barrier()
    trainer = Trainer(
        name="student",
        folder=folder,
        parameters=unet.parameters(),
        minutes=0.6 * options.minutes,
        rate=6e-4,
        ema=0.998,
        warmup=100,
    )
    ab = alpha_bar()
    sigmas = ((1 - ab) / ab).sqrt()
    while trainer.running:
        at = torch.randint(0, len(pairs["noise"]), (BATCH,))
        noise, x0 = pairs["noise"][at].float(), pairs["latents"][at].float()
        context = encoder(pairs["ids"][at].long()).last_hidden_state
        t = torch.tensor(TIMESTEPS)[torch.randint(0, len(TIMESTEPS), (BATCH,))]
        goal = x0
        if torch.rand(()) < 0.3:
            with torch.no_grad():
                goal = predict(unet, sigmas[999] * noise, torch.full((BATCH,), 999), context, sigmas)
        sigma = sigmas[t].view(-1, 1, 1, 1)
        found = predict(unet, goal * (1 - sigma / sigmas[999]) + sigma * noise, t, context, sigmas)
        error = found - x0
        each = error.pow(2).mean((1, 2, 3))
        loss = 0.5 * each.mean() + 0.5 * error.abs().mean()
        trainer.update(loss, first=each[t == 999].mean().item(), last=each[t == 249].mean().item())
    trainer.save()
    trainer.use_ema()
    if dist.get_rank() == 0:
        unet.to(torch.float16).save_pretrained(folder / "student" / "unet")


def predict(
    unet: UNet2DConditionModel, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor, sigmas: torch.Tensor
) -> torch.Tensor:
    """x0 from a state in sigma's coordinates, by a v-predicting UNet: x0 = alpha x_vp - s v."""
    sigma = sigmas[t].view(-1, 1, 1, 1)
    alpha = (1 + sigma**2).rsqrt()
    x_vp = alpha * x
    v = unet(x_vp, t, context, return_dict=False)[0]
    return alpha * x_vp - sigma * alpha * v


@torch.no_grad()
def make_pairs(
    folder: Path,
    tokenizer: CLIPTokenizer,
    encoder: CLIPTextModel,
    unet: UNet2DConditionModel,
    *,
    minutes: float,
    seed: int,
) -> dict[str, torch.Tensor]:
    """This worker's (noise, ids, image latent) triples, made for `minutes` and kept on disk."""
    path = folder / f"pairs-{dist.get_rank()}.pt"
    kept: dict[str, list[torch.Tensor]] = {"noise": [], "ids": [], "latents": []}
    if path.exists():
        return torch.load(path, weights_only=True)
    rng = random.Random(seed * 53 + dist.get_rank())
    kinds = triples(held_out=False)
    empty = encoder(token_ids(tokenizer, [""])).last_hidden_state
    ends = time.monotonic() + 60 * minutes
    while time.monotonic() < ends:
        captions = [random_scene(rng, kinds).caption(rng.choice(TEMPLATES)) for _ in range(BATCH)]
        ids = token_ids(tokenizer, captions)
        context = torch.cat([empty.expand(BATCH, -1, -1), encoder(ids).last_hidden_state])
        noise = torch.randn(BATCH, 4, 16, 16)
        scheduler = DPMSolverMultistepScheduler(**SCHEDULE, prediction_type="v_prediction", timestep_spacing="trailing")
        scheduler.set_timesteps(TEACHER_STEPS)
        x = noise
        for t in scheduler.timesteps:
            u, c = unet(torch.cat([x, x]), t, context, return_dict=False)[0].chunk(2)
            x = scheduler.step(u + GUIDANCE * (c - u), t, x).prev_sample
        kept["noise"].append(noise.half())
        kept["ids"].append(ids.to(torch.int16))
        kept["latents"].append(x.half())
        if dist.get_rank() == 0 and len(kept["noise"]) % 20 == 0:
            print(f"pairs: {len(kept['noise']) * BATCH} by one worker", flush=True)
    made = {k: torch.cat(v) for k, v in kept.items()}
    torch.save(made, path)
    return made
