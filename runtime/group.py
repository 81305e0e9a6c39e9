"""The images of each request spread over several devices."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import Any, Unpack

from ..bundle import Bundle
from ..errors import ArgumentError, CancelledError, UnsupportedError
from .call import takes_a_call
from .caller import ImageMaker
from .device.base import Device
from .keywords import CallArguments, SharedOptions
from .loras import LoraLibrary
from .pipeline import Pipeline
from .prepare import Prepared
from .progress import follow
from .request import Request
from .result import Result, ResultPart, Step, make_result


class PipelineGroup(ImageMaker):
    """One bundle on several devices, called as `Pipeline` is: prompts are encoded once, images are spread.

    Each image is what its seed gives on one device, whichever that is. Images that share one stream of noise
    (`shared_stream`) stay together on the first device.
    """

    def __init__(self, bundle: Bundle, *, devices: Sequence[str], **options: Unpack[SharedOptions]) -> None:
        if not devices or isinstance(devices, str):
            raise ArgumentError(f"devices is {devices!r}", expected="a list of at least one device")
        self.pipelines = tuple(Pipeline(bundle, device=d, **options) for d in devices)
        self.bundle, self.devices, self._options = bundle, tuple(devices), options

    @property
    def device(self) -> Device:
        """The first device, on which prompts are encoded."""
        return self.pipelines[0].device

    @property
    def loras(self) -> LoraLibrary:
        """The first device's, which reads what requests ask for."""
        return self.pipelines[0].loras

    def reopened(self, bundle: Bundle | None = None, *, device: str | None = None) -> PipelineGroup:
        """Another group on the same devices with the same options, of another bundle."""
        if device is not None:
            raise UnsupportedError(
                f"moving {len(self.devices)} devices' pipelines to {device}", remedy="Load it there."
            )
        return PipelineGroup(self.bundle if bundle is None else bundle, devices=self.devices, **self._options)

    def __repr__(self) -> str:
        return f"<PipelineGroup {self.bundle.name!r}: {len(self.devices)} on {', '.join(self.devices)}>"

    def close(self) -> None:
        """See `Pipeline.close`; every device's."""
        for pipeline in self.pipelines:
            pipeline.close()

    @takes_a_call
    def request(self, prompt: str | Sequence[str] | None = None, **given: Unpack[CallArguments]) -> Request:
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

        def one(index: int) -> ResultPart:
            part = self.pipelines[index].make(parts[index])
            try:
                return follow(part, None if index else on_step, (stop, cancel))
            except BaseException:
                stop.set()
                raise

        with ThreadPoolExecutor(len(parts), thread_name_prefix="fewstep-device") as pool:
            futures = [pool.submit(one, i) for i in range(len(parts))]
        errors = [e for f in futures if (e := f.exception()) is not None]
        if errors:
            raise next((e for e in errors if not isinstance(e, CancelledError)), errors[0])
        total_ms = 1e3 * (time.perf_counter() - began)
        return make_result(self.bundle, prepared, [f.result() for f in futures], total_ms=total_ms)

    def warm_up(self, **options: Any) -> None:
        """See `Pipeline.warm_up`; every device is warmed up."""
        for pipeline in self.pipelines:
            pipeline.warm_up(**options)


def split(prepared: Prepared, parts: int) -> list[Prepared]:
    """A prepared request in at most so many parts of neighbouring images, as equal as can be, none of them empty."""
    count = len(prepared.samplings)
    parts = min(parts, count)
    edges = [i * count // parts for i in range(parts + 1)]
    return [
        replace(
            prepared,
            samplings=prepared.samplings[a:b],
            gaussians=prepared.gaussians[a:b],
            latents=None if prepared.latents is None else prepared.latents[a:b],
        )
        for a, b in pairwise(edges)
    ]
