"""Slots on a torch device: all that a tick needs lies in device memory that never moves, the host writes small tables.

A tick is one list of tensor operations: gather the rows of the slots by index tables, evaluate the UNet, add each
slot's rows by their weights (guidance is a weight), move each slot on by the coefficients at its own position in its
own program. It reads nothing on the host, so it can be captured: alone for shared batches, or n times and with the VAE
behind it for a whole request.

The same class runs on CPU tensors, which is how the tests compare it with the NumPy slots; it is not run on a GPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import numpy as np
import torch

from ...engines import Engine
from ...engines.streams import take_stream
from ...schedules import Program
from ..arrays import Float32, Shape
from ..conditioning import conditioning_inputs
from .base import MOST_HISTORY, MOST_ROWS, RECORDINGS, Decoded, Sampling, Slots, TickTimes, unet_dims
from .clock import DeviceClock
from .cuda_graphs import GraphCache, GraphKey
from .memory import guard_memory
from .torch_decoder import Decoder
from .torch_factors import StepFactors
from .torch_tables import Batch, DeviceCopies
from .torch_update import Extras, TorchSlotState


class TorchSlots(Slots):
    """Slots as tensors of a torch device; see `Slots`.

    longest_program, draws: how long programs may be and how often they may draw; more is made room for when an image
    needs it, at the price of a move and of the captured graphs. graphs: where captured work is kept (`None`: all of it
    runs eagerly). fused: the update in kernels of Triton (`None`: on CUDA, where Triton is installed). On CUDA every
    instance works on a stream of its own.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        slots: int,
        shape: Shape,
        device: str | torch.device = "cuda",
        most_rows: int = MOST_ROWS,
        longest_program: int = 64,
        draws: int = 4,
        graphs: GraphCache | None = None,
        fused: bool | None = None,
    ) -> None:
        super().__init__(engine, slots=slots, shape=shape, most_rows=most_rows)
        self.device = torch.device(device)
        self.graphs = graphs
        self._stream = take_stream(torch, self.device.index or 0) if self.device.type == "cuda" else None
        self._batches: dict[tuple[int, ...], Batch] = {}
        with self._here():
            self._values = state_class(self.device, fused)(
                slots + 1,  # one slot more than there are: padding goes there
                shape,
                MOST_HISTORY,
                longest_program=longest_program,
                max_draws=max(1, draws),
                device=self.device,
            )
            names = list(conditioning_inputs(engine.inputs))
            self._factors = StepFactors(names, slots + 1, longest_program, self.device)
        self._copies = DeviceCopies(self.device)
        self._decoders: dict[int, Decoder] = {}
        self._clock = DeviceClock(self.device)

    @property
    def bytes(self) -> int:
        batches = sum(b.bytes for b in self._batches.values())
        tables = self._values.bytes + self._factors.bytes
        return tables + self._copies.bytes + batches + (self.graphs.bytes if self.graphs else 0)

    @property
    def recordings(self) -> Mapping[str, int]:
        return {n: 0 if self.graphs is None else getattr(self.graphs, n) for n in RECORDINGS}

    def take_times(self) -> TickTimes:
        times = self._clock.read()
        self._clock.reset()
        return times

    def wait(self) -> None:
        """Wait for all that was enqueued."""
        if self._stream is not None:
            self._stream.synchronize()

    def _place(self, slot: int, sampling: Sampling, start: Float32) -> None:
        """All of an image is uploaded before its first evaluation, so that no later tick takes anything from the host
        but who takes part."""
        program = sampling.program
        draws = [sampling.noise.randn(self.shape) for _ in range(int(np.count_nonzero(program.draws)))]
        with self._here():
            self._reserve(program.evaluations, len(draws))
            self._values.load(slot, program, start, draws, sampling.blend)
            self._factors.load(slot, sampling.conditioning.steps)

    def _clear(self, slot: int) -> None:
        with self._here():
            self._values.wipe(slot)
            self._factors.wipe(slot)

    def _finish(self, slot: int, program: Program, into: Float32) -> None:
        self._read(slot, into)
        into *= np.float32(program.state_scale[-1])

    def _state(self, slot: int) -> Float32:
        state = np.empty(self.shape, np.float32)
        self._read(slot, state)
        return state

    def _read(self, slot: int, into: Float32) -> None:
        with self._here():
            self._values.flush()
            np.copyto(into, self._values.latent[slot].cpu().numpy())

    def _evaluate(self, slots: list[int], tokens: int, rows: int, previews: Mapping[int, Float32]) -> None:
        with self._here():
            extras, stepped = self._extras(slots, previews=bool(previews)), self._stepped(slots)
            batch = self._batch(slots, tokens, rows, stepped)

            def body() -> None:
                self._tick(batch, extras, stepped)

            self._do("tick", batch, 1, body, extras, stepped)
            for i, slot in enumerate(slots):
                if slot in previews:
                    np.copyto(previews[slot], batch.x0[i].cpu().numpy())

    def _run(self, slots: list[int], tokens: int, evaluations: int, decoder: Engine) -> Decoded:
        """On CUDA nobody waits before all of it is enqueued, what is read back among it."""
        with self._here():
            extras, stepped = self._extras(slots), self._stepped(slots)
            batch = self._batch(slots, tokens, 0, stepped)
            decoding = self._bind_decoder(decoder, len(slots))

            def body() -> None:
                for _ in range(evaluations):
                    self._tick(batch, extras, stepped)
                decoding.run(self._values.finish(batch.slots))

            capturable = decoder.capture == "whole_request"
            owners = (decoding.binding,)
            self._do("request", batch, evaluations, body, extras, stepped, owners, capturable=capturable)
            tensor = decoding.image.clone()
        self.wait()
        return decoding.taken(tensor)

    def _bind_decoder(self, decoder: Engine, images: int) -> Decoder:
        """The binding of a decoder, made once for each: recorded work holds its buffers."""
        known = self._decoders.get(id(decoder))
        if known is None or not known.serves(decoder, images):
            with guard_memory(self.device, f"decoding {images} images"):
                known = self._decoders[id(decoder)] = Decoder(decoder, images, self._sides)
        return known

    def _do(
        self,
        kind: str,
        batch: Batch,
        evaluations: int,
        body: Callable[[], None],
        extras: Extras,
        stepped: tuple[str, ...],
        owners: tuple[object, ...] = (),
        *,
        capturable: bool = True,
    ) -> None:
        """Run work eagerly, or captured where there is a cache and the engines admit a caller's graph."""
        if self.graphs is None or not capturable or batch.evaluator.engine.capture != "whole_request":
            with torch.no_grad(), guard_memory(self.device, f"a {kind}"):
                body()
            return
        owners = (batch.binding, *owners)
        key = GraphKey(
            kind=kind,
            shape=self.shape,
            slots=batch.count,
            rows=batch.rows,
            tokens=batch.tokens,
            evaluations=evaluations,
            engines=(id(batch.evaluator.engine), *(id(o) for o in owners)),
            extras=extras,
            stepped=stepped,
        )
        own = (self._factors.block, *(batch.unscaled(n) for n in stepped)) if stepped else ()
        buffers = (*self._values.buffers, *batch.tensors, *own)
        self._clock.suspend()
        try:
            with torch.no_grad(), guard_memory(self.device, f"a {kind}"):
                state = self._values.tensors
                self.graphs.run(key, body, owners=(batch.evaluator.engine, *owners), buffers=buffers, restore=state)
        finally:
            self._clock.resume(evaluations)

    def _tick(self, batch: Batch, extras: Extras, stepped: tuple[str, ...]) -> None:
        """One evaluation of a batch: nothing here depends on what the tensors hold."""
        values, clock = self._values, self._clock
        clock.mark("gather")
        values.model_input(batch.slot_of_row, batch.sample, batch.timestep)  # by row
        self._factors.apply(batch, values.position, stepped)
        clock.mark("evaluations")
        batch.binding.enqueue()  # out = unet(in_i, t_i, conditioning)
        clock.mark("update")
        told = (batch.out, batch.rows_of, batch.weights, batch.slots)
        values.step(*told, x0=batch.x0, extras=extras, variance=batch.variance)
        clock.mark("")

    def _extras(self, slots: list[int], *, previews: bool = False) -> Extras:
        samplings = [self.sampling(s) for s in slots]
        return Extras(
            previews=previews,
            blends=any(s.blend is not None for s in samplings),
            clips=any(s.program.clip is not None for s in samplings),
            thresholds=any(s.program.clip is not None and s.program.clip.bound.ratio is not None for s in samplings),
            spreads=any(s.program.spread is not None for s in samplings),
        )

    def _stepped(self, slots: list[int]) -> tuple[str, ...]:
        """The inputs of which any of these slots has factors by step."""
        return tuple(sorted({n for s in slots for n in self.sampling(s).conditioning.steps}))

    def _batch(self, slots: list[int], tokens: int, least_rows: int, stepped: tuple[str, ...]) -> Batch:
        """The buffers of an evaluation of so many slots and rows, its tables saying which these are."""
        samplings = [self.sampling(s) for s in slots]
        rows = max(least_rows, sum(s.rows for s in samplings))
        evaluator = self._evaluator(samplings)
        key = (len(slots), rows, tokens, *evaluator.key)
        if key not in self._batches:
            with guard_memory(self.device, f"an evaluation of {rows} rows"):
                binding = evaluator.engine.bind(unet_dims(self.shape, rows, tokens, evaluator.rank))
                sizes = len(slots), rows, tokens, self.shape
                self._batches[key] = Batch(evaluator, binding, *sizes, self.device, lead=self._lead)
        batch = self._batches[key]
        self._values.flush()
        self._factors.flush()
        batch.point(slots, samplings, scrap=self.count)
        batch.tell(samplings, self._copies, stepped)
        return batch

    def _reserve(self, evaluations: int, draws: int) -> None:
        """Make room for a longer program; every captured graph goes, since the buffers move."""
        values = self._values
        if evaluations <= values.longest_program and draws <= values.max_draws:
            return
        self._values = values.grown(
            _power(max(evaluations, values.longest_program)), _power(max(draws, values.max_draws))
        )
        self._factors = self._factors.grown(self._values.longest_program)
        if self.graphs is not None:
            self.graphs.clear()

    @contextmanager
    def _here(self) -> Iterator[None]:
        """On this instance's stream and device."""
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            yield


def state_class(device: torch.device, fused: bool | None) -> type[TorchSlotState]:
    """The state of slots: its update in kernels of Triton, or in torch's operations."""
    if fused is None:
        fused = device.type == "cuda" and importlib.util.find_spec("triton") is not None
    if not fused:
        return TorchSlotState
    from .triton_state import TritonSlotState

    return TritonSlotState


def _power(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()
