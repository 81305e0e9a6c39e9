"""Put the trained parts together as two checkpoints in diffusers' layout: `export/demo/base` and `export/demo/student`.

    python tools/demo_model/pack.py build/demo export/demo

A UNet that is still in training is taken from its running average, so that a checkpoint can be had at any time.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from text import new_text_encoder, write_tokenizer
from transformers import CLIPTextModel, CLIPTokenizer
from unet import SCHEDULE, new_unet

BASE = {"steps": 20, "guidance": 3.0, "sampler": "dpmpp_2m", "schedule": "trailing", "preset": None}
STUDENT = {"steps": 4, "guidance": 0.0, "sampler": "euler", "schedule": "trailing", "preset": None}


def trained(folder: Path, tokenizer: CLIPTokenizer) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """The finished UNet and text encoder, or the running average of those in training."""
    if (folder / "unet").is_dir():
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
        return unet, CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    unet, encoder = new_unet(), new_text_encoder(tokenizer)
    state = torch.load(folder / "unet.state.pt", weights_only=True)
    with torch.no_grad():
        for p, mean in zip([*unet.parameters(), *encoder.parameters()], state["ema"], strict=True):
            p.copy_(mean)
    return unet, encoder


def save(
    target: Path,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
    encoder: CLIPTextModel,
    vae: AutoencoderKL,
    scheduler: object,
    defaults: dict,
) -> None:
    shutil.rmtree(target, ignore_errors=True)
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(torch.float16).save_pretrained(target)
    write_tokenizer(target / "tokenizer")
    for file in target.rglob("*.safetensors"):
        file.chmod(0o644)
    (target / "fewstep.json").write_text(json.dumps({"defaults": defaults}, indent=1) + "\n")


def main() -> int:
    folder, target = Path(sys.argv[1]), Path(sys.argv[2])
    tokenizer = write_tokenizer(folder / "tokenizer")
    unet, encoder = trained(folder, tokenizer)
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    prediction = {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    save(target / "base", tokenizer, unet, encoder, vae, DPMSolverMultistepScheduler(**SCHEDULE, **prediction), BASE)
    few = folder / "student" / "unet"
    if few.is_dir():
        student = UNet2DConditionModel.from_pretrained(few, torch_dtype=torch.float32)
        _, encoder = trained(folder, tokenizer)
        vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
        save(
            target / "student",
            tokenizer,
            student,
            encoder,
            vae,
            EulerDiscreteScheduler(**SCHEDULE, **prediction),
            STUDENT,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
