"""What clips add to graphs: the first picture beside every frame, and its embedding."""

from __future__ import annotations

import torch
from torch import nn
from transformers import CLIPVisionModelWithProjection


def joined_sample(sample: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
    """A sample [R, C, h, w] or [R, F, C, h, w] with further channels [R, C', h, w] behind its own, in every frame."""
    if sample.ndim == channels.ndim + 1:
        channels = channels[:, None].expand(-1, sample.shape[1], -1, -1, -1)
    return torch.cat([sample, channels], dim=-3)


class PictureStates(nn.Module):
    """`pixels [P, 3, S, S]`, normalised -> `hidden [P, 1, D]`, the picture's embedding as the UNet attends to it."""

    def __init__(self, model: CLIPVisionModelWithProjection, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model(pixels.to(self.dtype)).image_embeds[:, None].float()
