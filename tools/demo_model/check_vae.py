"""How well the checker reads rendered scenes, and how many of them survive the autoencoder.

python tools/demo_model/check_vae.py build/demo/vae
"""

from __future__ import annotations

import json
import random
import sys

import torch
from checker import look
from diffusers import AutoencoderKL
from scenes import random_scene, render, triples

COUNT = 600


def share_right(images: torch.Tensor, scenes: list) -> dict[str, float]:
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    seen = [look(p) for p in pixels]
    pairs = list(zip(seen, scenes, strict=True))
    right = {
        k: sum(getattr(a, k) == getattr(b, k) for a, b in pairs) / len(pairs) for k in ("background", "colour", "shape")
    }
    right["all"] = sum(
        all(getattr(a, k) == getattr(b, k) for k in ("background", "colour", "shape")) for a, b in pairs
    ) / len(pairs)
    return right


def main() -> int:
    torch.set_num_threads(1)
    scenes = [random_scene(random.Random(5000 + i), triples(held_out=None)) for i in range(COUNT)]
    images = render(scenes)
    vae = AutoencoderKL.from_pretrained(sys.argv[1], torch_dtype=torch.float32).eval()
    with torch.no_grad():
        back = torch.cat([vae.decode(vae.encode(x).latent_dist.mean).sample for x in images.split(50)])
    psnr = float(10 * torch.log10(4 / (back - images).pow(2).mean()))
    print(
        json.dumps(
            {
                "scenes": COUNT,
                "rendered": share_right(images, scenes),
                "after_vae": share_right(back, scenes),
                "psnr_db": psnr,
            },
            indent=1,
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
