"""Pictures as prompts: read as CLIP takes them, encoded to tokens, told to the rows of an image."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...bundle import Bundle
from ...engines import Engine
from ...errors import ArgumentError, NonFiniteError, UnsupportedError
from ...families.image_prompt import (
    CLIP_DEVIATION,
    CLIP_MEAN,
    IMAGE_ENCODER,
    IP_ADAPTER,
    SCALE_INPUT,
    TOKENS_INPUT,
)
from ..arguments import check_real
from ..arrays import Float32
from ..call import Call
from .reading import open_image

if TYPE_CHECKING:
    from PIL.Image import Image

LEAST_SCALE, MOST_SCALE = -100.0, 100.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImagePrompt:
    """What a request's IP-Adapter is given.

    pixels: by image float32 [3, S, S] as the encoder takes them, `None` for an image without. factors: float32 [L], of
    each attention that takes tokens.
    """

    pixels: tuple[Float32 | None, ...]
    factors: Float32


def read_image_prompt(bundle: Bundle, call: Call, images: int) -> ImagePrompt | None:
    """A call's pictures as prompts; `UnsupportedError` for a bundle without an IP-Adapter."""
    given = call.ip_adapter_image
    if given is None:
        if call.ip_adapter_scale is not None:
            raise ArgumentError("ip_adapter_scale without ip_adapter_image", remedy="Pass a picture, or leave it out.")
        return None
    stated = bundle.component("unet").config.get(IP_ADAPTER)
    if not stated or IMAGE_ENCODER not in bundle.components:
        raise UnsupportedError(
            f"a picture as prompt for the bundle {bundle.name!r}, which was exported without an IP-Adapter",
            expected="a bundle with one",
            remedy="Export the checkpoint again with: --ip-adapter FILE",
        )
    listed = list(given) if isinstance(given, (list, tuple)) else [given]
    side = int(bundle.component(IMAGE_ENCODER).inputs[0].shape[-1])
    pixels = [None if p is None else clip_pixels(open_image(p), side) for p in listed]
    if not any(p is not None for p in pixels):
        raise ArgumentError("ip_adapter_image has no picture", expected="one picture, or one an image")
    if images % len(pixels):
        raise ArgumentError(f"{len(pixels)} pictures as prompts for {images} images", expected="one an image, or one")
    each = images // len(pixels)
    factors = _factors(call.ip_adapter_scale, int(stated["layers"]))
    return ImagePrompt(pixels=tuple(p for p in pixels for _ in range(each)), factors=factors)


def recorded_image_prompt(call: Call) -> dict[str, Any]:
    """What a picture's parameters say of a picture as prompt: its file, and one factor."""
    if not isinstance(call.ip_adapter_image, (str, os.PathLike)):
        return {}
    scale = {"ip_adapter_scale": call.ip_adapter_scale} if isinstance(call.ip_adapter_scale, (int, float)) else {}
    return {"ip_adapter_image": Path(call.ip_adapter_image).name, **scale}


def _factors(given: Any, layers: int) -> Float32:
    """One factor for all attentions, or one for each."""
    if not isinstance(given, (list, tuple, np.ndarray)):
        scale = 1.0 if given is None else check_real("ip_adapter_scale", given, LEAST_SCALE, MOST_SCALE)
        return np.full(layers, scale, np.float32)
    if len(given) != layers:
        raise ArgumentError(
            f"ip_adapter_scale has {len(given)} factors", expected=f"{layers}, one an attention, or one"
        )
    return np.array([check_real("ip_adapter_scale", g, LEAST_SCALE, MOST_SCALE) for g in given], np.float32)


def clip_pixels(picture: Image, side: int) -> Float32:
    """float32 [3, S, S]: the shorter side resized to S (bicubic), the middle cut out, normalised as CLIP takes it."""
    from PIL import Image as pillow

    width, height = picture.size
    if width <= height:
        size = side, int(side * height / width)
    else:
        size = int(side * width / height), side
    resized = picture.resize(size, pillow.Resampling.BICUBIC)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    cut = np.asarray(resized, np.float32)[top : top + side, left : left + side]
    pixels = (cut * np.float32(1 / 255) - np.array(CLIP_MEAN, np.float32)) / np.array(CLIP_DEVIATION, np.float32)
    return np.ascontiguousarray(pixels.astype(np.float32).transpose(2, 0, 1))


class ImagePrompts:
    """The image encoder of a bundle, opened when a picture first comes as a prompt. Thread-safe: one at a time."""

    def __init__(self, open_encoder: Callable[[], Engine]) -> None:
        self._open = open_encoder
        self._engine: Engine | None = None
        self._encoding = threading.Lock()

    def encode(self, pixels: Float32) -> tuple[Float32, Float32]:
        """One picture [3, S, S] as tokens float32 [N, D], and the tokens of none."""
        outputs = self.outputs(pixels)
        return outputs["tokens"], outputs["negative"]

    def outputs(self, pixels: Float32) -> dict[str, Float32]:
        """What the encoder makes of one picture [3, S, S], by name."""
        with self._encoding:
            if self._engine is None:
                self._engine = self._open()
            binding = self._engine.bind({"batch": 1})
            np.copyto(binding.inputs["pixels"][0], pixels)
            binding.enqueue()
            made = {name: np.array(output[0], np.float32) for name, output in binding.outputs.items()}
        if not all(np.isfinite(output).all() for output in made.values()):
            raise NonFiniteError("the image encoder gave NaN or infinity", remedy="Export it in float32.")
        return made

    def tell(self, prompt: ImagePrompt | None) -> Sequence[tuple[dict[str, Float32], dict[str, Float32]]]:
        """By image the arrays of the prompt's row and of the negative's; none for an image without a picture."""
        if prompt is None:
            return ()
        encoded: dict[int, tuple[Float32, Float32]] = {}
        told: list[tuple[dict[str, Float32], dict[str, Float32]]] = []
        for pixels in prompt.pixels:
            if pixels is None:
                told.append(({}, {}))
                continue
            if id(pixels) not in encoded:
                encoded[id(pixels)] = self.encode(pixels)
            tokens, negative = encoded[id(pixels)]
            scale = {SCALE_INPUT: prompt.factors}
            told.append(({TOKENS_INPUT: tokens, **scale}, {TOKENS_INPUT: negative, **scale}))
        return told
