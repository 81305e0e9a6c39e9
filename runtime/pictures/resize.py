"""Pictures of any size: what becomes of them where the size asked for is another one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...bundle import Bundle
from ...errors import ArgumentError, UnknownNameError
from ..arrays import Float32
from ..call import Call
from .images import to_unit
from .inpaint import open_mask, to_latent_mask
from .reading import MOST_PIXELS, open_image

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PICTURES = 1024
FITS = ("stretch", "cover", "contain", "diffusers")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pictures:
    """What a request starts from: one picture for all images, or one an image.

    pixels: float32 [n, 3, H, W] in [-1, 1]. masks: float32 [m, h, w] of the latent, 1 where it is made anew, or
    `None`. m is 1 or n.
    """

    pixels: Float32
    masks: Float32 | None

    def of_images(self, count: int) -> Pictures:
        """The same for `count` images: one a prompt becomes one an image of it."""
        own = len(self.pixels)
        if own == 1 or own == count:
            return self
        if count % own:
            raise ArgumentError(f"{own} pictures for {count} images", expected="one an image, one a prompt, or one")
        masks = self.masks
        if masks is not None and len(masks) > 1:
            masks = np.repeat(masks, count // own, axis=0)
        return Pictures(pixels=np.repeat(self.pixels, count // own, axis=0), masks=masks)


def open_pictures(call: Call) -> tuple[list[Image], list[Image]]:
    """The call's pictures and masks, as they are."""
    if call.fit not in FITS:
        raise UnknownNameError("fit", str(call.fit), FITS)
    if call.image is None:
        if call.mask is not None:
            raise ArgumentError("a mask without an image", remedy="Pass the image that it belongs to.")
        return [], []
    pictures = [open_image(p) for p in _listed(call.image)]
    masks = [] if call.mask is None else [open_mask(m) for m in _listed(call.mask)]
    if not pictures:
        raise ArgumentError("the image is an empty list", expected="one picture, or one an image")
    if call.mask is not None and len(masks) not in {1, len(pictures)}:
        raise ArgumentError(f"{len(masks)} masks for {len(pictures)} images", expected="one a picture, or a single one")
    if call.fit in {"cover", "contain"}:
        for picture, mask in zip(pictures, masks * len(pictures) if len(masks) == 1 else masks, strict=bool(masks)):
            if picture.size != mask.size:
                raise ArgumentError(
                    f"the mask is {mask.width}x{mask.height} and the picture {picture.width}x{picture.height}",
                    expected=f"equal sizes with fit={call.fit!r}",
                )
    return pictures, masks


def _listed(given: Any) -> Sequence[Any]:
    listed = given if isinstance(given, (list, tuple)) else [given]
    if len(listed) > MOST_PICTURES:
        raise ArgumentError(f"{len(listed)} pictures", expected=f"at most {MOST_PICTURES}")
    return listed


def size_of(bundle: Bundle, picture: Image) -> tuple[int, int]:
    """(width, height) of a picture, each rounded down to what the model takes, as diffusers rounds."""
    unit = bundle.latent.unit
    width, height = (side // unit * unit for side in picture.size)
    if not (width and height):
        raise ArgumentError(f"the picture is {picture.width}x{picture.height}", expected=f"at least {unit}x{unit}")
    return width, height


def fit_pictures(
    bundle: Bundle, call: Call, opened: tuple[list[Image], list[Image]], width: int, height: int
) -> Pictures | None:
    """The call's pictures and masks at the size of the request."""
    pictures, masks = opened
    if not pictures:
        return None
    fitted = [to_unit(fit_picture(p, width, height, call.fit), width, height) for p in pictures]
    factor, threshold = bundle.latent.factor, call.mask_threshold
    latent_masks = [to_latent_mask(fit_picture(m, width, height, call.fit), factor, threshold) for m in masks]
    return Pictures(pixels=np.stack(fitted), masks=np.stack(latent_masks) if latent_masks else None)


def fit_picture(picture: Image, width: int, height: int, fit: str) -> Image:
    """The picture at width x height.

    `"stretch"` ignores its proportions, as diffusers does, and so does `"diffusers"`, another word for it. `"cover"`
    keeps them and crops what stands over, in the middle. `"contain"` keeps them and repeats the edges around it.
    Resizing is Lanczos.
    """
    from PIL import Image as pillow

    if picture.size == (width, height):
        return picture
    if fit in {"stretch", "diffusers"}:
        return picture.resize((width, height), pillow.Resampling.LANCZOS)
    wider = picture.width * height >= width * picture.height
    if wider == (fit == "cover"):
        inner = max(1, picture.width * height // picture.height), height
    else:
        inner = width, max(1, picture.height * width // picture.width)
    if inner[0] * inner[1] > MOST_PIXELS:
        raise ArgumentError(
            f"a picture of {picture.width}x{picture.height} for {width}x{height}", expected="proportions nearer to it"
        )
    resized = picture.resize(inner, pillow.Resampling.LANCZOS)
    left, top = width // 2 - inner[0] // 2, height // 2 - inner[1] // 2
    if fit == "cover":
        return resized.crop((-left, -top, width - left, height - top))
    around = ((top, height - top - inner[1]), (left, width - left - inner[0]))
    pixels = np.asarray(resized if resized.mode != "1" else resized.convert("L"))
    return pillow.fromarray(np.pad(pixels, (*around, (0, 0))[: pixels.ndim], mode="edge"))
