"""What a call gives back, and what it says on the way."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..bundle import Bundle
from ..errors import ArgumentError
from ..version import __version__
from .arrays import Float32, UInt8
from .device.base import TickTimes
from .pictures.images import check_output, pillow_images, png_bytes, save_picture
from .pictures.video import save_clips
from .prepare import Prepared
from .request import Request
from .searched import DIGITS

REPR_SEEDS = 4
"""So many are shown in a line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultPart:
    """What a device made of a request's images, or of some: pictures, latents, and milliseconds by stage.

    tensor: the pictures as torch uint8 [B, H, W, 3] where they were made, if that is a torch device.
    """

    device: str
    images: UInt8
    latents: Float32
    denoise_ms: float
    decode_ms: float
    ticks: TickTimes
    tensor: Any = None


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Result:
    """What a call gives back.

    images: uint8 [B, H, W, 3], of clips [B, F, H, W, 3]. seeds: one an image, or a clip. latents: float32 [B, C, h, w],
    of clips [B, F, C, h, w], what was decoded. parameters: by image, what made it, as its PNG holds it. timings:
    milliseconds by stage (`queue`, `text`, `encode_image`, `denoise`, `decode`, `total`; of the denoising:
    `evaluations`, a list, and `update`, `guidance`, `gather`), and `devices`: by device `denoise` and `decode` there. A
    request that is one piece of work is all `denoise`. truncated: by image, whether the text encoder did not take all
    of its prompt or negative prompt.
    tensor: the images as torch uint8 [B, H, W, 3] on the device that made them, where it is one; DLPack gives these,
    or the NumPy images. fps: of clips, their frames per second. A notebook shows the pictures in a row, of clips the
    first frames.
    """

    images: UInt8
    seeds: tuple[int, ...]
    timings: Mapping[str, Any]
    latents: Float32
    parameters: tuple[Mapping[str, Any], ...]
    truncated: tuple[bool, ...]
    tensor: Any = field(default=None, repr=False)
    fps: int | None = None

    def __repr__(self) -> str:
        count, (height, width) = len(self.images), self.images.shape[-3:-1]
        what = f"{count} {'image' if self.fps is None else 'clip'}{'s' * (count > 1)} of {width}x{height}"
        if self.fps is not None:
            what += f" and {self.images.shape[1]} frames"
        seeds = ", ".join(str(s) for s in self.seeds[:REPR_SEEDS]) + ", ..." * (count > REPR_SEEDS)
        return f"<Result: {what}, seed{'s' * (count > 1)} {seeds}, {self.timings.get('total', 0.0):.0f} ms>"

    def _repr_png_(self) -> bytes:
        shown = self.images if self.fps is None else self.images[:, 0]
        return png_bytes(np.concatenate(shown, axis=1))

    @property
    def frames(self) -> UInt8:
        """The clips, uint8 [B, F, H, W, 3]; `ArgumentError` where pictures were made."""
        if self.fps is None:
            raise ArgumentError("frames of pictures", expected="a result of clips", remedy="Read images instead.")
        return self.images

    def __dlpack__(self, **options: Any) -> Any:
        return (self.images if self.tensor is None else self.tensor).__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return (self.images if self.tensor is None else self.tensor).__dlpack_device__()

    def to_pil(self) -> list[Any]:
        """The images as Pillow images; of clips a list of their frames each."""
        if self.fps is not None:
            return [pillow_images(clip) for clip in self.images]
        return list(pillow_images(self.images))

    def save(self, path: str | os.PathLike[str]) -> list[str]:
        """Write pictures with their parameters, in the format of the suffix (.png, .jpg, .webp, .avif).

        Of several each gets its number before the suffix.

        Clips are written as MP4, WebP or GIF, by the suffix, or as folders of PNGs where there is none.
        """
        if self.fps is not None:
            return save_clips(path, self.images, self.fps, self.parameters)
        target = check_output(path)
        stem, suffix = str(target.with_suffix("")), target.suffix
        names = (
            [f"{stem}{suffix or '.png'}"]
            if len(self.images) == 1
            else [f"{stem}-{i}{suffix or '.png'}" for i in range(len(self.images))]
        )
        for name, image, parameters in zip(names, self.images, self.parameters, strict=True):
            save_picture(name, image, parameters)
        return names


class StepLatents:
    """What a step shows of slots, for as long as they are as the step found them; from any thread.

    Once it is ended, and as soon as `end` returns, reading is an `ArgumentError`: the slots have moved on, or are
    another request's.
    """

    def __init__(self, read: Callable[[], Float32]) -> None:
        self._read: Callable[[], Float32] | None = read
        self._lock = threading.Lock()

    def __call__(self) -> Float32:
        with self._lock:
            if self._read is None:
                raise ArgumentError(
                    "the call has gone on, or ended, since this step was made",
                    expected="a step whose evaluation is the last one so far",
                    remedy="Take latents() in on_step, or before the next step of the stream, and keep the array.",
                )
            return self._read()

    def end(self) -> None:
        with self._lock:
            self._read = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Progress of a call: evaluation `index` of `total` was made at `timestep`.

    With previews switched on, `x0` is the image latent as this evaluation sees it, float32 [B, C, h, w], and
    `preview()` decodes it to uint8 [B, H, W, 3]; both have a further axis F of clips.
    """

    index: int
    total: int
    timestep: float
    x0: Float32 | None = None
    _latents: Callable[[], Float32] | None = field(default=None, repr=False)
    _decode: Callable[[Float32], UInt8] | None = field(default=None, repr=False)

    def latents(self) -> Float32:
        """The latents after this evaluation, in diffusers' coordinates, float32 [B, C, h, w].

        `ArgumentError` once the call has gone on to the next evaluation or ended, and where it shows none.
        """
        if self._latents is None:
            raise ArgumentError("this request does not show its latents", remedy="Ask for previews.")
        return self._latents()

    def preview(self) -> UInt8:
        """`x0` decoded, uint8 [B, H, W, 3]; `ArgumentError` where the call makes no previews."""
        if self.x0 is None or self._decode is None:
            raise ArgumentError("this call makes no previews", remedy="Pass previews=True.")
        return self._decode(self.x0)


def make_result(
    bundle: Bundle, prepared: Prepared, parts: Sequence[ResultPart], *, total_ms: float, queue_ms: float = 0.0
) -> Result:
    """What every caller gets, of a request whose images were made in one part or, on several devices, in several."""
    (first, *others), request = parts, prepared.request
    ticks = TickTimes() if others else first.ticks
    slowest = max(parts, key=lambda m: m.denoise_ms + m.decode_ms)
    timings = {
        "queue": queue_ms,
        "text": prepared.text_ms,
        "encode_image": prepared.encode_image_ms,
        "denoise": slowest.denoise_ms,
        "decode": slowest.decode_ms,
        "total": total_ms,
        "evaluations": ticks.evaluations,
        "update": ticks.update,
        "guidance": ticks.guidance,
        "gather": ticks.gather,
        "devices": [{"device": m.device, "denoise": m.denoise_ms, "decode": m.decode_ms} for m in parts],
    }
    return Result(
        images=np.concatenate([m.images for m in parts]) if others else first.images,
        seeds=request.seeds,
        timings=timings,
        latents=np.concatenate([m.latents for m in parts]) if others else first.latents,
        parameters=picture_parameters(bundle, request),
        truncated=prepared.truncated,
        tensor=None if others else first.tensor,
        fps=None if request.clip is None else request.clip.fps,
    )


def picture_parameters(bundle: Bundle, request: Request) -> tuple[Mapping[str, Any], ...]:
    """What goes into each picture: everything that made it."""
    clip = request.clip
    shared: dict[str, Any] = {
        "bundle": bundle.name,
        "model": bundle.name,
        "steps": request.steps,
        "guidance": list(clip.guidance) if clip is not None and clip.listed else request.guidance,
        "width": request.width,
        "height": request.height,
        "sampler": request.sampler,
        "schedule": request.schedule,
        "compat": request.compat,
        "sampler_name": request.program.sampler,
        "schedule_name": request.program.schedule,
        "strength": None if request.told is not None else request.strength,
        "image": request.recorded.get("image"),
        "options": dict(request.options),
        "recorded": {k: v for k, v in request.recorded.items() if k != "image"},
        "version": __version__,
        "unet_sha256": bundle.components["unet"].weights_sha256,
    }
    if bundle.checkpoint_sha256 is not None:
        shared["checkpoint_sha256"] = bundle.checkpoint_sha256
    if request.found is not None:
        shared["schedule_digest"] = request.found.digest[:DIGITS]
        shared["schedule_method"] = request.found.entry(request.steps).method
    if request.shared_stream and request.images > 1:
        shared["batch"] = {"prompts": list(request.prompts), "seed": request.seeds[0]}
    each: list[dict[str, Any]] = [{"seed": s, "index": i} for i, s in enumerate(request.seeds)]
    for one, seed in zip(each, request.variation_seeds, strict=False):
        one |= {"variation_seed": seed, "variation": request.variation}
    return tuple({**shared, **prompt, **one} for prompt, one in zip(request.wording.described(), each, strict=True))
