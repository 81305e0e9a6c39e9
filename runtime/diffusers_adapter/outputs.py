"""What a call in diffusers' signature gives back."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..result import Result


@dataclass(frozen=True, slots=True)
class Output:
    """diffusers' result: `images`, and `nsfw_content_detected`: `None`, since bundles hold no safety checker."""

    images: Any
    nsfw_content_detected: None = None

    def __getitem__(self, key: int | str) -> Any:
        return getattr(self, key) if isinstance(key, str) else (self.images, self.nsfw_content_detected)[key]


def as_tensor(array: np.ndarray[Any, Any]) -> Any:
    """A torch tensor where the caller has torch loaded, else the array."""
    torch = sys.modules.get("torch")
    return array if torch is None else torch.from_numpy(array)


def as_asked(result: Result, output_type: str) -> Any:
    """The images as `output_type` says: `pil`, `latent`, `np` [B, H, W, 3] or `pt` [B, 3, H, W] from 0 to 1."""
    if output_type == "pil":
        return result.to_pil()
    if output_type == "latent":
        return as_tensor(result.latents)
    floats = result.images.astype(np.float32) / np.float32(255.0)
    return floats if output_type == "np" else as_tensor(np.ascontiguousarray(floats.transpose(0, 3, 1, 2)))
