"""Families that sample pixels: what a VAE's decoder is elsewhere is no network there, and clamps and rounds."""

from __future__ import annotations

from typing import Any

PIXELS = "Pixels"
PIXEL_CONFIG: dict[str, Any] = {
    "_class_name": PIXELS,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 3,
    "block_out_channels": [1],
}
"""What stands for a VAE's configuration: a latent is the picture itself, from -1 to 1."""
