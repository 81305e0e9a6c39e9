"""The pipeline: a bundle's engines, loaded, and the call that turns prompts into images."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from .. import __version__
from ..bundle import Bundle, read_bundle
from ..engines import RunOptions, Store, open_engines
from ..errors import BlackImageError, CancelledError, NonFiniteError
from .arguments import check_integer
from .call import takes_a_call
from .device.numpy_slots import Float32, Slots
from .device.pool import SlotPool
from .pictures.vae import Vae
from .prepare import Prepared, prepare
from .prompts.encoders import TextEncoders
from .request import MOST_IMAGES, Request, check_size, make_request
from .result import Result, Step

if TYPE_CHECKING:
    from .group import PipelineGroup

log = logging.getLogger("fewstep.runtime")


class Pipeline:
    """A loaded bundle. Several threads may call it: engines are shared, each call takes slots from a pool.

    At most `most_contexts` sets of slots are kept between calls, by latent shape and number. vae_tiling, vae_slicing:
    `"auto"`, `True` or `False`, as `Vae` says. keep_text_encoders: `False` opens them when a prompt comes that is not
    known yet, and closes them once it is encoded, so that their memory is free while images are made.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        backend: str = "auto",
        size: tuple[int, int] | None = None,
        batch: int = 1,
        store: Store | None = None,
        build: str = "if_missing",
        threads: int = 0,
        most_contexts: int = 4,
        vae_tiling: str | bool = "auto",
        vae_slicing: str | bool = "auto",
        keep_text_encoders: bool = True,
        progress: Callable[[str, str, float], None] | None = None,
    ) -> None:
        self.bundle, self.threads = bundle, threads
        self._warned: set[str] = set()
        self.batch = check_integer("batch", batch, 1, MOST_IMAGES)
        self._options: dict[str, Any] = {
            "backend": backend,
            "run": RunOptions(threads=threads),
            "store": store,
            "build": build,
            "progress": progress,
        }
        self.size = check_size(bundle, size or (bundle.defaults.width, bundle.defaults.height))
        encoders = [n for n in ("text_encoder", "text_encoder_2") if n in bundle.components]
        self.engines = self._open([*(encoders if keep_text_encoders else ()), "unet", "vae_decoder"])
        self.text = TextEncoders(
            bundle,
            self.engines if keep_text_encoders else lambda: self._open(encoders),
            keep_engines=keep_text_encoders,
        )
        self.vae = Vae(
            bundle,
            self.engines["vae_decoder"],
            lambda: self._open(["vae_encoder"])["vae_encoder"],
            tiling=vae_tiling,
            slicing=vae_slicing,
        )
        self._pool = SlotPool(self.engines["unet"], keep=check_integer("most_contexts", most_contexts, 0, 1024))

    def _open(self, names: Sequence[str]) -> dict[str, Any]:
        return open_engines(self.bundle, names, dims={n: self._dims(n) for n in names}, **self._options)

    def _dims(self, name: str) -> dict[str, int]:
        """The sizes an engine is opened for; an engine with dynamic shapes takes others too."""
        factor = self.bundle.latent.factor
        width, height = self.size[0] // factor, self.size[1] // factor
        rows = 2 * self.batch if self.bundle.defaults.guidance > 1 else self.batch
        dims = {"rows": rows, "prompts": rows, "batch": self.batch, "height": height, "width": width}
        return dims | {"tokens": self.bundle.tokenizers[0].length}

    @takes_a_call
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        cancel: threading.Event | None = None,
        on_step: Callable[[Step], None] | None = None,
        **given: Any,
    ) -> Result:
        """Make images. `Call` documents every argument; what it does not name is an option of the sampler.

        cancel: ends the call between two evaluations once it is set. on_step: is told of each evaluation.

        Raises `ArgumentError` before anything is computed; `NonFiniteError` and `BlackImageError` instead of
        returning a broken image; `CancelledError` once `cancel` is set.
        """
        if cancel is not None and cancel.is_set():
            raise CancelledError("the request was cancelled before it began")
        return self.run(self.request(prompt, **given), cancel=cancel, on_step=on_step)

    def run(
        self,
        request: Request,
        *,
        cancel: threading.Event | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> Result:
        """Make a request's images; as a call, for a request that was made before."""
        with closing(self.stream(request)) as stream:
            while True:
                try:
                    step = next(stream)
                except StopIteration as stop:
                    result: Result = stop.value
                    return result
                if on_step is not None:
                    on_step(step)
                if cancel is not None and cancel.is_set():
                    raise CancelledError(
                        f"the request was cancelled after {step.index + 1} of {step.total} evaluations"
                    )

    @takes_a_call
    def request(self, prompt: str | Sequence[str] | None = None, **given: Any) -> Request:
        """A checked `Request` for this bundle; takes what a call takes, pictures included."""
        request = make_request(self.bundle, prompt, default_size=self.size, **given)
        for warning in set(request.warnings) - self._warned:
            log.warning("%s", warning)
        self._warned.update(request.warnings)
        return request

    def stream(self, request: Request, *, previews: bool = False) -> Generator[Step, None, Result]:
        """A generator of `Step`s that returns the `Result`; closing it ends the request between two evaluations."""
        began = time.perf_counter()
        return (yield from self._stream(self.prepare(request), began, previews=previews))

    def _stream(self, prepared: Prepared, began: float, *, previews: bool) -> Generator[Step, None, Result]:
        """`stream`, of a request that was prepared before."""
        request, out = prepared.request, np.empty_like(prepared.gaussians)
        started = time.perf_counter()
        with self._pool.take(prepared.shape, request.images) as slots:
            yield from self._denoise(slots, prepared, out, previews=previews)
            times = slots.times
        denoised = time.perf_counter()
        images = self.vae.decode(out)
        timings = {
            "text": prepared.text_ms,
            "encode_image": prepared.encode_image_ms,
            "denoise": 1e3 * (denoised - started),
            "decode": _since(denoised),
            "total": _since(began),
            "evaluations": times.evaluations,
            "update": times.update,
            "guidance": times.guidance,
            "gather": times.gather,
        }
        return Result(
            images=images,
            seeds=request.seeds,
            timings=timings,
            latents=out,
            parameters=self.parameters(request),
            truncated=prepared.truncated,
        )

    def prepare(self, request: Request) -> Prepared:
        """The request with prompts and picture encoded and noise drawn, ready for slots."""
        return prepare(self.bundle, self.text, self.vae, request)

    def make_slots(self, shape: tuple[int, int, int], count: int) -> Any:
        """Slots of a latent shape (C, h, w) on this pipeline's device, for callers that tick themselves."""
        return self._pool.make(shape, count)

    def warm_up(self, *, size: tuple[int, int] | None = None, batch: int | None = None, image: bool = False) -> None:
        """Run requests of this shape once, with guidance and without, so that no later one pays for first-time work.

        `image` opens the VAE's encoder too, for services that start from pictures.
        """
        width, height = check_size(self.bundle, size or self.size)
        picture = np.full((height, width, 3), 128, np.uint8) if image else None
        count = self.batch if batch is None else check_integer("batch", batch, 1, MOST_IMAGES)
        for guidance in (1.0, max(2.0, self.bundle.defaults.guidance)):
            self.text.forget()
            with suppress(BlackImageError, NonFiniteError):  # one step of a nonsense prompt may well be black
                self(
                    [f"warm-up {i}" for i in range(count)],
                    steps=1,
                    sampler="euler",
                    schedule="trailing",
                    guidance=guidance,
                    seed=list(range(count)),
                    size=(width, height),
                    image=picture,
                    strength=1.0,
                )
        self.text.forget()

    def _denoise(self, slots: Slots, prepared: Prepared, out: Float32, *, previews: bool) -> Iterator[Step]:
        """Admit the images of a request, tick until they are done, leave the slots as they were."""
        held: list[int] = []
        latents = prepared.latents
        try:
            for i, tenant in enumerate(prepared.tenants):
                held.append(slots.admit(tenant, prepared.gaussians[i], None if latents is None else latents[i]))
            program = prepared.request.program
            for i in range(program.evaluations):
                x0 = np.empty_like(out) if previews else None
                slots.tick(held, None if x0 is None else dict(zip(held, x0, strict=True)))
                yield Step(
                    index=i,
                    total=program.evaluations,
                    timestep=float(program.timesteps[i]),
                    x0=x0,
                    _latents=lambda: np.stack([slots.latent(slot) for slot in held]),
                    _decode=self.vae.decode_unguarded,
                )
            for slot, into in zip(held, out, strict=True):
                slots.result(slot, into)
        finally:
            for slot in held:
                slots.release(slot)

    def parameters(self, request: Request) -> tuple[Mapping[str, Any], ...]:
        """What goes into each picture: everything that made it."""
        shared: dict[str, Any] = {
            "bundle": self.bundle.name,
            "model": self.bundle.name,
            "steps": request.steps,
            "guidance": request.guidance,
            "width": request.width,
            "height": request.height,
            "sampler": request.sampler,
            "schedule": request.schedule,
            "compat": request.compat,
            "sampler_name": request.program.sampler,
            "schedule_name": request.program.schedule,
            "strength": request.strength,
            "image": request.recorded.get("image"),
            "options": dict(request.options),
            "recorded": {k: v for k, v in request.recorded.items() if k != "image"},
            "version": __version__,
            "unet_sha256": self.bundle.components["unet"].weights_sha256,
        }
        if request.shared_stream and request.images > 1:
            shared["batch"] = {"prompts": list(request.prompts), "seed": request.seeds[0]}
        made = zip(request.wording.described(), request.seeds, strict=True)
        return tuple({**shared, **told, "seed": s, "index": i} for i, (told, s) in enumerate(made))


def _since(began: float) -> float:
    return 1e3 * (time.perf_counter() - began)


@overload
def load(folder: str | os.PathLike[str] | Bundle, *, devices: None = None, **options: Any) -> Pipeline: ...
@overload
def load(folder: str | os.PathLike[str] | Bundle, *, devices: Sequence[str], **options: Any) -> PipelineGroup: ...
def load(
    folder: str | os.PathLike[str] | Bundle, *, devices: Sequence[str] | None = None, **options: Any
) -> Pipeline | PipelineGroup:
    """Load a bundle for use: `fewstep.load("bundle-folder", backend="auto", size=(512, 512), batch=1)`.

    Options are those of `Pipeline`, and `device` (`"cpu"`, `"cuda"`, `"cuda:1"`) with those of `DevicePipeline`.
    `devices` spreads the images of each request over several. Engines that are not built yet are built first
    (`build="never"` refuses instead).
    """
    from .group import PipelineGroup, open_pipeline

    bundle = folder if isinstance(folder, Bundle) else read_bundle(folder)
    return open_pipeline(bundle, **options) if devices is None else PipelineGroup(bundle, devices=devices, **options)
