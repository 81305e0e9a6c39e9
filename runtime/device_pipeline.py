"""A pipeline whose slots lie on a device: whole requests as one piece of work, or ticks that share evaluations.

Text encoders and the VAE's encoder are fed from the host; the UNet and, for whole requests, the VAE's decoder work on
device memory throughout. It is run on CPU tensors in the tests, not on a GPU.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from ..bundle import Bundle
from ..engines.base import Binding, Engine, TensorSpec
from ..errors import (
    ArgumentError,
    BlackImageError,
    MismatchError,
    MissingError,
    NonFiniteError,
    OutOfMemoryError,
)
from .device.cuda_graphs import CudaRunner, GraphCache, TapeRunner
from .device.memory import as_tensor, guard_memory
from .device.pool import SlotPool
from .device.torch_slots import DeviceSlots
from .device.torch_tables import share_evaluations
from .pictures.vae import MOST_PIXELS, check_images
from .pipeline import Pipeline
from .prepare import Prepared
from .result import Result, Step

MODES = ("latency", "shared")
MOST_ROWS = 64
"""Rows of one evaluation; requests of more are done in ticks of several."""
CHECK_DEVICE = "cpu:torch"
"""The device's own code on CPU tensors: slower than the NumPy device, and there to be compared with it."""


class HostEngine:
    """An engine on a device whose bindings have NumPy buffers: copied there before a run, and back after it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.backend, self.device, self.capture = engine.backend, "cpu", "none"
        self.inputs: Mapping[str, TensorSpec] = engine.inputs
        self.outputs: Mapping[str, TensorSpec] = engine.outputs

    def bind(self, dims: Mapping[str, int]) -> HostBinding:
        return HostBinding(self._engine.bind(dims))


class HostBinding:
    """NumPy buffers in front of a binding's own. `enqueue` returns when the outputs are there."""

    def __init__(self, binding: Binding) -> None:
        self._binding = binding
        self._given = {n: as_tensor(b) for n, b in binding.inputs.items()}
        self._made = {n: as_tensor(b) for n, b in binding.outputs.items()}
        self.inputs: Mapping[str, Any] = {n: t.cpu().numpy().copy() for n, t in self._given.items()}
        self.outputs: Mapping[str, Any] = {n: t.cpu().numpy().copy() for n, t in self._made.items()}

    def enqueue(self, stream: int | None = None) -> None:
        for name, tensor in self._given.items():
            tensor.copy_(torch.from_numpy(self.inputs[name]))
        self._binding.enqueue(stream)
        for name, tensor in self._made.items():
            np.copyto(self.outputs[name], tensor.cpu().numpy())


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What a device made of a request's images: pictures, latents, milliseconds, and the pictures where they lie."""

    images: Any
    latents: Any
    tensor: torch.Tensor | None
    denoise_ms: float
    decode_ms: float


class DevicePipeline(Pipeline):
    """A bundle on a device, called as `Pipeline` is.

    device: `"cuda"`, `"cuda:1"`, or `"cpu:torch"` for the same code on CPU tensors. mode: `"latency"` does a whole
    request as one piece of work, without progress, previews or cancelling in between; `"shared"` ticks. graphs:
    capture that work (`None`: on CUDA); `graphs_kept` recordings a set of slots. engine_options: fields of `RunOptions`
    (`compile`, `cuda_graph`, ...). Other options are those of `Pipeline`.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: str = "cuda",
        mode: str = "latency",
        graphs: bool | None = None,
        graphs_kept: int = 8,
        most_contexts: int = 4,
        engine_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if mode not in MODES:
            raise ArgumentError(f"mode is {mode!r}", expected=f"one of {', '.join(MODES)}")
        self.place, self.mode = open_device(device), mode
        self._captures = self.place.type == "cuda" if graphs is None else graphs
        self._graphs_kept, self._engine_options = graphs_kept, dict(engine_options or {})
        self._on_device: dict[str, Engine] = {}
        super().__init__(bundle, most_contexts=most_contexts, **options)
        self._check_engines()
        self._pool = SlotPool(self.engines["unet"], keep=most_contexts, make=self._make_slots)

    @property
    def memory_bytes(self) -> int:
        """Device memory of the sets of slots that are kept, with their graphs; the engines' weights apart."""
        return sum(s.bytes for s in self._pool.kept() if isinstance(s, DeviceSlots))

    @property
    def graph_counts(self) -> dict[str, int]:
        """Captures, replays, failures, evictions and invalidations so far, over the sets of slots that are kept."""
        names = ("captures", "replays", "failures", "evictions", "invalidations")
        caches = [s.graphs for s in self._pool.kept() if isinstance(s, DeviceSlots) and s.graphs is not None]
        return {n: sum(getattr(c, n) for c in caches) for n in names}

    def _stream(self, prepared: Prepared, began: float, *, previews: bool) -> Generator[Step, None, Result]:
        """As `Pipeline.stream`. In latency mode without previews the only step comes when all is done."""
        if self.mode == "shared" or previews or not self.is_whole(prepared):
            return (yield from super()._stream(prepared, began, previews=previews))
        made = self.make(prepared)
        program = prepared.request.program
        last = program.evaluations - 1
        yield Step(index=last, total=last + 1, timestep=float(program.timesteps[last]))
        return self.result(prepared, made, began)

    def make(self, prepared: Prepared) -> Made:
        """The pictures of a prepared request, or of a part of one, as one piece of work.

        Raises `OutOfMemoryError` with the number of images that would fit, `NonFiniteError`, `BlackImageError`.
        """
        count, request = len(prepared.tenants), prepared.request
        doing = f"{count} image{'s' * (count > 1)} of {request.width}x{request.height}"
        try:
            with guard_memory(self.place, doing):
                return self._make(prepared)
        except OutOfMemoryError as error:
            fits = self._would_fit((request.width, request.height), count)
            raise OutOfMemoryError(error.found, expected=fits, remedy=error.remedy) from error

    def _make(self, prepared: Prepared) -> Made:
        started = time.perf_counter()
        with self._pool.take(prepared.shape, len(prepared.tenants)) as slots:
            held: list[int] = []
            try:
                for i, tenant in enumerate(prepared.tenants):
                    latent = None if prepared.latents is None else prepared.latents[i]
                    held.append(slots.admit(tenant, prepared.gaussians[i], latent))
                binding = slots.decoder(self._on_device["vae_decoder"])
                finite = slots.run(held, binding)
                slots.wait()
                tensor = as_tensor(binding.outputs["image"]).clone()
                images, flags = tensor.cpu().numpy(), as_tensor(binding.outputs["finite"]).cpu().numpy()
                check_images(images, flags & finite.cpu().numpy())
                latents = as_tensor(binding.inputs["latent"]).cpu().numpy().copy()
            finally:
                for slot in held:
                    slots.release(slot)
        spent = 1e3 * (time.perf_counter() - started)
        return Made(images=images, latents=latents, tensor=tensor, denoise_ms=spent, decode_ms=0.0)

    def result(self, prepared: Prepared, made: Made, began: float) -> Result:
        """What a call gives back. `denoise` is the whole request, decoding included: it is one piece of work."""
        timings = {
            "text": prepared.text_ms,
            "encode_image": prepared.encode_image_ms,
            "denoise": made.denoise_ms,
            "decode": made.decode_ms,
            "total": 1e3 * (time.perf_counter() - began),
            "evaluations": [],
            "update": 0.0,
            "guidance": 0.0,
            "gather": 0.0,
        }
        return Result(
            images=made.images,
            seeds=prepared.request.seeds,
            timings=timings,
            latents=made.latents,
            parameters=self.parameters(prepared.request),
            truncated=prepared.truncated,
            tensor=made.tensor,
        )

    def _open(self, names: Sequence[str]) -> dict[str, Any]:
        """Engines on this device; those that are fed from the host get NumPy buffers."""
        run = self._options["run"]
        kind = "cuda" if self.place.type == "cuda" else "cpu"
        self._options["run"] = dataclasses.replace(
            run, device=self.place.index or 0, torch_device=kind, **self._engine_options
        )
        with guard_memory(self.place, "the engines"):
            opened = super()._open(names)
        self._on_device.update(opened)
        return {n: e if n == "unet" or e.device == "cpu" else HostEngine(e) for n, e in opened.items()}

    def _check_engines(self) -> None:
        found = self.engines["unet"]
        wanted = "cuda" if self.place.type == "cuda" else "cpu"
        if found.device != wanted:
            raise MismatchError(
                f"the backend {found.backend!r} runs on {found.device}",
                expected=f"a backend for {self.place}",
                remedy="Name another backend, or leave the device out.",
            )

    def _make_slots(self, shape: tuple[int, int, int], count: int) -> Any:
        graphs = None
        if self._captures and self.engines["unet"].capture == "whole_request":
            runner = CudaRunner(self.place) if self.place.type == "cuda" else TapeRunner()
            graphs = GraphCache(runner, most=self._graphs_kept)
        return DeviceSlots(
            self.engines["unet"], slots=count, shape=shape, device=self.place, most_rows=MOST_ROWS, graphs=graphs
        )

    def is_whole(self, prepared: Prepared) -> bool:
        """Whether a request is done as one piece of work: by the mode, and if an evaluation and a decoding take it."""
        if self.mode != "latency":
            return False
        count, request = len(prepared.tenants), prepared.request
        shared = share_evaluations(dict(enumerate(prepared.tenants)), MOST_ROWS)
        return len(shared) == 1 and (count == 1 or count * request.width * request.height <= MOST_PIXELS)

    def warm_up(
        self,
        *,
        size: tuple[int, int] | None = None,
        batch: int | None = None,
        image: bool = False,
        steps: Sequence[int] | None = None,
    ) -> None:
        """See `Pipeline.warm_up`. Recordings are made for requests of so many steps (`None`: the bundle's own)."""
        super().warm_up(size=size, batch=batch, image=image)
        if self.mode != "latency" or not self._captures:
            return
        count = batch or self.batch
        for number in (self.bundle.defaults.steps,) if steps is None else steps:
            with suppress(BlackImageError, NonFiniteError):
                self([f"warm-up {i}" for i in range(count)], steps=number, seed=list(range(count)), size=size)
        self.text.forget()

    def _would_fit(self, size: tuple[int, int], count: int) -> str:
        """How many images of this size the free memory takes, in words."""
        from ..engines.memory import largest_batch
        from ..engines.plan import available_memory

        on_cuda = self.place.type == "cuda"
        free = int(torch.cuda.mem_get_info(self.place)[0]) if on_cuda else available_memory() or 0
        most = min(largest_batch(self.bundle, size, free_bytes=free, loaded=True, on_cpu=not on_cuda), count - 1)
        if most < 1:
            return "a smaller size"
        return f"at most about {most} image{'s' * (most > 1)} of {size[0]}x{size[1]} at once"


def open_device(name: str) -> torch.device:
    """The torch device of a name; `ArgumentError` for another name, `MissingError` for a device that is not there."""
    if name == CHECK_DEVICE:
        return torch.device("cpu")
    kind, _, index = name.partition(":")
    if kind != "cuda" or (index and not index.isdigit()):
        raise ArgumentError(f"device is {name!r}", expected=f"cpu, cuda, cuda:<index> or {CHECK_DEVICE}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= count:
        raise MissingError(
            f"torch sees {count or 'no'} CUDA device{'' if count == 1 else 's'}",
            expected=f"one for {name!r}",
            remedy="Use device='cpu' on this machine." if not count else "Use a smaller index.",
        )
    return torch.device("cuda", int(index or 0))
