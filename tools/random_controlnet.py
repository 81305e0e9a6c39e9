"""Write a ControlNet for a checkpoint: the UNet's own way down, with random weights where training begins at zero.

python tools/random_controlnet.py CHECKPOINT FOLDER

For measurements, as `tools/random_checkpoint.py`.
"""

from __future__ import annotations

import sys

import torch
from diffusers import ControlNetModel, UNet2DConditionModel


def main(checkpoint: str, folder: str) -> None:
    unet = UNet2DConditionModel.from_pretrained(checkpoint, subfolder="unet")
    net = ControlNetModel.from_unet(unet)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(std=0.01, generator=generator)
    net.save_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
