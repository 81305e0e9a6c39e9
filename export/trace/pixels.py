"""The end of every decoder, and all of the decoder of families that sample pixels: from -1 to 1, to bytes."""

from __future__ import annotations

import torch
from torch import nn

LARGEST_PIXEL = 3.0e38


def to_image(pixels: torch.Tensor) -> torch.Tensor:
    """float32 [B, 3, H, W] in [-1, 1] -> uint8 [B, H, W, 3], clamped."""
    image = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1)
    return image.to(torch.uint8)  # last: TensorRT admits uint8 at a network's edge only


def finite_pixels(pixels: torch.Tensor, largest: float) -> torch.Tensor:
    """Whether no pixel of an image was NaN or beyond the largest number, before it is clamped: bool [B]."""
    return torch.where(pixels.abs() <= largest, 1.0, 0.0).amin((1, 2, 3)) > 0.5


class Pixels(nn.Module):
    """`latent [B, 3, H, W]`, which is the picture -> `image uint8 [B, H, W, 3]` and `finite bool [B]`; no weights."""

    def forward(self, latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return to_image(latent), finite_pixels(latent, LARGEST_PIXEL)
