"""The tables of slots on a device: which row of an evaluation is whose, and what the UNet is told of each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ...engines.base import Binding, TensorSpec
from .memory import as_tensor, upload
from .numpy_slots import MOST_SHARED_TOKENS, Float32, Tenant

PARTS = 2
"""Rows a slot may take: the negative prompt's and the prompt's."""


class Bucket:
    """One evaluation of `count` slots in `rows` rows: the engine's buffers, and index tables in memory that stays.

    slot_of_row, part_of_row: int64 [R]. slots: int64 [A]. rows_of: int64 [A, 2] and weights: float32 [A, 2] say
    from which rows, and with which factors, a slot's output is made: (1 - g) u + g c. x0: float32 [A, *shape];
    finite: bool [A].
    """

    def __init__(
        self,
        binding: Binding,
        count: int,
        rows: int,
        tokens: int,
        shape: tuple[int, ...],
        device: torch.device,
    ) -> None:
        self.binding, self.count, self.rows, self.tokens = binding, count, rows, tokens
        self.inputs = {n: as_tensor(a) for n, a in binding.inputs.items()}
        self.sample, self.timestep = self.inputs["sample"], self.inputs["timestep"]
        self.out = as_tensor(binding.outputs["out"])
        index: dict[str, Any] = {"dtype": torch.int64, "device": device}
        self.slot_of_row = torch.zeros(rows, **index)
        self.part_of_row = torch.zeros(rows, **index)
        self.slots = torch.zeros(count, **index)
        self.rows_of = torch.zeros((count, PARTS), **index)
        self.weights = torch.zeros((count, PARTS), dtype=torch.float32, device=device)
        self.x0 = torch.zeros((count, *shape), dtype=torch.float32, device=device)
        self.finite = torch.ones(count, dtype=torch.bool, device=device)
        self._pointed: tuple[object, ...] = ()

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        tables = (self.slot_of_row, self.part_of_row, self.slots, self.rows_of, self.weights, self.x0, self.finite)
        return (*self.inputs.values(), self.out, *tables)

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors)

    def point(self, slots: Sequence[int], tenants: Sequence[Tenant], *, scrap: int) -> None:
        """Say which slots this evaluation is of. Rows left over belong to slot `scrap`, whose output nobody takes."""
        wanted = (tuple(slots), tuple((t.rows, t.guidance) for t in tenants))
        if wanted == self._pointed:
            return
        slot_of_row, part_of_row = np.full(self.rows, scrap, np.int64), np.full(self.rows, PARTS - 1, np.int64)
        rows_of, weights = np.zeros((self.count, PARTS), np.int64), np.zeros((self.count, PARTS), np.float32)
        at = 0
        for i, (slot, tenant) in enumerate(zip(slots, tenants, strict=True)):
            slot_of_row[at : at + tenant.rows] = slot
            part_of_row[at : at + tenant.rows] = range(PARTS - tenant.rows, PARTS)
            rows_of[i] = at, at + tenant.rows - 1
            weights[i] = (1.0 - tenant.guidance, tenant.guidance) if tenant.rows == PARTS else (0.0, 1.0)
            at += tenant.rows
        upload(self.slot_of_row, slot_of_row)
        upload(self.part_of_row, part_of_row)
        upload(self.slots, np.array(slots, np.int64))
        upload(self.rows_of, rows_of)
        upload(self.weights, weights)
        self._pointed = wanted

    def combine(self) -> torch.Tensor:
        """float32 [A, *shape]: each slot's output, its rows added by their weights."""
        out = self.out.float()
        first, second = out[self.rows_of[:, 0]], out[self.rows_of[:, 1]]
        shape = (-1, *(1,) * (out.ndim - 1))
        return self.weights[:, 0].reshape(shape) * first + self.weights[:, 1].reshape(shape) * second


class Conditioning:
    """What the UNet is told of each slot besides latent and timestep, for prompts made equally long.

    By slot and part (the negative row's, the prompt's): `encoder_hidden_states` float32 [S, 2, T, D], `text_embeds`
    [S, 2, P] and `time_ids` [S, 2, 6]; by slot alone `timestep_cond` [S, E]; each where the UNet takes it.
    """

    def __init__(self, inputs: Mapping[str, TensorSpec], slots: int, tokens: int, device: torch.device) -> None:
        self._tokens = tokens
        self._made: dict[str, torch.Tensor] = {}
        self._written: dict[int, Tenant] = {}
        for name in ("encoder_hidden_states", "text_embeds", "time_ids", "timestep_cond"):
            if name in inputs:
                inner = [tokens if d == "tokens" else int(d) for d in inputs[name].shape[1:]]
                parts = [] if name == "timestep_cond" else [PARTS]
                self._made[name] = torch.zeros([slots, *parts, *inner], dtype=torch.float32, device=device)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(self._made.values())

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors)

    def write(self, slot: int, tenant: Tenant) -> None:
        """Upload a tenant's embeddings, once. Of one without a negative prompt both parts hold the prompt's."""
        if self._written.get(slot) is tenant:
            return
        negative_ids = tenant.negative_time_ids
        parts = (
            (tenant.negative or tenant.positive, tenant.time_ids if negative_ids is None else negative_ids),
            (tenant.positive, tenant.time_ids),
        )
        for part, (embedding, time_ids) in enumerate(parts):
            self._put("encoder_hidden_states", embedding.repeated(self._tokens).hidden, slot, part)
            self._put("text_embeds", embedding.pooled, slot, part)
            self._put("time_ids", time_ids, slot, part)
        self._put("timestep_cond", tenant.guidance_vector, slot)
        self._written[slot] = tenant

    def _put(self, name: str, values: Float32 | None, *place: int) -> None:
        if name in self._made and values is not None:
            upload(self._made[name][place], values)

    def forget(self, slot: int) -> None:
        self._written.pop(slot, None)

    def gather(self, bucket: Bucket) -> None:
        """Fill the engine's rows from the tables."""
        for name, table in self._made.items():
            by_part = name != "timestep_cond"
            rows = table[bucket.slot_of_row, bucket.part_of_row] if by_part else table[bucket.slot_of_row]
            bucket.inputs[name].copy_(rows)


def share_evaluations(tenants: Mapping[int, Tenant], most_rows: int) -> list[tuple[int, list[int]]]:
    """Slots that can share an evaluation, with its prompt length: at most `most_rows` rows.

    Shorter prompts are repeated whole to share it with longer ones, unless that gets too long.
    """
    common = math.lcm(*(t.tokens for t in tenants.values()))
    groups: dict[int, list[list[int]]] = {}
    rows: dict[int, int] = {}
    for slot, tenant in tenants.items():
        tokens = common if common <= MOST_SHARED_TOKENS else tenant.tokens
        if tokens not in groups or rows[tokens] + tenant.rows > most_rows:
            groups.setdefault(tokens, []).append([])
            rows[tokens] = 0
        groups[tokens][-1].append(slot)
        rows[tokens] += tenant.rows
    return [(tokens, g) for tokens, of_length in groups.items() for g in of_length]
