"""Slots: the state of everything that is being denoised, and the tick that moves it on by one evaluation.

A slot has its own latent, program, row, prompt and guidance. A tick evaluates the UNet once for the slots it is given
(two rows a slot where guidance asks for it) and applies each slot's own row. Slots join and leave between ticks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ...engines.base import Binding, Engine
from ...errors import ArgumentError, NonFiniteError
from ...schedules import Program
from ..noise.seeds import Gaussians
from ..pictures.inpaint import Blend
from ..prompts.encoders import Embedding
from .numpy_update import SlotState

Float32 = npt.NDArray[np.float32]
MOST_HISTORY = 5
MOST_SHARED_TOKENS = 8 * 77
"""How long prompts are made so that slots can share an evaluation; longer ones get evaluations of their own."""


@dataclass(slots=True, kw_only=True)
class Tenant:
    """What occupies a slot: a program and how far it is, the prompt's and the negative prompt's embeddings.

    `negative` is `None` where guidance needs no second row. `time_ids` float32 [6] are SDXL's sizes and crops, and
    `negative_time_ids` those of the negative row (`None`: the same). `guidance_vector` float32 [E] is the guidance
    embedding of UNets distilled with one. `blend` is what an inpainting request keeps of its picture.
    """

    program: Program
    noise: Gaussians
    positive: Embedding
    negative: Embedding | None
    guidance: float
    time_ids: Float32 | None = None
    negative_time_ids: Float32 | None = None
    guidance_vector: Float32 | None = None
    blend: Blend | None = None
    row: int = 0

    @property
    def tokens(self) -> int:
        """The prompt length that its rows need: both prompts repeated whole until they are equally long."""
        return math.lcm(*(len(e.hidden) for e in (self.positive, self.negative) if e is not None))

    @property
    def rows(self) -> int:
        """UNet rows an evaluation takes."""
        return 1 if self.negative is None else 2

    @property
    def done(self) -> bool:
        return self.row >= self.program.evaluations


@dataclass(slots=True)
class TickTimes:
    """Milliseconds spent, summed over ticks; `evaluations` has one entry a tick."""

    evaluations: list[float] = field(default_factory=list)
    update: float = 0.0
    guidance: float = 0.0
    gather: float = 0.0


class Slots:
    """A fixed number of slots of one latent shape on the NumPy device.

    `shape` is (C, h, w) of a latent. `most_rows` bounds the rows of one evaluation; a larger tick takes several.
    Not thread-safe: one thread at a time.
    """

    def __init__(self, engine: Engine, *, slots: int, shape: tuple[int, int, int], most_rows: int = 64) -> None:
        self._engine, self._shape, self._most_rows = engine, shape, max(2, most_rows)
        self._state = SlotState(slots, shape, MOST_HISTORY)
        self._tenants: list[Tenant | None] = [None] * slots
        self._bindings: dict[tuple[int, int], _Rows] = {}
        self._mixed = np.zeros((slots, *shape), np.float32)
        self.times = TickTimes()

    @property
    def count(self) -> int:
        return len(self._tenants)

    @property
    def free(self) -> list[int]:
        return [i for i, t in enumerate(self._tenants) if t is None]

    def tenant(self, slot: int) -> Tenant:
        found = self._tenants[slot]
        if found is None:
            raise ArgumentError(f"slot {slot} is free", expected="a slot in use")
        return found

    def admit(self, tenant: Tenant, gaussian: Float32, latent: Float32 | None = None) -> int:
        """Put a tenant into a free slot and start it from unit noise `gaussian` (and `latent`, for image to image)."""
        if not self.free:
            raise ArgumentError(f"all {self.count} slots are in use", remedy="Release one first.")
        slot = self.free[0]
        self._state.wipe(slot)
        program = tenant.program
        start = program.init_noise * gaussian.astype(np.float64)
        if program.init_latent:
            if latent is None:
                raise ArgumentError("the program starts from a latent and none was given", remedy="Pass an image.")
            start = start + program.init_latent * latent
        self._state.latent[slot] = start
        self._tenants[slot] = tenant
        return slot

    def release(self, slot: int) -> None:
        """Give a slot away: whatever it held is wiped, since a zero coefficient would not silence a NaN."""
        self._tenants[slot] = None
        self._state.wipe(slot)

    def result(self, slot: int, into: Float32) -> None:
        """Write the finished latent, float32 [C, h, w] in the VAE's coordinates; `NonFiniteError` if it is not."""
        self._state.finish(slot, self.tenant(slot).program, into)
        if not np.isfinite(into).all():
            raise NonFiniteError(
                "the latent holds NaN or infinity", remedy="Try float32, fewer or other steps, or a smaller guidance."
            )

    def latent(self, slot: int) -> Float32:
        """The state as it is now in the coordinates of diffusers' latents, float32 [C, h, w]."""
        tenant = self.tenant(slot)
        latent: Float32 = self._state.latent[slot] * np.float32(tenant.program.state_scale[tenant.row])
        return latent

    def tick(
        self, slots: Sequence[int], previews: Mapping[int, Float32] | None = None, *, rows: int | None = None
    ) -> None:
        """Advance these slots by one row each. `previews` maps slots to float32 [C, h, w] that receive their x0.

        `rows` is the least number of UNet rows an evaluation has: what the slots leave over is padding, computed and
        dropped, for engines that admit some sizes only or run some faster.
        """
        for tokens, group in self._groups(slots):
            self._evaluate(group, tokens, previews or {}, rows or 0)

    def _groups(self, slots: Sequence[int]) -> list[tuple[int, list[int]]]:
        """Slots that can share an evaluation: prompts of one length, at most `most_rows` rows.

        Shorter prompts are repeated whole to share it with longer ones, unless that gets too long.
        """
        groups: dict[int, list[list[int]]] = {}
        rows: dict[int, int] = {}
        common = math.lcm(*(self.tenant(s).tokens for s in slots))
        for slot in slots:
            tenant = self.tenant(slot)
            tokens = common if common <= MOST_SHARED_TOKENS else tenant.tokens
            if tokens not in groups or rows[tokens] + tenant.rows > self._most_rows:
                groups.setdefault(tokens, []).append([])
                rows[tokens] = 0
            groups[tokens][-1].append(slot)
            rows[tokens] += tenant.rows
        return [(tokens, g) for tokens, of_length in groups.items() for g in of_length]

    def _evaluate(self, slots: list[int], tokens: int, previews: Mapping[int, Float32], least_rows: int) -> None:
        began = time.perf_counter()
        tenants = [self.tenant(s) for s in slots]
        rows = self._rows(max(least_rows, sum(t.rows for t in tenants)), tokens)
        at = 0
        for slot, tenant in zip(slots, tenants, strict=True):
            sample = rows.sample[at]
            self._state.model_input(slot, tenant.program, tenant.row, sample)
            if tenant.negative is not None:
                np.copyto(rows.sample[at + 1], sample)
                ids = tenant.time_ids if tenant.negative_time_ids is None else tenant.negative_time_ids
                rows.write(at, tenant, tenant.negative, ids)
            rows.write(at + tenant.rows - 1, tenant, tenant.positive, tenant.time_ids)
            rows.timestep[at : at + tenant.rows] = tenant.program.timesteps[tenant.row]
            at += tenant.rows
        gathered = time.perf_counter()
        rows.binding.enqueue()
        evaluated = time.perf_counter()
        outputs = self._guide(tenants, rows.out)
        guided = time.perf_counter()
        self._advance(slots, tenants, outputs, previews)
        ended = time.perf_counter()
        self.times.gather += 1e3 * (gathered - began)
        self.times.evaluations.append(1e3 * (evaluated - gathered))
        self.times.guidance += 1e3 * (guided - evaluated)
        self.times.update += 1e3 * (ended - guided)

    def _guide(self, tenants: Sequence[Tenant], out: Float32) -> list[Float32]:
        """One output a slot: u + g (c - u) where there are two rows."""
        outputs, at = [], 0
        for i, tenant in enumerate(tenants):
            if tenant.negative is None:
                outputs.append(out[at])
            else:
                mixed = self._mixed[i]
                np.subtract(out[at + 1], out[at], out=mixed)
                np.multiply(mixed, np.float32(tenant.guidance), out=mixed)
                np.add(mixed, out[at], out=mixed)
                outputs.append(mixed)
            at += tenant.rows
        return outputs

    def _advance(
        self, slots: Sequence[int], tenants: Sequence[Tenant], outputs: list[Float32], previews: Mapping[int, Float32]
    ) -> None:
        state = self._state
        for slot, tenant, output in zip(slots, tenants, outputs, strict=True):
            if slot in previews:
                state.preview(slot, tenant.program, tenant.row, output, previews[slot])
            if tenant.program.draws[tenant.row]:
                np.copyto(state.noise[slot], tenant.noise.randn(self._shape))
        state.advance(slots, [t.program for t in tenants], [t.row for t in tenants], outputs)  # type: ignore[arg-type]
        for slot, tenant in zip(slots, tenants, strict=True):
            if tenant.blend is not None:
                tenant.blend.apply(state.latent[slot], tenant.program, tenant.row, self._mixed[0])
            tenant.row += 1

    def _rows(self, count: int, tokens: int) -> _Rows:
        key = (count, tokens)
        if key not in self._bindings:
            _, height, width = self._shape
            binding = self._engine.bind({"rows": count, "height": height, "width": width, "tokens": tokens})
            self._bindings[key] = _Rows(binding, count)
        return self._bindings[key]


class _Rows:
    """A binding's buffers by row; a row whose prompt is there already is not written again."""

    def __init__(self, binding: Binding, count: int) -> None:
        self.binding = binding
        self.sample: Float32 = binding.inputs["sample"]
        self.timestep: Float32 = binding.inputs["timestep"]
        self.out: Float32 = binding.outputs["out"]
        self._inputs: Mapping[str, Any] = binding.inputs
        self._written: list[tuple[object, ...]] = [()] * count

    def write(self, row: int, tenant: Tenant, embedding: Embedding, time_ids: Float32 | None) -> None:
        held = (embedding, time_ids, tenant.guidance_vector)
        if len(self._written[row]) == 3 and all(a is b for a, b in zip(held, self._written[row], strict=True)):
            return
        target = self._inputs["encoder_hidden_states"][row]
        np.copyto(target, embedding.repeated(len(target)).hidden)
        if embedding.pooled is not None and "text_embeds" in self._inputs:
            np.copyto(self._inputs["text_embeds"][row], embedding.pooled)
        if time_ids is not None:
            np.copyto(self._inputs["time_ids"][row], time_ids)
        if tenant.guidance_vector is not None:
            np.copyto(self._inputs["timestep_cond"][row], tenant.guidance_vector)
        self._written[row] = held
