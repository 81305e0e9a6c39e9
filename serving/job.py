"""A job: a request that has slots, and how far each of its images is."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..engines.base import TensorSpec
from ..errors import ArgumentError, NonFiniteError
from ..runtime.arrays import Float32, Shape, UInt8
from ..runtime.conditioning import check_conditioning
from ..runtime.device.base import Slots, TickTimes
from ..runtime.prepare import Prepared
from ..runtime.result import Result, Step
from .batch_sizes import BatchSizes
from .policy import Candidate
from .ticket import Stage, Ticket


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstPass:
    """What the first of two passes made, and when it was there, in seconds of `time.monotonic`."""

    result: Result
    ended_at: float


class Job:
    """The tick thread's view of a request, or of one of its two passes: `first` is what came before the second.

    `slots` are its images' slots, in order, once it is admitted.
    """

    def __init__(self, ticket: Ticket, prepared: Prepared, first: FirstPass | None = None) -> None:
        self.ticket, self.prepared, self.first = ticket, prepared, first
        self.began_at = ticket.arrival if first is None else first.ended_at
        self.prepared_at = time.monotonic()
        self.slots: list[int] = []
        self.out: Float32 = np.empty_like(prepared.gaussians)
        self.queue_ms = 0.0
        self.ticks = TickTimes()
        self.admitted_at = 0.0
        self.denoised_at = 0.0
        self._x0: Float32 | None = np.zeros_like(self.out) if ticket.previews else None
        self._before = 0 if first is None else ticket.request.program.evaluations
        self._reported = 0
        self._evaluated_at: list[float] = []

    @property
    def images(self) -> int:
        return len(self.prepared.samplings)

    @property
    def rows(self) -> int:
        """UNet rows an image takes."""
        return self.prepared.samplings[0].rows

    @property
    def lane(self) -> tuple[Shape, int]:
        """What its images can share an evaluation with: equal latent shape and prompt length."""
        return self.prepared.shape, self.prepared.samplings[0].tokens

    @property
    def behind(self) -> list[int]:
        """Its images that are the least far."""
        least = min(s.position for s in self.prepared.samplings)
        return [i for i, s in enumerate(self.prepared.samplings) if s.position == least]

    @property
    def remaining(self) -> int:
        """Evaluations until its last image is done."""
        return self.prepared.request.program.evaluations - min(s.position for s in self.prepared.samplings)

    @property
    def done(self) -> bool:
        return all(s.done for s in self.prepared.samplings)

    @property
    def second_s(self) -> float:
        """Seconds that what comes after it should take alone: of a first pass the second one."""
        return self.ticket.second_s if self.first is None else 0.0

    def candidate(self, buckets: BatchSizes, *, alone_s: float, tail_s: float, in_turn: bool) -> Candidate:
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
        self.ticket.stages.append(Stage(name="queue", began_at=self.prepared_at, ended_at=self.admitted_at))
        spent_ms = self.prepared.text_ms + self.prepared.encode_image_ms
        self.queue_ms = max(0.0, 1e3 * (self.admitted_at - self.began_at) - spent_ms)
        latents = self.prepared.latents
        for i, sampling in enumerate(self.prepared.samplings):
            latent = None if latents is None else latents[i]
            self.slots.append(slots.admit(sampling, self.prepared.gaussians[i], latent))

    def release(self, slots: Slots) -> None:
        for slot in self.slots:
            slots.release(slot)
        self.slots = []

    def collect(self, slots: Slots) -> None:
        """Take the finished latents; `NonFiniteError` when one is not finite."""
        for slot, into in zip(self.slots, self.out, strict=True):
            slots.result(slot, into)
        self.denoised_at = time.monotonic()
        between = {"began_at": self.admitted_at, "ended_at": self.denoised_at}
        self.ticket.stages.append(Stage(name="steps", **between, evaluations=tuple(self._evaluated_at)))

    def preview_targets(self, images: Sequence[int]) -> dict[int, Float32]:
        """Where a tick is to write what it sees, by slot; empty when nobody asked for previews."""
        return {} if self._x0 is None else {self.slots[i]: self._x0[i] for i in images}

    def account(self, times: TickTimes) -> None:
        """Count a tick that it took part in."""
        self.ticks.evaluations.append(sum(times.evaluations))
        self.ticks.update += times.update
        self.ticks.guidance += times.guidance
        self.ticks.gather += times.gather

    def report(self, slots: Slots, decode: Callable[[Float32], UInt8]) -> None:
        """Tell the ticket's readers of each evaluation that all images have made."""
        program = self.prepared.request.program
        evaluated = program.evaluations - self.remaining
        if evaluated == self._reported:
            return
        self._reported = evaluated
        self._evaluated_at.append(time.monotonic())
        latents = np.stack([slots.latent(s) for s in self.slots]) if self.ticket.previews else None
        self.ticket.report(
            Step(
                index=self._before + evaluated - 1,
                total=self.ticket.evaluations,
                timestep=float(program.timesteps[evaluated - 1]),
                x0=None if self._x0 is None else self._x0.copy(),
                _latents=None if latents is None else lambda: latents,
                _decode=decode,
            )
        )


def check_prepared(prepared: Prepared, inputs: Mapping[str, TensorSpec], most_images: int) -> None:
    """Refuse what would fail inside an evaluation, where it would take its batch-mates along.

    Raises `ArgumentError` for a conditioning that the UNet does not take, `NonFiniteError` for NaN or infinity in it,
    in noise or latents.
    """
    if len(prepared.samplings) > most_images:
        raise ArgumentError(f"{len(prepared.samplings)} images in one request", expected=f"at most {most_images}")
    _, height, width = prepared.shape
    for sampling in prepared.samplings:
        check_conditioning(sampling.conditioning, inputs, {"height": height, "width": width}, values=True)
    for what in (prepared.gaussians, prepared.latents):
        if what is not None and not np.isfinite(what).all():
            raise NonFiniteError("a starting latent holds NaN or infinity", remedy="Check the picture and its VAE.")
