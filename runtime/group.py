"""Where a bundle runs: one device, or the images of each request spread over several."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from ..bundle import Bundle
from ..engines import choose_backend
from ..errors import ArgumentError, CancelledError
from .call import takes_a_call
from .pipeline import Pipeline
from .prepare import Prepared
from .request import Request
from .result import Result, Step

ON_CUDA = ("ort-cuda", "tensorrt", "tensorrt-rtx")
"""The backends that run on CUDA alone."""


def open_pipeline(bundle: Bundle, *, device: str | None = None, **options: Any) -> Pipeline:
    """A pipeline on a device: `"cpu"` (NumPy), `"cuda"`, `"cuda:1"`, or `"cpu:torch"`, the CUDA device's code on CPU
    tensors; `None` is where the backend runs."""
    if device is None:
        name, _ = choose_backend(options.get("backend", "auto"))
        device = "cuda" if name in ON_CUDA else "cpu"
    if device == "cpu":
        return Pipeline(bundle, **options)
    from .device_pipeline import DevicePipeline

    return DevicePipeline(bundle, device=device, **options)


class PipelineGroup:
    """One bundle on several devices, called as `Pipeline` is: prompts are encoded once, images are spread.

    Each image is what its seed gives on one device, whichever that is. Images that share one stream of noise
    (`shared_stream`) stay together on the first device.
    """

    def __init__(self, bundle: Bundle, *, devices: Sequence[str], **options: Any) -> None:
        if not devices or isinstance(devices, str):
            raise ArgumentError(f"devices is {devices!r}", expected="a list of at least one device")
        self.pipelines = tuple(open_pipeline(bundle, device=d, **options) for d in devices)
        self.bundle, self.devices = bundle, tuple(devices)

    @takes_a_call
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        cancel: threading.Event | None = None,
        on_step: Callable[[Step], None] | None = None,
        **given: Any,
    ) -> Result:
        """Make images; see `Pipeline`. `on_step` is told of the first device's steps."""
        return self.run(self.request(prompt, **given), cancel=cancel, on_step=on_step)

    @takes_a_call
    def request(self, prompt: str | Sequence[str] | None = None, **given: Any) -> Request:
        return self.pipelines[0].request(prompt, **given)

    def run(
        self,
        request: Request,
        *,
        cancel: threading.Event | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> Result:
        """Make a request's images. A failure on one device stops the others and is raised."""
        began = time.perf_counter()
        first, stop = self.pipelines[0], threading.Event()
        prepared = first.prepare(request)
        parts = split(prepared, 1 if request.shared_stream else len(self.pipelines))

        def one(index: int) -> tuple[Any, Any, dict[str, float]]:
            try:
                return _make(self.pipelines[index], parts[index], (stop, cancel), None if index else on_step)
            except BaseException:
                stop.set()
                raise

        with ThreadPoolExecutor(len(parts), thread_name_prefix="fewstep-device") as pool:
            futures = [pool.submit(one, i) for i in range(len(parts))]
        errors = [e for f in futures if (e := f.exception()) is not None]
        if errors:
            raise next((e for e in errors if not isinstance(e, CancelledError)), errors[0])
        made = [f.result() for f in futures]
        timings: dict[str, Any] = {
            "text": prepared.text_ms,
            "encode_image": prepared.encode_image_ms,
            **{k: max(times[k] for _, _, times in made) for k in ("denoise", "decode")},
            "total": 1e3 * (time.perf_counter() - began),
            "evaluations": [],
            "update": 0.0,
            "guidance": 0.0,
            "gather": 0.0,
            "devices": [{"device": d, **times} for d, (_, _, times) in zip(self.devices, made, strict=False)],
        }
        return Result(
            images=np.concatenate([images for images, _, _ in made]),
            seeds=request.seeds,
            timings=timings,
            latents=np.concatenate([latents for _, latents, _ in made]),
            parameters=first.parameters(request),
            truncated=prepared.truncated,
        )

    def warm_up(self, **options: Any) -> None:
        """See `Pipeline.warm_up`; every device is warmed up."""
        for pipeline in self.pipelines:
            pipeline.warm_up(**options)


def split(prepared: Prepared, parts: int) -> list[Prepared]:
    """A prepared request in at most so many parts of neighbouring images, as equal as can be, none of them empty."""
    count = len(prepared.tenants)
    parts = min(parts, count)
    edges = [i * count // parts for i in range(parts + 1)]
    return [
        replace(
            prepared,
            tenants=prepared.tenants[a:b],
            gaussians=prepared.gaussians[a:b],
            latents=None if prepared.latents is None else prepared.latents[a:b],
        )
        for a, b in pairwise(edges)
    ]


def _make(
    pipeline: Pipeline,
    prepared: Prepared,
    cancels: Sequence[threading.Event | None],
    on_step: Callable[[Step], None] | None,
) -> tuple[Any, Any, dict[str, float]]:
    """Images, latents and milliseconds of one device's part."""
    whole = getattr(pipeline, "is_whole", None)
    if whole is not None and whole(prepared):
        made = pipeline.make(prepared)  # type: ignore[attr-defined]
        return made.images, made.latents, {"denoise": made.denoise_ms, "decode": made.decode_ms}
    began = time.perf_counter()
    out = np.empty_like(prepared.gaussians)
    with pipeline._pool.take(prepared.shape, len(prepared.tenants)) as slots:
        for step in pipeline._denoise(slots, prepared, out, previews=False):
            if on_step is not None:
                on_step(step)
            if any(c is not None and c.is_set() for c in cancels):
                raise CancelledError(f"the request was cancelled after {step.index + 1} of {step.total} evaluations")
    denoised = time.perf_counter()
    images = pipeline.vae.decode(out)
    return images, out, {"denoise": 1e3 * (denoised - began), "decode": 1e3 * (time.perf_counter() - denoised)}
