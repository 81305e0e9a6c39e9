"""Control pictures: what a request tells the networks beside its UNet, by image and by step."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...bundle import Bundle
from ...errors import ArgumentError, UnknownNameError, UnsupportedError
from ...families.control import control_channels, controls_of, picture_input, residuals, scale_input
from ...families.image_prompt import IMAGE_ENCODER
from ..arguments import check_flag, check_real
from ..arrays import Float32
from ..call import Call
from .edges import HIGH, LOW, check_thresholds, edges_of
from .reading import open_image
from .resize import fit_picture

if TYPE_CHECKING:
    from PIL.Image import Image

LEAST_SCALE, MOST_SCALE = -100.0, 100.0
GUESS_FIRST = -1.0
"""Guess mode's factors rise from 10^-1 at the first residual to 1 at the last."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Control:
    """What a request tells one network beside its UNet.

    pictures: by image float32 [C, H, W] from 0 to 1, `None` for an image without. factors, negative: float32 [N] of
    what it adds to the prompt's row and to the negative's. steps: float32 [evaluations], 1 where it is on and 0
    elsewhere; `None` where it is on throughout.
    """

    name: str
    pictures: tuple[Float32 | None, ...]
    factors: Float32
    negative: Float32
    steps: Float32 | None

    def told(self, image: int, *, negative: bool) -> dict[str, Float32]:
        """The arrays of one of an image's rows; none for an image without a picture."""
        picture = self.pictures[image]
        if picture is None:
            return {}
        factors = self.negative if negative else self.factors
        return {picture_input(self.name): picture, scale_input(self.name): factors}

    def varying(self, image: int) -> dict[str, Float32]:
        """Factors by step, by input."""
        if self.steps is None or self.pictures[image] is None:
            return {}
        return {scale_input(self.name): self.steps}


def pictures_beside(bundle: Bundle) -> int:
    """Pictures that an image may come with beside the one that it starts from: for controls, and as prompts."""
    return len(controls_of(bundle.component("unet").config)) + (IMAGE_ENCODER in bundle.components)


def open_controls(bundle: Bundle, call: Call) -> dict[str, list[Image | None]]:
    """The pictures of a call's controls as they are, by name: one for all images, or one an image.

    Raises `UnsupportedError` for a bundle without controls, `UnknownNameError` for a name that it does not have.
    """
    given = call.control
    if given is None:
        _refuse_alone(call)
        return {}
    known = controls_of(bundle.component("unet").config)
    if not isinstance(given, Mapping) or not given:
        raise ArgumentError(f"control is {type(given).__name__}", expected='pictures by name, like {"canny": picture}')
    if not known:
        raise UnsupportedError(
            f"control of the bundle {bundle.name!r}, which was exported without",
            expected="a bundle with a ControlNet",
            remedy="Export the checkpoint again with: --controlnet NAME=PATH",
        )
    opened = {}
    for name, pictures in sorted(given.items()):
        if name not in known:
            raise UnknownNameError("control", str(name), known)
        listed = pictures if isinstance(pictures, (list, tuple)) else [pictures]
        opened[name] = [None if p is None else open_image(p) for p in listed]
        if not any(opened[name]):
            raise ArgumentError(f"the control {name} has no picture", expected="one picture, or one an image")
    return opened


def _refuse_alone(call: Call) -> None:
    for name in ("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end", "canny"):
        if getattr(call, name) is not None:
            raise ArgumentError(f"{name} without control", remedy="Pass control, or leave it out.")
    check_flag("guess_mode", call.guess_mode)
    if call.guess_mode:
        raise ArgumentError("guess_mode without control", remedy="Pass control, or leave it out.")


def make_controls(
    bundle: Bundle,
    call: Call,
    opened: Mapping[str, Sequence[Image | None]],
    *,
    size: tuple[int, int],
    images: int,
    evaluations: int,
) -> tuple[Control, ...]:
    """A call's controls for so many images of (width, height) pixels under a program of so many evaluations."""
    configs = controls_of(bundle.component("unet").config)
    controls = []
    check_flag("guess_mode", call.guess_mode)
    canny = _canny(call, opened)
    for name, pictures in opened.items():
        config = configs[name]
        pools = bool(config.get("global_pool_conditions"))
        guess = call.guess_mode or pools
        channels, thresholds = control_channels(config), canny.get(name)
        fitted = [None if p is None else _pixels(p, size, call.fit, channels, thresholds) for p in pictures]
        scale = _of_control(call, "controlnet_conditioning_scale", name, opened, 1.0, LEAST_SCALE, MOST_SCALE)
        start = _of_control(call, "control_guidance_start", name, opened, 0.0, 0.0, 1.0)
        end = _of_control(call, "control_guidance_end", name, opened, 1.0, 0.0, 1.0)
        if start >= end:
            raise ArgumentError(f"the control {name} ends at {end:g} and starts at {start:g}", expected="a later end")
        count = residuals(config)
        shares = np.logspace(GUESS_FIRST, 0, count) if guess and not pools else np.ones(count)
        factors: Float32 = shares.astype(np.float32) * np.float32(scale)
        controls.append(
            Control(
                name=name,
                pictures=_by_image(name, fitted, images),
                factors=factors,
                negative=np.zeros_like(factors) if guess else factors,
                steps=steps_between(start, end, evaluations),
            )
        )
    return tuple(controls)


def steps_between(start: float, end: float, evaluations: int) -> Float32 | None:
    """1 for each evaluation that lies between two shares of them, else 0; `None` where all do.

    As diffusers counts: the i-th of n is off where i / n < start or (i + 1) / n > end.
    """
    count = evaluations
    on = [not (i / count < start or (i + 1) / count > end) for i in range(count)]
    return None if all(on) else np.array(on, np.float32)


def neutral_arrays(bundle: Bundle, dims: Mapping[str, int]) -> dict[str, Float32]:
    """What a row is told of networks that it does not use: zeros."""
    neutral = {}
    specs = {s.name: s for s in bundle.component("unet").inputs}
    for condition in bundle.conditions:
        if condition.adapter is not None:
            neutral[condition.name] = _zeros(specs[condition.name].resolve({**dims, "rows": 1})[1:])
    return neutral


def tell_controls(
    controls: Sequence[Control], image: int
) -> tuple[dict[str, Float32], dict[str, Float32], dict[str, Float32]]:
    """An image's arrays for the prompt's row and for the negative's, and factors by step, over all controls."""
    positive: dict[str, Float32] = {}
    negative: dict[str, Float32] = {}
    steps: dict[str, Float32] = {}
    for control in controls:
        positive |= control.told(image, negative=False)
        negative |= control.told(image, negative=True)
        steps |= control.varying(image)
    return positive, negative, steps


def recorded_controls(call: Call) -> dict[str, Any]:
    """What a picture's parameters say of a call's controls, as the command line's words: files, factors, shares."""
    files = {n: p for n, p in (call.control or {}).items() if isinstance(p, (str, os.PathLike))}
    if not files:
        return {}
    scales = call.controlnet_conditioning_scale
    by_name = scales if isinstance(scales, Mapping) else dict.fromkeys(files, scales)
    words = [f"{n}={Path(p).name}" + ("" if by_name.get(n) is None else f":{by_name[n]}") for n, p in files.items()]
    shares = {}
    for argument in ("control_guidance_start", "control_guidance_end"):
        given = getattr(call, argument)
        if given is not None:
            shares[argument] = [f"{n}={v}" for n, v in given.items()] if isinstance(given, Mapping) else [f"{given}"]
    thresholds = _canny(call, call.control or {})
    if thresholds:
        shares["canny"] = [f"{n}:{low:g}:{high:g}" for n, (low, high) in thresholds.items()]
    return {"control": words, **shares, **({"guess_mode": True} if call.guess_mode else {})}


@lru_cache(maxsize=64)
def _zeros(shape: tuple[int, ...]) -> Float32:
    """One array a shape: rows that hold it already are not written again."""
    zeros = np.zeros(shape, np.float32)
    zeros.flags.writeable = False
    return zeros


def _pixels(
    picture: Image, size: tuple[int, int], fit: str, channels: int, canny: tuple[float, float] | None
) -> Float32:
    """float32 [C, H, W] from 0 to 1, of a picture resized as diffusers resizes it; with thresholds, of its edges."""
    fitted = fit_picture(picture, *size, fit)
    if canny is not None:
        fitted = edges_of(fitted, *canny)
    if channels == 1:
        fitted = fitted.convert("L")
    pixels = np.asarray(fitted, np.float32).reshape(size[1], size[0], -1) / np.float32(255.0)
    if pixels.shape[2] != channels:
        raise UnsupportedError(f"a control of pictures with {channels} channels", expected="3, or 1 of grey")
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _canny(call: Call, names: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """The thresholds of those controls whose pictures are photographs, by name."""
    given = call.canny
    if given is None:
        return {}
    if isinstance(given, str) or not isinstance(given, (Mapping, Sequence)):
        raise ArgumentError(
            f"canny is {given!r}", expected='names of controls, or thresholds by name: {"canny": (100, 200)}'
        )
    by_name = given if isinstance(given, Mapping) else dict.fromkeys(given, (LOW, HIGH))
    for name, thresholds in by_name.items():
        if name not in names:
            raise ArgumentError(f"canny of {name!r}, which has no picture", expected=", ".join(names))
        if not isinstance(thresholds, Sequence) or isinstance(thresholds, str) or len(thresholds) != 2:
            raise ArgumentError(f"canny of {name!r} is {thresholds!r}", expected="two thresholds, like (100, 200)")
    return {name: check_thresholds(*thresholds) for name, thresholds in by_name.items()}


def _by_image(name: str, pictures: Sequence[Float32 | None], images: int) -> tuple[Float32 | None, ...]:
    """One an image: of several a prompt each as often as the prompt has images."""
    if images % len(pictures):
        raise ArgumentError(
            f"{len(pictures)} pictures of the control {name} for {images} images", expected="one an image, or one"
        )
    each = images // len(pictures)
    return tuple(p for p in pictures for _ in range(each))


def _of_control(
    call: Call, argument: str, name: str, names: Mapping[str, Any], usual: float, low: float, high: float
) -> float:
    """An argument that is one number for all controls, or one by name."""
    given = getattr(call, argument)
    if isinstance(given, Mapping):
        unknown = [n for n in given if n not in names]
        if unknown:
            raise ArgumentError(f"{argument} of {unknown[0]!r}, which has no picture", expected=", ".join(names))
        given = given.get(name)
    return usual if given is None else check_real(argument, given, low, high)
