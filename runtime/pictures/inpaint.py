"""Inpainting: after every evaluation, what the mask keeps is put back from the picture at the noise level reached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import ArgumentError, UnsupportedError
from ...schedules import Program
from ..arrays import Float32
from .reading import open_as_is


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Blend:
    """What a slot keeps of its picture. mask float32 [1, h, w]: 1 where the picture is made anew, 0 where it stays.

    kept_latent, kept_noise: float32 [C, h, w], the picture's latent and the slot's starting noise times 1 - mask.
    factors: float32 [n, 2], of these two in the state after each evaluation of the program.
    """

    mask: Float32
    kept_latent: Float32
    kept_noise: Float32
    factors: Float32

    def apply(self, state: Float32, position: int, scratch: Float32) -> None:
        """Blend the state after the program's evaluation at `position`, float32 [C, h, w], in place."""
        latent_factor, noise_factor = self.factors[position]
        np.multiply(state, self.mask, out=state)  # m x
        np.multiply(self.kept_latent, latent_factor, out=scratch)
        np.add(state, scratch, out=state)  # + f_z (1 - m) z
        if noise_factor:
            np.multiply(self.kept_noise, noise_factor, out=scratch)
            np.add(state, scratch, out=state)  # + f_n (1 - m) n


def make_blend(program: Program, mask: Float32, latent: Float32, noise: Float32) -> Blend:
    """From a mask [h, w] and latent and noise [C, h, w]: diffusers' rule for UNets of four channels.

    The state is the network's input, so that what the mask keeps is (z + sigma n) / sqrt(1 + sigma^2) at the noise
    level that an evaluation reaches; after the last one it is the result, and the picture is put back without noise.
    """
    keep = np.float32(1.0) - mask
    sigmas = program.sigmas[1:]
    scale = 1.0 / np.sqrt(1.0 + sigmas**2)
    factors = np.stack([scale, sigmas * scale], axis=1)
    factors[-1] = 1.0 / program.state_scale[-1], 0.0
    return Blend(
        mask=mask[None], kept_latent=keep * latent, kept_noise=keep * noise, factors=factors.astype(np.float32)
    )


def check_mask_for(program: Program, masks: Float32) -> None:
    """Refuse soft masks where a sampler steps from a state before the blend; there they are not exact."""
    if program.anchored and not np.isin(masks, (0.0, 1.0)).all():
        raise UnsupportedError(
            f"a soft mask with {program.sampler}, which steps from states before the blend",
            expected="a mask of black and white",
            remedy="Leave mask_threshold at 0.5, or use another sampler, such as euler or dpmpp_2m.",
        )


def to_latent_mask(picture: Any, factor: int, threshold: float | None) -> Float32:
    """A mask in grey, of the size of the picture, as float32 [h, w] of the latent.

    With a threshold the mask is black or white first, and each cell of the latent takes its top left pixel's, as in
    diffusers. Without one it stays grey, and each cell takes its pixels' mean.
    """
    grey = np.asarray(picture.convert("L"), np.float32) / np.float32(255.0)
    height, width = grey.shape[0] // factor, grey.shape[1] // factor
    if threshold is None:
        cells = grey.reshape(height, factor, width, factor)
        return np.ascontiguousarray(cells.mean(axis=(1, 3), dtype=np.float64), np.float32)
    return np.where(grey >= np.float32(threshold), np.float32(1.0), np.float32(0.0))[::factor, ::factor].copy()


def open_mask(given: Any) -> Any:
    """A mask as a Pillow image: from a file or a Pillow image, or an array [H, W] of uint8, bool, or floats 0 to 1."""
    from PIL import Image as pillow

    if not isinstance(given, np.ndarray):
        return open_as_is(given)
    values = given[..., 0] if given.ndim == 3 and given.shape[-1] == 1 else given
    if values.ndim != 2 or 0 in values.shape:
        raise ArgumentError(f"the mask is an array {given.dtype} {list(given.shape)}", expected="[H, W]")
    if values.dtype == np.bool_:
        return pillow.fromarray(values.astype(np.uint8) * np.uint8(255))
    if values.dtype == np.uint8:
        return pillow.fromarray(values)
    if values.dtype.kind != "f" or not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
        raise ArgumentError(
            f"the mask is an array of {values.dtype}", expected="uint8, bool, or floats from 0 to 1: 1 to be made anew"
        )
    return pillow.fromarray(np.round(values * 255.0).astype(np.uint8))
