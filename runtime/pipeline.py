"""The pipeline: a bundle's engines, loaded, and the call that turns prompts into images."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Unpack

import numpy as np

from ..bundle import Bundle
from ..engines import BuildOptions, Engine, RunOptions, Store
from ..engines.find import command
from ..engines.low_rank import Adapted
from ..engines.memory import dims_for, largest_batch
from ..errors import (
    ArgumentError,
    BlackImageError,
    MismatchError,
    NonFiniteError,
    OutOfMemoryError,
    UnavailableError,
)
from ..families.decoders import DECODERS, TINY_DECODER
from ..families.image_prompt import IMAGE_ENCODER
from ..schedules import Program
from ..weights.embeddings import embedding_file
from .arguments import check_flag, check_integer
from .arrays import Float32, Shape
from .call import takes_a_call
from .caller import ImageMaker
from .clip_prepare import prepare_clips
from .clip_request import make_clip_request
from .device.base import RECORDINGS, Device, Slots, TickTimes, check_engine
from .device.open import open_device
from .device.pool import SlotPool
from .keywords import CallArguments
from .library import offer_backend, open_bundle
from .loras import LoraLibrary
from .opened import OpenedEngines
from .pictures.image_prompt import ImagePrompts
from .pictures.vae import Vae, check_images
from .prepare import Prepared, prepare
from .progress import follow
from .prompts.encoders import TextEncoders
from .prompts.lora_tags import read_loras
from .request import MOST_IMAGES, Request, check_size, make_request
from .result import Result, ResultPart, Step, StepLatents, make_result
from .swapping import InFlight
from .warm_up import warm_up_calls

MODES = ("latency", "shared")
RELEASED = ("engines", "_on_device", "_opened", "text", "vae", "image_prompts", "loras", "adapted", "_pool")
"""What a pipeline holds until it is closed."""
log = logging.getLogger("fewstep.runtime")


class Pipeline(ImageMaker):
    """A loaded bundle on a device. Several threads may call it: engines are shared, each call takes slots from a pool.

    device: `"cpu"` (NumPy), `"cuda"`, `"cuda:1"`, `"cpu:torch"` for the GPU's code on CPU tensors, a `Device`, or
    `None` for where the backend runs. mode: `"latency"` does a whole request as one piece of work, without progress or
    cancelling in between, unless somebody wants previews; `"shared"` ticks; `None` is what suits the device. graphs:
    capture that work (`None`: on CUDA), with `graphs_kept` recordings a set of slots. engine_options: fields of
    `RunOptions` (`compile`, `cuda_graph`, ...).

    At most `most_contexts` sets of slots are kept between calls, by latent shape and number. vae_tiling, vae_slicing:
    `"auto"`, `True` or `False`, as `Vae` says. keep_text_encoders: `False` opens them when a prompt comes that is not
    known yet, and closes them once it is encoded, so that their memory is free while images are made. lora_folder:
    where LoRAs are found by name; without it requests give paths. embeddings: (word or `None`, path) for
    `load_embedding`. swappable: engines whose weights `load_weights` replaces, where the backend can build such.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        backend: str = "auto",
        device: str | Device | None = None,
        mode: str | None = None,
        graphs: bool | None = None,
        graphs_kept: int = 8,
        size: tuple[int, int] | None = None,
        batch: int = 1,
        store: Store | None = None,
        build: str = "if_missing",
        threads: int = 0,
        most_contexts: int = 4,
        vae_tiling: str | bool = "auto",
        vae_slicing: str | bool = "auto",
        keep_text_encoders: bool = True,
        lora_folder: str | os.PathLike[str] | None = None,
        embeddings: Sequence[tuple[str | None, str | os.PathLike[str]]] = (),
        swappable: bool = False,
        engine_options: Mapping[str, Any] | None = None,
        progress: Callable[[str, str, float], None] | None = None,
    ) -> None:
        if mode not in (None, *MODES):
            raise ArgumentError(f"mode is {mode!r}", expected=f"one of {', '.join(MODES)}")
        self._given = {k: v for k, v in locals().items() if k not in ("self", "bundle")}
        self.bundle, self.threads = bundle, threads
        offer_backend(backend)
        self.device = open_device(device, backend=backend, graphs=graphs, graphs_kept=graphs_kept)
        self.mode = mode or ("latency" if self.device.whole_requests else "shared")
        self._warned: set[str] = set()
        self.batch = check_integer("batch", batch, 1, MOST_IMAGES)
        check_flag("swappable", swappable)
        run = self.device.run_options(RunOptions(threads=threads))
        options: dict[str, Any] = {
            "backend": backend,
            "run": replace(run, **(engine_options or {})),
            "store": store,
            "build": build,
            "progress": progress,
            "options": BuildOptions(refittable=True) if swappable else None,
        }
        self._base = bundle
        self._requests = InFlight()
        self._closed = False
        self.size = check_size(bundle, size or (bundle.defaults.width, bundle.defaults.height))
        self._opened = OpenedEngines(bundle, self.device, self._dims, options)
        self.adapted = self._opened.adapted
        encoders, decoders = list(bundle.text_encoders), [d for d in DECODERS.values() if d in bundle.components]
        self._on_device = self._opened.open([*(encoders if keep_text_encoders else ()), "unet", *decoders])
        check_engine(self._on_device["unet"], self.device)
        self.engines = {n: e if n == "unet" else self.device.on_host(e) for n, e in self._on_device.items()}
        self.loras = LoraLibrary(bundle, None if lora_folder is None else Path(lora_folder))
        self._embeddings: list[tuple[str | None, Path]] = []
        self.text = TextEncoders(
            bundle,
            self.engines if keep_text_encoders else lambda: self._opened.open_on_host(encoders, keep=False),
            keep_engines=keep_text_encoders,
            changes=self.loras.changes,
            adapt=self.adapted.of,
        )
        self.vae = Vae(
            bundle,
            self.engines["vae_decoder"],
            lambda: self._opened.open_on_host(["vae_encoder"])["vae_encoder"],
            tiny=self.engines.get(TINY_DECODER),
            tiling=vae_tiling,
            slicing=vae_slicing,
        )
        for word, path in embeddings:
            self.load_embedding(path, word)
        self.image_prompts = ImagePrompts(lambda: self._opened.open_on_host([IMAGE_ENCODER])[IMAGE_ENCODER])
        self._pool = SlotPool(self.make_slots, keep=check_integer("most_contexts", most_contexts, 0, 1024))

    def load_embedding(self, path: str | os.PathLike[str], name: str | None = None) -> tuple[str, ...]:
        """Teach the text encoders a word from a file of textual inversion; returns all words that they were taught.

        path: a .safetensors file, or a folder of one. name: the word, where it is not the file's own. A word of several
        vectors is written once in a prompt. Raises `ArgumentError`, `CorruptError`, `MissingError`, `UnsafeFileError`.
        """
        words = self.text.learn([*self._embeddings, embedding_file(name, Path(path))])
        self._embeddings.append((name, Path(path)))
        return words

    def unload_embeddings(self) -> None:
        """Forget every word that was taught."""
        self.text.learn([])
        self._embeddings.clear()

    def reopened(self, bundle: Bundle | None = None, *, device: str | None = None) -> Pipeline:
        """Another pipeline with the same options, of another bundle or on another device."""
        moved = {} if device is None else {"device": device}
        return Pipeline(self._base if bundle is None else bundle, **{**self._given, **moved})

    def load_weights(
        self,
        bundle: Bundle | str | os.PathLike[str] | None = None,
        *,
        loras: Mapping[str, Any] | str | os.PathLike[str] | None = None,
        gate: bool = True,
    ) -> dict[str, float]:
        """Replace the weights where they lie, for all requests from then on: no trace, no build.

        bundle: another one of the same architecture, whose scheduler and defaults then are the pipeline's too; `None`:
        its own. loras: to merge, by name or path with scales, of any kind: always into the bundle's own weights,
        so that calls do not add up, and `load_weights()` gives back what was loaded. Waits for requests that are being
        made; those that come meanwhile wait. With `gate` another bundle's weights are compared with its reference, and
        on a failure the former ones are put back. Returns the milliseconds of each component that changed.

        Raises `MismatchError` for another architecture, `UnsupportedError` for engines that cannot (`swappable`), and
        `GateError`; nothing has changed then.
        """
        other = None if bundle is None else open_bundle(bundle)
        (uses,) = read_loras(loras, 1)
        fusion, files = self.loras.fusion(uses), [self.loras.find(n) for n, _, _ in uses]
        with self._requests.change():
            took, self.bundle = self._opened.swap(other, uses, files, fusion, gate=gate)
            self.text.forget()
        return took

    def _dims(self, name: str) -> dict[str, int]:
        """The sizes an engine is opened for; an engine with dynamic shapes takes others too."""
        single = {"batch": 1} if name == IMAGE_ENCODER else {}  # pictures come one by one as prompts
        return dims_for(self.bundle, self.size, self.batch) | single

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self.engines['unet'].backend} on {self.device.name}"
        return f"<Pipeline {self.bundle.name!r}: {self.size[0]}x{self.size[1]}, {state}>"

    def close(self) -> None:
        """Let go of engines, buffers and recordings, once the requests that are being made are done; then none is.

        Raises `ArgumentError` where this thread itself has begun a request and not ended it.
        """
        if self._closed:
            return
        with self._requests.change():
            self._closed = True
            for name in RELEASED:
                self.__dict__.pop(name, None)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            if name in RELEASED and self.__dict__.get("_closed"):
                raise UnavailableError("the pipeline is closed", remedy="Load it again.")
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def run(
        self,
        request: Request,
        *,
        cancel: threading.Event | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> Result:
        """Make a request's images; as a call, for a request that was made before."""
        return follow(self.stream(request), on_step, [cancel])

    @takes_a_call
    def request(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        sizes: Sequence[tuple[int, int]] | None = None,
        **given: Unpack[CallArguments],
    ) -> Request:
        """A checked `Request` for this bundle; takes what a call takes, pictures included.

        sizes: those (width, height) that may be made, where not any may; checked before a picture is fitted.
        """
        loras = self.loras
        make = make_clip_request if self.bundle.model.clips else make_request
        request = make(self.bundle, prompt, default_size=self.size, sizes=sizes, **given)
        for warning in set(request.warnings) - self._warned:
            log.warning("%s", warning)
        self._warned.update(request.warnings)
        for asked in set(request.wording.loras):
            loras.changes(asked)  # what is missing or damaged is told before anything is computed
        return request

    def stream(self, request: Request, *, previews: bool = False) -> Generator[Step, None, Result]:
        """A generator of `Step`s that returns the `Result`; closing it ends the request between two evaluations.

        In latency mode without previews the only step comes when all is done.
        """
        began = time.perf_counter()
        with self._requests.request():
            prepared = self.prepare(request)
            part = yield from self.make(prepared, previews=previews)
            with self._memory_told(request, request.images):
                return make_result(self.bundle, prepared, [part], total_ms=_since(began))

    def prepare(self, request: Request) -> Prepared:
        """The request with prompts and picture encoded and noise drawn, ready for slots."""
        with self._memory_told(request, request.images), self._own_size_explained(request):
            if request.clip is not None:
                return prepare_clips(self.bundle, self.vae, self.image_prompts, request)
            prepared = prepare(self.bundle, self.text, self.vae, self.image_prompts, request, self.loras)
            changes = [s.conditioning.change for s in prepared.samplings if s.conditioning.change is not None]
            if changes:
                self.adapted.of("unet", any(c.kernels for c in changes))  # no tick waits for an engine that is opened
            return prepared

    def make(self, prepared: Prepared, *, previews: bool = False) -> Generator[Step, None, ResultPart]:
        """The pictures of a prepared request, or of a part of one, step by step or as one piece of work."""
        images, request = len(prepared.samplings), prepared.request
        with self._memory_told(request, images), self._own_size_explained(request):
            return (yield from self._make(prepared, previews=previews))

    @contextmanager
    def _memory_told(self, request: Request, images: int) -> Iterator[None]:
        """Turn a failed allocation within into `OutOfMemoryError` that says what would fit."""
        doing = f"{images} image{'s' * (images > 1)} of {request.width}x{request.height}"
        try:
            with self.device.guard_memory(doing):
                yield
        except (OutOfMemoryError, MemoryError) as error:
            found = error.found if isinstance(error, OutOfMemoryError) else "memory does not suffice"
            raise OutOfMemoryError(
                found if doing in found else f"{found}, of {doing}",
                expected=self._would_fit((request.width, request.height), images),
                remedy="Ask for fewer images or a smaller size at once; `fewstep memory BUNDLE` says what fits.",
            ) from error

    @contextmanager
    def _own_size_explained(self, request: Request) -> Iterator[None]:
        """Where engines do not admit the size of a picture that was given without one, say that it is the picture's."""
        try:
            yield
        except MismatchError as error:
            if not request.own_size:
                raise
            factor, backend = self.bundle.latent.factor, self.engines["unet"].backend
            dims = {"height": request.height // factor, "width": request.width // factor}
            raise MismatchError(
                f"the own size of the picture, as none is asked for, is {request.width}x{request.height}, "
                f"and {error.found}",
                expected=error.expected,
                remedy=f"Pass a size to fit it to, or build for its own: {command(self.bundle, backend, dims)}",
            ) from error

    def _make(self, prepared: Prepared, *, previews: bool) -> Generator[Step, None, ResultPart]:
        began, program, terms = time.perf_counter(), prepared.request.program, prepared.request.clip
        chunk = None if terms is None else terms.chunk
        latents, decoded, ticks = np.empty_like(prepared.gaussians), None, TickTimes()
        with self._admitted(prepared) as (slots, admitted):
            if self.mode == "latency" and not previews and self._is_whole(slots, admitted):
                decoded = slots.run(admitted, self._on_device[DECODERS[prepared.request.decoder]])
                latents = decoded.latents
            else:
                for i in range(program.evaluations):
                    x0 = np.empty_like(latents) if previews else None
                    slots.tick(admitted, None if x0 is None else dict(zip(admitted, x0, strict=True)))
                    reading = StepLatents(lambda: np.stack([slots.latent(slot) for slot in admitted]))
                    try:
                        yield self._step(program, i, x0, reading, chunk)
                    finally:
                        reading.end()
                for slot, into in zip(admitted, latents, strict=True):
                    slots.result(slot, into)
                ticks = slots.take_times()
        denoised = time.perf_counter()
        if decoded is not None:
            check_images(decoded.images, decoded.finite)
            yield self._step(program, program.evaluations - 1, None, lambda: latents, chunk)
        return ResultPart(
            device=self.device.name,
            images=self.vae.decode(latents, chunk, prepared.request.decoder) if decoded is None else decoded.images,
            latents=latents,
            denoise_ms=1e3 * (denoised - began),
            decode_ms=_since(denoised) if decoded is None else 0.0,
            ticks=ticks,
            tensor=None if decoded is None else decoded.tensor,
        )

    def _is_whole(self, slots: Slots, admitted: Sequence[int]) -> bool:
        """Whether one evaluation and one pass of the decoder take these slots, and all are told the same throughout."""
        if any(slots.sampling(s).conditioning.later for s in admitted):
            return False
        return len(slots.share(admitted)) == 1 and self.vae.in_one_pass(len(admitted), *slots.shape[-2:])

    def _step(
        self,
        program: Program,
        index: int,
        x0: Float32 | None,
        latents: Callable[[], Float32],
        chunk: int | None,
    ) -> Step:
        return Step(
            index=index,
            total=program.evaluations,
            timestep=float(program.timesteps[index]),
            x0=x0,
            _latents=latents,
            _decode=partial(self.vae.preview, chunk=chunk),
        )

    @contextmanager
    def _admitted(self, prepared: Prepared) -> Iterator[tuple[Slots, list[int]]]:
        """Slots from the pool with a request's images in them; they are left as they were."""
        with self._pool.take(prepared.shape, len(prepared.samplings)) as slots:
            admitted: list[int] = []
            try:
                for i, sampling in enumerate(prepared.samplings):
                    latent = None if prepared.latents is None else prepared.latents[i]
                    admitted.append(slots.admit(sampling, prepared.gaussians[i], latent))
                yield slots, admitted
            finally:
                for slot in admitted:
                    slots.release(slot)

    def make_slots(
        self, shape: Shape, count: int, *, split: Callable[[Engine], Engine] = lambda engine: engine
    ) -> Slots:
        """Slots of a latent shape on this pipeline's device, for callers that tick themselves.

        split: makes of an engine what the slots evaluate, the same for the same engine.
        """

        def adapt(kernels: bool) -> Adapted:
            adapted = self.adapted.of("unet", kernels)
            return replace(adapted, engine=split(adapted.engine))

        slots = self.device.make_slots(split(self.engines["unet"]), shape, count)
        slots.adapt = adapt
        return slots

    @property
    def memory_bytes(self) -> int:
        """Memory of the sets of slots that are kept, with what they recorded; the engines' weights apart."""
        return sum(s.bytes for s in self._pool.kept())

    @property
    def graph_counts(self) -> Mapping[str, int]:
        """Captures, replays, failures, evictions and invalidations so far, over the sets of slots that are kept."""
        sets = self._pool.kept()
        return {name: sum(s.recordings[name] for s in sets) for name in RECORDINGS}

    def warm_up(
        self,
        *,
        size: tuple[int, int] | None = None,
        batch: int | None = None,
        image: bool = False,
        steps: Sequence[int] | None = None,
    ) -> None:
        """Run requests of this shape once, with guidance and without, so that no later one pays for first-time work.

        `image` opens the VAE's encoder too, for services that start from pictures. Where whole requests are recorded,
        they are for so many steps (`None`: the bundle's own).
        """
        images = self.batch if batch is None else check_integer("batch", batch, 1, MOST_IMAGES)
        recorded = self.mode == "latency" and self.device.records
        whole = ((self.bundle.defaults.steps,) if steps is None else steps) if recorded else ()
        pixels = check_size(self.bundle, size or self.size)
        for call in warm_up_calls(self.bundle, pixels, images, image=image, whole=whole):
            self.text.forget()
            with suppress(BlackImageError, NonFiniteError):  # one step of a nonsense prompt may well be black
                self(**call)
        self.text.forget()

    def _would_fit(self, size: tuple[int, int], images: int) -> str:
        """How many images of this size the free memory takes, in words."""
        free, on_cpu = self.device.free_bytes() or 0, self.device.engines == "cpu"
        most = min(largest_batch(self.bundle, size, free_bytes=free, loaded=True, on_cpu=on_cpu), images - 1)
        if most < 1:
            return "a smaller size"
        return f"at most about {most} image{'s' * (most > 1)} of {size[0]}x{size[1]} at once"


def _since(began: float) -> float:
    return 1e3 * (time.perf_counter() - began)
