"""Tiny random networks beside the UNets of the tiny checkpoints, every parameter random: zero convolutions too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import randomise
from diffusers import ControlNetModel, T2IAdapter, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

SIDE = 32


def make_controlnet(checkpoint: Path, folder: Path, seed: int, **changes: Any) -> Path:
    """A ControlNet of the checkpoint's UNet, whose picture has as many pixels a cell as the tiny VAEs."""
    unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet")
    made = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))
    made = ControlNetModel.from_config({k: v for k, v in {**made.config, **changes}.items() if k[0] != "_"})
    randomise(made, seed).save_pretrained(folder)
    return folder


def make_t2i_adapter(folder: Path, seed: int) -> Path:
    """A T2I adapter for the tiny UNets of two levels, whose VAEs have two pixels a cell."""
    made = T2IAdapter(channels=[8, 16], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter")
    randomise(made, seed).save_pretrained(folder)
    return folder


def make_xl_adapter(folder: Path, seed: int) -> Path:
    """One of SDXL's for a tiny UNet of three levels: two cells a step, of two pixels each, and a tensor more."""
    made = T2IAdapter(channels=[8, 16, 16, 16], num_res_blocks=1, downscale_factor=4, adapter_type="full_adapter_xl")
    randomise(made, seed).save_pretrained(folder)
    return folder


def drawing(seed: int, size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    """A picture of smooth waves, another for each seed."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width] / max(size)
    waves = [np.sin((3 + seed) * x + k) * np.cos((2 + k) * y + seed) for k in range(3)]
    return Image.fromarray(((np.stack(waves, -1) + 1) * 127.5).astype(np.uint8))


def make_ip_adapter(checkpoint: Path, folder: Path, seed: int, *, kind: str = "plain") -> Path:
    """A random IP-Adapter's file for the checkpoint's UNet, and its image encoder beside it; published names."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * (0.7 / shape[-1] ** 0.5 if len(shape) > 1 else 0.1)

    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=24,
        patch_size=8,
        projection_dim=20,
    )
    randomise(CLIPVisionModelWithProjection(vision), seed).save_pretrained(folder / "image_encoder")
    unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet")
    width = unet.config.cross_attention_dim
    tensors = {}
    names = [n for n in unet.attn_processors if n.endswith("attn2.processor")]
    for i, name in enumerate(names):
        inner = unet.get_submodule(name.removesuffix(".processor")).inner_dim
        tensors |= {f"ip_adapter.{2 * i + 1}.to_{what}_ip.weight": random(inner, width) * 3 for what in "kv"}
    tensors |= {"plain": _projection, "plus": _resampler, "full": _layers}[kind](width, random)
    save_file(tensors, folder / "ip-adapter.safetensors", metadata={"format": "pt"})
    return folder / "ip-adapter.safetensors"


def _projection(width: int, random: Any) -> dict[str, torch.Tensor]:
    made = {"proj.weight": random(4 * width, 20), "proj.bias": random(4 * width)}
    made |= {"norm.weight": 1 + random(width), "norm.bias": random(width)}
    return {f"image_proj.{k}": v for k, v in made.items()}


def _layers(width: int, random: Any) -> dict[str, torch.Tensor]:
    """Of a full adapter, which takes every state of an encoder 32 wide."""
    made = {"proj.0.weight": random(32, 32), "proj.0.bias": random(32)}
    made |= {"proj.2.weight": random(width, 32), "proj.2.bias": random(width)}
    made |= {"proj.3.weight": 1 + random(width), "proj.3.bias": random(width)}
    return {f"image_proj.{k}": v for k, v in made.items()}


def _resampler(
    width: int, random: Any, *, hidden: int = 24, heads: int = 1, tokens: int = 3
) -> dict[str, torch.Tensor]:
    """Of a plus adapter; heads are 64 wide in all of them."""
    made = {"latents": random(1, tokens, hidden)}
    for name, out, given in (("proj_in", hidden, 32), ("proj_out", width, hidden)):
        made |= {f"{name}.weight": random(out, given), f"{name}.bias": random(out)}
    norms = {"norm_out": width} | {f"layers.{i}.{n}": hidden for i in range(4) for n in ("0.norm1", "0.norm2", "1.0")}
    for name, size in norms.items():
        made |= {f"{name}.weight": 1 + random(size), f"{name}.bias": random(size)}
    for i in range(4):
        made |= {
            f"layers.{i}.0.to_q.weight": random(64 * heads, hidden),
            f"layers.{i}.0.to_kv.weight": random(128 * heads, hidden),
            f"layers.{i}.0.to_out.weight": random(hidden, 64 * heads),
            f"layers.{i}.1.1.weight": random(4 * hidden, hidden),
            f"layers.{i}.1.3.weight": random(hidden, 4 * hidden),
        }
    return {f"image_proj.{k}": v for k, v in made.items()}
