"""The network that a search asks: rows of (state, timestep, pair) in, raw outputs out; on slots it is an engine.

A *pair* is a prompt with a seed: what an image is told, and the noise that it starts from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..engines import Engine
from ..errors import MismatchError
from ..runtime import Pipeline
from ..runtime.arrays import Float32, Shape
from ..runtime.conditioning import Conditioning
from ..runtime.device.base import Sampling, unet_dims
from ..schedules import Program

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Network(Protocol):
    """What is searched on.

    shape: of a state, (C, h, w) or whatever it has. evaluations: rows asked for so far, guidance's second row apart.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def evaluations(self) -> int: ...

    def __call__(self, states: Float32, timesteps: Floats, pairs: Integers) -> Float32:
        """Raw outputs, guidance in them: float32 [N, *shape] of inputs float32 [N, *shape] at timesteps [N].

        pairs: int64 [N], whose conditioning each row has.
        """


class NoNoise:
    """Stands where a stream of noise is asked for and none is drawn."""

    def randn(self, shape: tuple[int, ...]) -> Float32:
        return np.zeros(shape, np.float32)


@dataclass(eq=False)
class EngineNetwork:
    """A pipeline's UNet, evaluated in its own slots: whatever device, backend, guidance and conditioning it has.

    conditionings: by pair. at_once: images in one evaluation, of which guidance makes two rows each, where the engine
    admits as many. Raises `MismatchError` where it admits none of this size.
    """

    pipeline: Pipeline
    conditionings: Sequence[Conditioning]
    guidance: float
    shape: Shape
    at_once: int
    evaluations: int = 0

    def __post_init__(self) -> None:
        first = self.conditionings[0]
        self._each = first.rows
        engine, tokens = self.pipeline.engines["unet"], first.tokens
        self._admitted = [n for n in range(1, self.at_once + 1) if self._admits(engine, n * self._each, tokens)]
        if not self._admitted:
            engine.bind(unet_dims(self.shape, self._each, tokens))  # says what it admits
        self.at_once = self._admitted[-1]
        self._slots = self.pipeline.make_slots(self.shape, self.at_once)

    def _admits(self, engine: Engine, rows: int, tokens: int) -> bool:
        try:
            engine.bind(unet_dims(self.shape, rows, tokens))
        except MismatchError:
            return False
        return True

    def __call__(self, states: Float32, timesteps: Floats, pairs: Integers) -> Float32:
        out = np.empty(states.shape, np.float32)
        order = np.argsort(pairs, kind="stable")  # neighbours of one pair are told once
        for first in range(0, len(order), self.at_once):
            self._evaluate(order[first : first + self.at_once], states, timesteps, pairs, out)
        self.evaluations += len(states)
        return out

    def _evaluate(self, rows: Integers, states: Float32, timesteps: Floats, pairs: Integers, out: Float32) -> None:
        admitted: list[int] = []
        try:
            for row in rows:
                sampling = Sampling(
                    program=asking(float(timesteps[row])),
                    noise=NoNoise(),
                    conditioning=self.conditionings[int(pairs[row])],
                    guidance=self.guidance,
                )
                admitted.append(self._slots.admit(sampling, states[row]))
            images = next(n for n in self._admitted if n >= len(admitted))
            self._slots.tick(admitted, rows=images * self._each)
            for slot, row in zip(admitted, rows, strict=True):
                self._slots.result(slot, out[row])
        finally:
            for slot in admitted:
                self._slots.release(slot)


@lru_cache(maxsize=4096)
def asking(timestep: float) -> Program:
    """A program of one evaluation whose result is what the network answers: x' = out."""
    one, zero = np.ones(1), np.zeros(1)
    arrays: dict[str, Any] = {
        "timesteps": np.array([timestep]),
        "sigmas": np.array([1.0, 0.0]),
        "input_scale": one,
        "h_x": zero,
        "h_out": one,
        "write": np.zeros(1, np.int64),
        "a": zero,
        "b": np.ones((1, 1)),
        "c": zero,
        "c_prev": zero,
        "draws": np.zeros(1, np.bool_),
        "x0_x": zero,
        "x0_out": one,
        "state_scale": np.ones(2),
    }
    return Program(
        sampler="ask",
        schedule="ask",
        prediction="sample",
        steps=1,
        start=0,
        init_latent=0.0,
        init_noise=1.0,
        **{name: array.copy() for name, array in arrays.items()},
    )
