"""A job: a request that has slots, and how far each of its images is."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..engines.base import TensorSpec
from ..errors import ArgumentError, NonFiniteError
from ..runtime.device.numpy_slots import Float32, Slots
from ..runtime.pictures.images import UInt8
from ..runtime.prepare import Prepared
from ..runtime.prompts.encoders import Embedding
from ..runtime.result import Step
from .batch_sizes import Buckets
from .policy import Candidate
from .ticket import Ticket


@dataclass(slots=True)
class StageTimes:
    """Milliseconds a request spent; `evaluations` has one entry a tick that it took part in."""

    queue: float = 0.0
    evaluations: list[float] = field(default_factory=list)
    update: float = 0.0
    guidance: float = 0.0
    gather: float = 0.0


class Job:
    """The tick thread's view of a request. `slots` are its images' slots, in order, once it is admitted."""

    def __init__(self, ticket: Ticket, prepared: Prepared) -> None:
        self.ticket, self.prepared = ticket, prepared
        self.slots: list[int] = []
        self.out: Float32 = np.empty_like(prepared.gaussians)
        self.times = StageTimes()
        self.admitted_at = 0.0
        self.denoised_at = 0.0
        self._x0: Float32 | None = np.zeros_like(self.out) if ticket.previews else None
        self._reported = 0

    @property
    def images(self) -> int:
        return len(self.prepared.tenants)

    @property
    def rows(self) -> int:
        """UNet rows an image takes."""
        return self.prepared.tenants[0].rows

    @property
    def lane(self) -> tuple[tuple[int, int, int], int]:
        """What its images can share an evaluation with: equal latent shape and prompt length."""
        return self.prepared.shape, self.prepared.tenants[0].tokens

    @property
    def behind(self) -> list[int]:
        """Its images that are the least far."""
        least = min(t.row for t in self.prepared.tenants)
        return [i for i, t in enumerate(self.prepared.tenants) if t.row == least]

    @property
    def remaining(self) -> int:
        """Evaluations until its last image is done."""
        return self.prepared.request.program.evaluations - min(t.row for t in self.prepared.tenants)

    @property
    def done(self) -> bool:
        return all(t.done for t in self.prepared.tenants)

    def candidate(self, buckets: Buckets, *, alone_s: float, tail_s: float, in_turn: bool) -> Candidate:
        return Candidate(
            lane=self.lane,
            buckets=buckets,
            images=len(self.behind),
            rows=self.rows,
            remaining=self.remaining,
            arrival=self.ticket.arrival,
            alone_s=alone_s,
            tail_s=tail_s,
            in_turn=in_turn,
            deadline=self.ticket.deadline,
        )

    def admit(self, slots: Slots) -> None:
        """Give each image a slot; there must be enough."""
        self.admitted_at = time.monotonic()
        self.times.queue = 1e3 * (self.admitted_at - self.ticket.arrival)
        latents = self.prepared.latents
        for i, tenant in enumerate(self.prepared.tenants):
            latent = None if latents is None else latents[i]
            self.slots.append(slots.admit(tenant, self.prepared.gaussians[i], latent))

    def release(self, slots: Slots) -> None:
        for slot in self.slots:
            slots.release(slot)
        self.slots = []

    def collect(self, slots: Slots) -> None:
        """Take the finished latents; `NonFiniteError` when one is not finite."""
        for slot, into in zip(self.slots, self.out, strict=True):
            slots.result(slot, into)
        self.denoised_at = time.monotonic()

    def preview_targets(self, images: Sequence[int]) -> dict[int, Float32]:
        """Where a tick is to write what it sees, by slot; empty when nobody asked for previews."""
        return {} if self._x0 is None else {self.slots[i]: self._x0[i] for i in images}

    def report(self, decode: Callable[[Float32], UInt8]) -> None:
        """Tell the ticket's readers of each evaluation that all images have made."""
        program = self.prepared.request.program
        made = program.evaluations - self.remaining
        if made == self._reported:
            return
        self._reported = made
        self.ticket.report(
            Step(
                index=made - 1,
                total=program.evaluations,
                timestep=float(program.timesteps[made - 1]),
                x0=None if self._x0 is None else self._x0.copy(),
                _decode=decode,
            )
        )


def check_prepared(prepared: Prepared, inputs: dict[str, TensorSpec], most_images: int) -> None:
    """Refuse what would fail inside an evaluation, where it would take its batch-mates along.

    Raises `ArgumentError` for embeddings of another shape than the UNet takes, `NonFiniteError` for NaN or infinity
    in embeddings, noise or latents.
    """
    if len(prepared.tenants) > most_images:
        raise ArgumentError(f"{len(prepared.tenants)} images in one request", expected=f"at most {most_images}")
    width = inputs["encoder_hidden_states"].shape[-1]
    for tenant in prepared.tenants:
        for embedding in (tenant.positive, tenant.negative):
            if embedding is not None:
                _check_embedding(embedding, width, pooled="text_embeds" in inputs)
    for what in (prepared.gaussians, prepared.latents):
        if what is not None and not np.isfinite(what).all():
            raise NonFiniteError("a starting latent holds NaN or infinity", remedy="Check the picture and its VAE.")


def _check_embedding(embedding: Embedding, width: int | str, *, pooled: bool) -> None:
    if embedding.hidden.ndim != 2 or embedding.hidden.shape[1] != width:
        raise ArgumentError(f"an embedding has shape {embedding.hidden.shape}", expected=f"[tokens, {width}]")
    if pooled and embedding.pooled is None:
        raise ArgumentError("an embedding has no pooled vector", expected="one, as this UNet takes it")
    for values in (embedding.hidden, embedding.pooled):
        if values is not None and not np.isfinite(values).all():
            raise NonFiniteError("an embedding holds NaN or infinity", remedy="Check the text encoder.")
