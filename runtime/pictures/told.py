"""Pictures that a UNet is told of, to make them larger: read as they are, enlarged, noised, made its conditioning.

Saharia et al. 2022, arXiv 2205.11487, section 2.4; as diffusers' `IFSuperResolutionPipeline` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...bundle import Bundle
from ...errors import ArgumentError
from ...schedules import NoiseSchedule
from ..arguments import check_integer
from ..arrays import Float32
from ..call import Call
from ..conditioning import Arrays
from ..noise.seeds import Gaussians
from ..prompts.wording import as_float32
from .reading import open_alpha, open_image


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ToldPictures:
    """What a request's UNet is told of. pixels: float32 [n, 3, h, w] in [-1, 1], one for all images, one a prompt or
    one an image. level: of the noise, a timestep of the bundle's `noising`; alpha_bar: what it leaves of the signal.
    """

    pixels: Float32
    level: int
    alpha_bar: float

    def check(self, images: int) -> None:
        """Raise `ArgumentError` unless the pictures can be shared out among so many images."""
        if images % len(self.pixels):
            raise ArgumentError(
                f"{len(self.pixels)} pictures for {images} images", expected="one an image, one a prompt, or one"
            )


def read_told(bundle: Bundle, call: Call) -> ToldPictures | None:
    """The pictures that a call's UNet is told of, where its family's is told of any.

    Raises `ArgumentError` where one is missing, or given to a model that has no use for it.
    """
    model = bundle.model
    if model.pictures == "start":
        if call.noise_level is not None:
            raise ArgumentError(f"noise_level for {model.title}, which is told of no picture", remedy="Leave it out.")
        return None
    for name in ("mask", "strength"):
        if getattr(call, name) is not None:
            raise ArgumentError(f"{name} for {model.title}, which starts from noise alone", remedy="Leave it out.")
    if model.pictures == "none":
        for name in ("image", "noise_level"):
            if getattr(call, name) is not None:
                raise ArgumentError(
                    f"{name} for {model.title}, which makes pictures of texts alone", remedy=f"Leave {name} out."
                )
        return None
    if call.image is None:
        raise ArgumentError(
            f"no image for {model.title}, which makes a picture larger",
            expected="the picture of the stage before, beside the prompt",
            remedy="Pass image (--image), or run both: fewstep run STAGE1 --then STAGE2",
        )
    noise = NoiseSchedule.from_diffusers(bundle.noising)
    usual = model.noise_level if call.noise_level is None else call.noise_level
    level = check_integer("noise_level", usual, 0, len(noise) - 1)
    return ToldPictures(pixels=_pixels(call.image), level=level, alpha_bar=float(noise.alpha_bar[level]))


def _pixels(given: Any) -> Float32:
    """float32 [n, 3, h, w] in [-1, 1] of files, Pillow images, uint8 [H, W, 3], or of such floats themselves."""
    if getattr(given, "ndim", 0) in (3, 4) and "float" in str(getattr(given, "dtype", "")):
        return as_float32("image", given if given.ndim == 4 else given[None], (None, 3, None, None))
    listed: Sequence[Any] = given if isinstance(given, (list, tuple)) else [given]
    if listed and all(getattr(p, "ndim", 0) in (3, 4) and "float" in str(getattr(p, "dtype", "")) for p in listed):
        return _stacked([_pixels(p) for p in listed])
    pictures = []
    for source in listed:
        if not isinstance(source, np.ndarray) and open_alpha(source) is not None:
            raise ArgumentError("the picture has transparency", expected="red, green and blue alone")
        pixels = np.asarray(open_image(source), np.float32)
        pictures.append((pixels / np.float32(127.5) - np.float32(1.0)).transpose(2, 0, 1)[None])
    if not pictures:
        raise ArgumentError("the image is an empty list", expected="one picture, or one an image")
    return _stacked(pictures)


def _stacked(pictures: Sequence[Float32]) -> Float32:
    shapes = {p.shape[1:] for p in pictures}
    if len(shapes) > 1:
        raise ArgumentError("pictures of several sizes", expected="one size", remedy="Make requests of their own.")
    return np.concatenate(pictures)


def tell(bundle: Bundle, told: ToldPictures, members: Sequence[Gaussians], width: int, height: int) -> list[Arrays]:
    """By image, what both rows of the UNet are told; each draws the picture's noise, as in diffusers after its own."""
    unet, images = bundle.component("unet").config, len(members)
    large = [enlarge(p, width, height) for p in told.pixels]
    arrays: list[Arrays] = []
    for i, member in enumerate(members):
        picture = large[i * len(large) // images]
        noise = member.randn((picture.shape[0], height, width))
        arrays.append(bundle.model.tell_picture(unet, picture, noise, told.level, told.alpha_bar))
    return arrays


def enlarge(picture: Float32, width: int, height: int) -> Float32:
    """float32 [3, h, w] at another size, bilinear between the corners' centres (torch's `align_corners=True`)."""
    rows = _blend(picture, height, axis=1)
    return np.ascontiguousarray(_blend(rows, width, axis=2))


def _blend(picture: Float32, size: int, *, axis: int) -> Float32:
    """Along one axis: p(i s) with s = (n - 1) / (size - 1), between its two neighbours."""
    count = picture.shape[axis]
    step = np.float32(count - 1) / np.float32(size - 1) if size > 1 else np.float32(0.0)
    places = np.arange(size, dtype=np.float32) * step
    low = np.minimum(places.astype(np.int64), count - 1)
    high = np.minimum(low + 1, count - 1)
    share = (places - low.astype(np.float32)).reshape([-1 if a == axis else 1 for a in range(3)])
    first, second = np.take(picture, low, axis), np.take(picture, high, axis)
    blended: Float32 = (np.float32(1.0) - share) * first + share * second
    return blended
