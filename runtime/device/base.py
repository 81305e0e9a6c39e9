"""What every device offers: a `Device` that makes `Slots`, and what all slots do alike.

A slot has its own latent, program, position, conditioning and guidance. A tick evaluates the UNet once for the slots
it is given (two rows a slot where guidance asks for it) and moves each slot on by one position in its own program.
Slots join and leave between ticks.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ...agreement import VARIANCE as VARIANCE
from ...engines import Engine, RunOptions
from ...engines.graph.low_rank import RANK
from ...engines.low_rank import Adapted, bucket, no_change
from ...errors import ArgumentError, MismatchError, NonFiniteError
from ...schedules import Program
from ..arrays import Float32, Shape, UInt8
from ..conditioning import Arrays, Conditioning, check_conditioning
from ..noise.seeds import Gaussians
from ..pictures.inpaint import Blend

MOST_HISTORY = 6
CLIP_AXES = 4
"""Axes of a clip's latent, whose first are its frames."""
RECORDINGS = ("captures", "replays", "failures", "evictions", "invalidations")
MOST_ROWS = 64
"""Rows of one evaluation; more are done in several."""
MOST_SHARED_TOKENS = 8 * 77
"""How long prompts are made so that slots can share an evaluation; longer ones get evaluations of their own."""


@dataclass(slots=True, kw_only=True)
class Sampling:
    """One image on its way: its program and how far it is, and what the UNet is told of it.

    guidance: the factor of the prompt's row against the negative's, where the conditioning has both; of a clip one a
    frame, where they differ. blend: what an
    inpainting request keeps of its picture. position: evaluations made, and so the one of the program that comes next.
    """

    program: Program
    noise: Gaussians
    conditioning: Conditioning
    guidance: float | tuple[float, ...] = 1.0
    blend: Blend | None = None
    position: int = 0

    @property
    def rows(self) -> int:
        """UNet rows an evaluation takes."""
        return self.conditioning.rows

    @property
    def tokens(self) -> int:
        return self.conditioning.tokens

    @property
    def done(self) -> bool:
        return self.position >= self.program.evaluations


@dataclass(slots=True)
class TickTimes:
    """Milliseconds spent, summed over ticks; `evaluations` has one entry an evaluation."""

    evaluations: list[float] = field(default_factory=list)
    update: float = 0.0
    guidance: float = 0.0
    gather: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """What a whole request came to: images uint8 [A, H, W, 3], latents float32 [A, C, h, w], finite bool [A].

    tensor: the images as a torch tensor where they were made, if that is a torch device.
    """

    images: UInt8
    latents: Float32
    finite: np.ndarray[Any, np.dtype[np.bool_]]
    tensor: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluator:
    """What evaluates some images: an engine, and where it takes changes of weights, which and of what rank."""

    engine: Engine
    adapted: Adapted | None = None
    rank: int = 0

    @property
    def key(self) -> tuple[int, int]:
        return id(self.engine), self.rank

    def parts(self, sampling: Sampling) -> tuple[Arrays, ...]:
        """What the UNet is told of an image at its position, by row, in the engine's inputs."""
        conditioning = sampling.conditioning
        parts = conditioning.parts(sampling.position)
        if self.adapted is None:
            return parts
        if conditioning.change is not None:
            change = conditioning.change.packed(self.adapted.layers, self.rank)
        else:
            change = no_change(self.adapted.extent, self.rank)
        return tuple({**arrays, **change} for arrays in parts)


class Slots(ABC):
    """A fixed number of slots of one latent shape, (C, h, w) or of clips (F, C, h, w), for the engine of a UNet.

    adapt: opens the engine that takes low-rank changes, of larger kernels too where it is told so; `None` where images
    with changes are not admitted.

    Not thread-safe: one thread at a time. Devices say how state is kept and moved (`_place`, `_clear`, `_evaluate`,
    `_finish`, `_state`); who is in which slot, what is admitted and who shares an evaluation is said here.
    """

    def __init__(self, engine: Engine, *, slots: int, shape: Shape, most_rows: int) -> None:
        self._engine, self.shape, self._most_rows = engine, shape, max(2, most_rows)
        self._samplings: list[Sampling | None] = [None] * slots
        self.adapt: Callable[[bool], Adapted] | None = None

    @property
    def count(self) -> int:
        return len(self._samplings)

    @property
    def free(self) -> list[int]:
        return [i for i, s in enumerate(self._samplings) if s is None]

    @property
    def _lead(self) -> tuple[int, ...]:
        """(F,) of clips, whose frames may be guided each by its own factor; () of pictures."""
        return self.shape[:1] if len(self.shape) == CLIP_AXES else ()

    @property
    def _sides(self) -> dict[str, int]:
        return {"height": self.shape[-2], "width": self.shape[-1]}

    def sampling(self, slot: int) -> Sampling:
        """Who is in a slot; `ArgumentError` for a free one."""
        sampling = self._samplings[slot]
        if sampling is None:
            raise ArgumentError(f"slot {slot} is free", expected="a slot in use")
        return sampling

    def admit(self, sampling: Sampling, gaussian: Float32, latent: Float32 | None = None) -> int:
        """Put an image into a free slot and start it from unit noise `gaussian` (and `latent`, for image to image).

        Raises `ArgumentError` where there is no free slot, no latent to start from, or a conditioning that the UNet
        does not take.
        """
        if not self.free:
            raise ArgumentError(f"all {self.count} slots are in use", remedy="Release one first.")
        check_conditioning(sampling.conditioning, self._engine.inputs, self._sides)
        if isinstance(sampling.guidance, tuple) and self._lead != (len(sampling.guidance),):
            raise ArgumentError(
                f"{len(sampling.guidance)} factors of guidance for a latent of shape {list(self.shape)}",
                expected="one factor, or of a clip one a frame",
            )
        if sampling.conditioning.change is not None and self.adapt is None:
            raise ArgumentError("the image has a LoRA", expected="slots of a pipeline, which opens an engine for it")
        if sampling.program.spread is not None and VARIANCE not in self._engine.outputs:
            raise ArgumentError(
                "the program's noise is spread by a variance, and the UNet says none",
                expected="a UNet with twice as many channels out as its latent has",
                remedy="Set variance_type to fixed_small.",
            )
        program, slot = sampling.program, self.free[0]
        # x_0 = init_noise n + init_latent z
        start = program.init_noise * gaussian.astype(np.float64)
        if program.init_latent:
            if latent is None:
                raise ArgumentError("the program starts from a latent and none was given", remedy="Pass an image.")
            start = start + program.init_latent * latent
        self._place(slot, sampling, start.astype(np.float32))
        self._samplings[slot] = sampling
        return slot

    def release(self, slot: int) -> None:
        """Give a slot away: whatever it held is wiped, since a zero coefficient would not silence a NaN."""
        self._samplings[slot] = None
        self._clear(slot)

    def tick(
        self, slots: Sequence[int], previews: Mapping[int, Float32] | None = None, *, rows: int | None = None
    ) -> None:
        """Advance these slots by one evaluation each. `previews` maps slots to float32 arrays that receive their x0.

        `rows` is the least number of UNet rows an evaluation has: what the slots leave over is padding, computed and
        dropped, for engines that admit some sizes only or run some faster.
        """
        for tokens, group in self.share(slots):
            self._evaluate(group, tokens, rows or 0, {s: x0 for s, x0 in (previews or {}).items() if s in group})
            for slot in group:
                self.sampling(slot).position += 1

    def _evaluator(self, samplings: Sequence[Sampling]) -> Evaluator:
        """The engine for an evaluation of these images: the plain one unless an image has a change of weights."""
        changes = [s.conditioning.change for s in samplings if s.conditioning.change is not None]
        if not changes or self.adapt is None:
            return Evaluator(engine=self._engine)
        adapted = self.adapt(any(c.kernels for c in changes))
        return Evaluator(engine=adapted.engine, adapted=adapted, rank=bucket(max(c.rank for c in changes)))

    def share(self, slots: Sequence[int]) -> list[tuple[int, list[int]]]:
        """Slots that share an evaluation, with its prompt length."""
        return share_evaluations({s: self.sampling(s) for s in slots}, self._most_rows)

    def result(self, slot: int, into: Float32) -> None:
        """Write the finished latent, float32 in the VAE's coordinates; `NonFiniteError` if it is not."""
        self._finish(slot, self.sampling(slot).program, into)
        if not np.isfinite(into).all():
            raise NonFiniteError(
                "the latent holds NaN or infinity", remedy="Try float32, fewer or other steps, or a smaller guidance."
            )

    def latent(self, slot: int) -> Float32:
        """The state as it is now in the coordinates of diffusers' latents, float32 of the slots' shape."""
        sampling = self.sampling(slot)
        latent: Float32 = self._state(slot) * np.float32(sampling.program.state_scale[sampling.position])
        return latent

    def run(self, slots: Sequence[int], decoder: Engine) -> Decoded:
        """Everything that is left of a request, as one piece of work: every evaluation, every update, and the VAE.

        slots: all of them in use, in programs of one length and at their beginning, and sharing one evaluation;
        `ArgumentError` otherwise. decoder: the VAE's, on the device that the slots are on.
        """
        samplings = [self.sampling(s) for s in slots]
        lengths = {(s.program.evaluations, s.position) for s in samplings}
        groups = self.share(slots)
        if len(lengths) != 1 or len(groups) != 1 or samplings[0].position:
            raise ArgumentError(
                f"{len(slots)} slots of {len(lengths)} lengths in {len(groups)} evaluations",
                expected="slots of one request at its beginning",
                remedy="Use tick, which takes any.",
            )
        if any(s.conditioning.later for s in samplings):
            raise ArgumentError(
                "a prompt that changes on the way, in one piece of work", expected="ticks", remedy="Use tick."
            )
        decoded = self._run(list(slots), groups[0][0], samplings[0].program.evaluations, decoder)
        for sampling in samplings:
            sampling.position = sampling.program.evaluations
        return decoded

    @abstractmethod
    def take_times(self) -> TickTimes:
        """Milliseconds by stage since they were last taken; waits for the work that they tell of."""

    @property
    @abstractmethod
    def bytes(self) -> int:
        """Memory of the slots and of what was recorded, the engines' buffers apart."""

    @property
    def recordings(self) -> Mapping[str, int]:
        """How often, by `RECORDINGS`, captured work was made, used, lost; zeros where none is captured."""
        return dict.fromkeys(RECORDINGS, 0)

    @abstractmethod
    def _place(self, slot: int, sampling: Sampling, start: Float32) -> None:
        """Load an image into a wiped slot: its program's table, its starting state, what it blends with."""

    @abstractmethod
    def _clear(self, slot: int) -> None:
        """Wipe a slot's memory."""

    @abstractmethod
    def _evaluate(self, slots: list[int], tokens: int, rows: int, previews: Mapping[int, Float32]) -> None:
        """One evaluation of slots that share it, each moved on by its own program; positions are counted afterwards."""

    @abstractmethod
    def _run(self, slots: list[int], tokens: int, evaluations: int, decoder: Engine) -> Decoded:
        """So many evaluations of slots that share them, and the decoder on what comes of it."""

    @abstractmethod
    def _finish(self, slot: int, program: Program, into: Float32) -> None:
        """Write the state in diffusers' coordinates after the program's last evaluation."""

    @abstractmethod
    def _state(self, slot: int) -> Float32:
        """The state as it is, float32 of the slots' shape: the network's input before scaling."""


class Device(Protocol):
    """Where a pipeline's slots lie and its UNet runs.

    name: as a caller writes it, `"cpu"` or `"cuda:1"`. engines: where its engines have their buffers, `"cpu"` or
    `"cuda"`. whole_requests: whether a request is best done as one piece of work, if nobody wants to look on.
    """

    @property
    def name(self) -> str: ...

    @property
    def engines(self) -> str: ...

    @property
    def whole_requests(self) -> bool: ...

    @property
    def records(self) -> bool:
        """Whether work is captured when it is first done, so that warming up pays."""

    def run_options(self, run: RunOptions) -> RunOptions:
        """The options with which engines are opened for this device."""

    def on_host(self, engine: Engine) -> Engine:
        """The engine as code on the host feeds it, with NumPy buffers."""

    def make_slots(self, engine: Engine, shape: Shape, count: int) -> Slots: ...

    def guard_memory(self, doing: str) -> AbstractContextManager[None]:
        """Turns a failed allocation within into `OutOfMemoryError`."""

    def free_bytes(self) -> int | None:
        """Memory that is free for slots and activations; `None`: unknown."""


def check_engine(engine: Engine, device: Device) -> None:
    """Raise `MismatchError` for an engine whose buffers lie elsewhere than the device's slots."""
    if engine.device != device.engines:
        raise MismatchError(
            f"the backend {engine.backend!r} runs on {engine.device}",
            expected=f"a backend for {device.name}",
            remedy="Name another backend, or leave the device out.",
        )


def share_evaluations(samplings: Mapping[int, Sampling], most_rows: int) -> list[tuple[int, list[int]]]:
    """Slots that can share an evaluation, with its prompt length: at most `most_rows` rows.

    Shorter prompts are repeated whole to share it with longer ones, unless that gets too long.
    """
    common = math.lcm(*(s.tokens for s in samplings.values()))
    groups: dict[int, list[list[int]]] = {}
    rows: dict[int, int] = {}
    for slot, sampling in samplings.items():
        tokens = common if common <= MOST_SHARED_TOKENS else sampling.tokens
        if tokens not in groups or rows[tokens] + sampling.rows > most_rows:
            groups.setdefault(tokens, []).append([])
            rows[tokens] = 0
        groups[tokens][-1].append(slot)
        rows[tokens] += sampling.rows
    return [(tokens, g) for tokens, of_length in groups.items() for g in of_length]


def unet_dims(shape: Shape, rows: int, tokens: int, rank: int = 0) -> dict[str, int]:
    """The dimensions that a UNet is bound to for an evaluation; `rank` is of changes of its weights."""
    *_, height, width = shape
    dims = {"rows": rows, "height": height, "width": width, "tokens": tokens}
    dims |= {"frames": shape[0]} if len(shape) == CLIP_AXES else {}
    return {**dims, RANK: rank} if rank else dims
