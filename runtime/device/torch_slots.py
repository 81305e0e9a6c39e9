"""Slots on a device: all that a tick needs lies in device memory that never moves, and the host writes small tables.

A tick is one list of tensor operations: gather the rows of the slots by index tables, evaluate the UNet, add each
slot's rows by their weights (guidance is a weight), apply each slot's own row of its own program. It reads nothing on
the host, so it can be captured: alone for shared batches, or n times and with the VAE behind it for a whole request.

The same class runs on CPU tensors, which is how the tests compare it with the NumPy slots; it is not run on a GPU.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

from ...engines.base import Binding, Engine
from ...errors import ArgumentError, NonFiniteError, UnsupportedError
from .clock import DeviceClock
from .cuda_graphs import GraphCache, GraphKey
from .memory import as_tensor, guard_memory, upload
from .numpy_slots import MOST_HISTORY, Float32, Tenant, TickTimes
from .torch_tables import Bucket, Conditioning, share_evaluations
from .torch_update import CudaSlotState

_KNOWN = {"program", "noise", "row", "positive", "negative", "guidance", "time_ids", "negative_time_ids"}
_KNOWN.add("guidance_vector")
_log = logging.getLogger("fewstep.runtime")


class DeviceSlots:
    """A fixed number of slots of one latent shape on a torch device; what `Slots` offers, and whole requests.

    shape: (C, h, w) of a latent. rows, draws: how long programs may be and how often they may draw; more is made room
    for when a tenant needs it, at the price of a move and of the captured graphs. graphs: where captured work is kept
    (`None`: all of it runs eagerly). Not thread-safe: one thread at a time; on CUDA every instance works on a stream
    of its own.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        slots: int,
        shape: tuple[int, int, int],
        device: str | torch.device = "cuda",
        most_rows: int = 64,
        rows: int = 64,
        draws: int = 4,
        graphs: GraphCache | None = None,
    ) -> None:
        self._engine, self._shape, self._most_rows = engine, shape, max(2, most_rows)
        self.device = torch.device(device)
        self.graphs = graphs
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._tenants: list[Tenant | None] = [None] * slots
        self._buckets: dict[tuple[int, int, int], Bucket] = {}
        with self._here():
            self._state = CudaSlotState(
                slots + 1, shape, MOST_HISTORY, max_rows=rows, max_draws=max(1, draws), device=self.device
            )  # one slot more than there are: padding goes there
        self._conditioning: dict[int, Conditioning] = {}
        self._decoder: tuple[Engine, Binding] | None = None
        self.clock = DeviceClock(self.device)

    @property
    def count(self) -> int:
        return len(self._tenants)

    @property
    def free(self) -> list[int]:
        return [i for i, t in enumerate(self._tenants) if t is None]

    @property
    def times(self) -> TickTimes:
        """Milliseconds by stage; on CUDA this waits for the work it tells of."""
        return self.clock.read()

    @times.setter
    def times(self, value: TickTimes) -> None:
        self.clock.reset()

    @property
    def bytes(self) -> int:
        """Device memory of the slots, their tables and their graphs, the engines' buffers apart."""
        held = self._state.bytes + sum(c.bytes for c in self._conditioning.values())
        return held + sum(b.bytes for b in self._buckets.values()) + (self.graphs.bytes if self.graphs else 0)

    def tenant(self, slot: int) -> Tenant:
        found = self._tenants[slot]
        if found is None:
            raise ArgumentError(f"slot {slot} is free", expected="a slot in use")
        return found

    def admit(self, tenant: Tenant, gaussian: Float32, latent: Float32 | None = None) -> int:
        """Put a tenant into a free slot: its program, all of its noise, its embeddings and its starting latent.

        All of it is uploaded here, so that no later tick takes anything but index tables from the host.
        """
        if not self.free:
            raise ArgumentError(f"all {self.count} slots are in use", remedy="Release one first.")
        _check_known(tenant)
        slot, program = self.free[0], tenant.program
        start = program.init_noise * gaussian.astype(np.float64)
        if program.init_latent:
            if latent is None:
                raise ArgumentError("the program starts from a latent and none was given", remedy="Pass an image.")
            start = start + program.init_latent * latent
        draws = int(np.count_nonzero(program.draws))
        with self._here():
            self._reserve(program.evaluations, draws)
            self._state.wipe(slot)
            self._state.load(slot, program)
            if draws and self._state.draws is not None:
                noise = np.stack([tenant.noise.randn(self._shape) for _ in range(draws)])
                upload(self._state.draws[slot, :draws], noise)
            upload(self._state.latent[slot], start.astype(np.float32))
            self._conditioning_for(tenant.tokens).write(slot, tenant)
        self._tenants[slot] = tenant
        return slot

    def release(self, slot: int) -> None:
        """Give a slot away: whatever it held is wiped, since a zero coefficient would not silence a NaN."""
        self._tenants[slot] = None
        for conditioning in self._conditioning.values():
            conditioning.forget(slot)
        with self._here():
            self._state.wipe(slot)

    def result(self, slot: int, into: Float32) -> None:
        """Write the finished latent, float32 [C, h, w] in the VAE's coordinates; `NonFiniteError` if it is not."""
        self.tenant(slot)
        with self._here():
            np.copyto(into, self._state.finish(torch.tensor([slot], device=self.device))[0].cpu().numpy())
        if not np.isfinite(into).all():
            raise NonFiniteError(
                "the latent holds NaN or infinity", remedy="Try float32, fewer or other steps, or a smaller guidance."
            )

    def tick(
        self, slots: Sequence[int], previews: Mapping[int, Float32] | None = None, *, rows: int | None = None
    ) -> None:
        """Advance these slots by one row each; see `Slots.tick`. What `rows` leaves over goes to a scrap slot."""
        for tokens, group in self._groups(slots):
            with self._here():
                wanted = bool(previews) and any(s in (previews or {}) for s in group)
                bucket = self._bucket(group, tokens, rows or 0)
                self._do("tick", bucket, 1, lambda b=bucket, w=wanted: self._tick(b, previews=w), (), previews=wanted)
                for i, slot in enumerate(group):
                    if previews and slot in previews:
                        np.copyto(previews[slot], bucket.x0[i].cpu().numpy())
            for slot in group:
                self.tenant(slot).row += 1

    def run(self, slots: Sequence[int], decoder: Binding) -> torch.Tensor:
        """Everything that is left of a request, as one piece of work: every evaluation, every update, and the VAE.

        slots: in use, all in programs of one length and at their first row, of one prompt length, and as many as
        `decoder` (a binding of the VAE's decoder) takes. Returns bool [A]: which latents are finite. That and the
        decoder's outputs are then on their way: on CUDA nobody has waited for them.
        """
        tenants = [self.tenant(s) for s in slots]
        lengths = {(t.program.evaluations, t.row) for t in tenants}
        groups = self._groups(slots)
        if len(lengths) != 1 or len(groups) != 1 or tenants[0].row:
            raise ArgumentError(
                f"{len(slots)} slots of {len(lengths)} lengths in {len(groups)} evaluations",
                expected="slots of one request at its beginning",
                remedy="Use tick, which takes any.",
            )
        count = tenants[0].program.evaluations
        with self._here():
            bucket = self._bucket(list(slots), groups[0][0], 0)
            latent = as_tensor(decoder.inputs["latent"])

            def body() -> None:
                for _ in range(count):
                    self._tick(bucket, previews=False)
                finished = self._state.finish(bucket.slots)
                bucket.finite.copy_(torch.isfinite(finished).flatten(1).all(1))
                latent.copy_(finished)
                decoder.enqueue()

            own = self._decoder is not None and self._decoder[1] is decoder and self._decoder[0]
            capturable = not own or own.capture == "whole_request"
            self._do("request", bucket, count, body, (decoder,), capturable=capturable)
        for tenant in tenants:
            tenant.row = count
        return bucket.finite

    def decoder(self, engine: Engine) -> Binding:
        """The binding of a VAE's decoder for all of these slots, made once: `run` works on its buffers."""
        if self._decoder is None or self._decoder[0] is not engine:
            _, height, width = self._shape
            dims = {"batch": self.count, "height": height, "width": width}
            with self._here(), guard_memory(self.device, f"decoding {self.count} images"):
                self._decoder = engine, engine.bind(dims)
        return self._decoder[1]

    def _do(
        self,
        kind: str,
        bucket: Bucket,
        evaluations: int,
        body: Any,
        owners: tuple[object, ...],
        *,
        previews: bool = False,
        capturable: bool = True,
    ) -> None:
        """Run work eagerly, or captured where there is a cache and the engines admit a caller's graph."""
        if self.graphs is None or not capturable or self._engine.capture != "whole_request":
            with torch.no_grad(), guard_memory(self.device, f"a {kind}"):
                body()
            return
        held = (bucket.binding, *owners)
        key = GraphKey(
            kind=kind,
            shape=self._shape,
            slots=bucket.count,
            rows=bucket.rows,
            tokens=bucket.tokens,
            evaluations=evaluations,
            engines=(id(self._engine), *(id(o) for o in held)),
            previews=previews,
        )
        conditioning = self._conditioning[bucket.tokens]
        buffers = (*self._state.buffers, *conditioning.tensors, *bucket.tensors)
        self.clock.suspend()
        try:
            with torch.no_grad(), guard_memory(self.device, f"a {kind}"):
                self.graphs.run(key, body, owners=(self._engine, *held), buffers=buffers, restore=self._state.tensors)
        finally:
            self.clock.resume(evaluations)

    def _tick(self, bucket: Bucket, *, previews: bool) -> None:
        """One evaluation of a bucket: nothing here depends on what the tensors hold."""
        state, clock = self._state, self.clock
        clock.mark("gather")
        state.model_input(bucket.slot_of_row, bucket.sample)
        bucket.timestep.copy_(state.timesteps(bucket.slot_of_row))
        self._conditioning[bucket.tokens].gather(bucket)
        clock.mark("evaluations")
        bucket.binding.enqueue()
        clock.mark("guidance")
        outputs = bucket.combine()
        clock.mark("update")
        if previews:
            bucket.x0.copy_(state.preview(bucket.slots, outputs))
        state.advance(bucket.slots, outputs)
        clock.mark("")

    def _groups(self, slots: Sequence[int]) -> list[tuple[int, list[int]]]:
        return share_evaluations({s: self.tenant(s) for s in slots}, self._most_rows)

    def _bucket(self, slots: list[int], tokens: int, least_rows: int) -> Bucket:
        """The buffers of an evaluation of so many slots and rows, its tables saying which these are."""
        tenants = [self.tenant(s) for s in slots]
        rows = max(least_rows, sum(t.rows for t in tenants))
        key = (len(slots), rows, tokens)
        if key not in self._buckets:
            _, height, width = self._shape
            with guard_memory(self.device, f"an evaluation of {rows} rows"):
                binding = self._engine.bind({"rows": rows, "height": height, "width": width, "tokens": tokens})
                self._buckets[key] = Bucket(binding, len(slots), rows, tokens, self._shape, self.device)
        bucket = self._buckets[key]
        bucket.point(slots, tenants, scrap=self.count)
        for slot, tenant in zip(slots, tenants, strict=True):
            self._conditioning_for(tokens).write(slot, tenant)
        return bucket

    def _conditioning_for(self, tokens: int) -> Conditioning:
        if tokens not in self._conditioning:
            self._conditioning[tokens] = Conditioning(self._engine.inputs, self.count + 1, tokens, self.device)
        return self._conditioning[tokens]

    def _reserve(self, rows: int, draws: int) -> None:
        """Make room for a longer program; every captured graph goes, since the buffers move."""
        state = self._state
        if rows <= state.max_rows and draws <= state.max_draws:
            return
        self._state = state.grown(_power(max(rows, state.max_rows)), _power(max(draws, state.max_draws)))
        if self.graphs is not None:
            self.graphs.clear()

    @contextmanager
    def _here(self) -> Iterator[None]:
        """On this instance's stream and device."""
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            yield

    def wait(self) -> None:
        """Wait for all that was enqueued."""
        if self._stream is not None:
            self._stream.synchronize()


def _power(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()


def _check_known(tenant: Tenant) -> None:
    """Raise `UnsupportedError` for a tenant that asks for what these slots do not do."""
    for field in dataclasses.fields(tenant):
        value = getattr(tenant, field.name)
        if field.name not in _KNOWN and value is not None and value is not field.default:
            raise UnsupportedError(
                f"{field.name} is not done by slots on a device",
                expected="one of the plain requests",
                remedy="Use device='cpu' for it.",
            )
