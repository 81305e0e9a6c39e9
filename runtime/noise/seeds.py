"""Gaussian noise from a seed, number for number as torch's CPU generator gives it, without torch.

torch seeds a Mersenne Twister and, for sixteen float32 values or more, turns uniforms into normals by Box and Muller
in blocks of sixteen: u[0:8] give the radii, u[8:16] the angles. A tail that fills no block is redrawn with the fifteen
values before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ...errors import UnknownNameError
from ..arguments import check_integer
from ..arguments import check_seed as check_seed
from ..arrays import Float32
from .torch_cuda import THREADS, TorchCudaGenerator

_BLOCK = 16


class Gaussians(Protocol):
    """A stream of unit noise."""

    def randn(self, shape: tuple[int, ...]) -> Float32: ...


class _Unseeded(np.random.SeedSequence):
    """Nothing: NumPy would gather entropy for a state that is overwritten at once, which takes longer than the draw."""

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> npt.NDArray[Any]:
        return np.zeros(n_words, dtype)


_UNSEEDED = _Unseeded(0)


class TorchCpuGenerator:
    """`torch.Generator("cpu").manual_seed(seed)`: successive `randn` calls continue one stream.

    Agrees with torch to about 5e-7 (its vectorised logarithm and cosine round differently).
    """

    def __init__(self, seed: int) -> None:
        check_seed(seed)
        self.seed = seed
        self._bits = np.random.MT19937(_UNSEEDED)
        self._bits._legacy_seeding(seed & 0xFFFFFFFF)
        self._spare: float | None = None

    @classmethod
    def at(cls, seed: int, words: npt.NDArray[np.uint32], position: int, kept: float | None) -> TorchCpuGenerator:
        """The generator in the middle of its stream: the twister's 624 words, how many of them are used, and the
        normal that is kept for the next call."""
        generator = cls(seed)
        generator._bits.state = {"bit_generator": "MT19937", "state": {"key": words, "pos": position}}
        generator._spare = kept
        return generator

    def position(self) -> tuple[npt.NDArray[np.uint32], int, float | None]:
        """What `at` takes beside the seed."""
        inner = self._bits.state["state"]
        return inner["key"], int(inner["pos"]), self._spare

    def randn(self, shape: tuple[int, ...]) -> Float32:
        """Unit noise, float32 of `shape`, as `torch.randn(shape, generator=...)` draws it."""
        count = int(np.prod(shape, dtype=np.int64))
        if count < _BLOCK:
            return np.array([self._scalar() for _ in range(count)], np.float32).reshape(shape)
        uniforms = self._uniforms(count)
        whole = count // _BLOCK * _BLOCK
        out = np.empty(count, np.float32)
        out[:whole] = _box_muller(uniforms[:whole])
        if whole < count:
            out[count - _BLOCK :] = _box_muller(self._uniforms(_BLOCK))
        return out.reshape(shape)

    def _uniforms(self, count: int) -> Float32:
        """Multiples of 2^-24 in [0, 1), one of 32 random bits each."""
        raw = self._bits.random_raw(count).astype(np.uint32)
        return (raw & np.uint32(0xFFFFFF)).astype(np.float32) * np.float32(2.0**-24)

    def _scalar(self) -> float:
        """One normal in float64: torch's path for fewer than sixteen values, which keeps the sine for the next call."""
        if self._spare is not None:
            value, self._spare = self._spare, None
            return value
        angle, radius = (self._uniform_double() for _ in range(2))
        r = np.sqrt(-2.0 * np.log1p(-radius))
        self._spare = float(r * np.sin(2.0 * np.pi * angle))
        return float(r * np.cos(2.0 * np.pi * angle))

    def _uniform_double(self) -> float:
        high, low = (int(v) for v in self._bits.random_raw(2))
        return (((high << 32) | low) & ((1 << 53) - 1)) * 2.0**-53


def _box_muller(uniforms: Float32) -> Float32:
    blocks = uniforms.reshape(-1, 2, _BLOCK // 2)
    radius = np.sqrt(np.float32(-2.0) * np.log(np.float32(1.0) - blocks[:, 0]))
    angle = np.float32(2.0 * np.pi) * blocks[:, 1]
    out = np.empty_like(blocks)
    np.multiply(radius, np.cos(angle), out=out[:, 0])
    np.multiply(radius, np.sin(angle), out=out[:, 1])
    return out.reshape(-1)


class SharedStream:
    """One generator for a whole batch, as diffusers uses a single one: image 0 depends on the batch size.

    Every member asks for its part of each draw; a draw is made when the first member asks for it and forgotten when
    the last one has.
    """

    def __init__(self, generator: Gaussians, members: int) -> None:
        self._generator = generator
        self._members = members
        self._drawn: list[tuple[Float32, set[int]]] = []
        self._taken = [0] * members
        self._first = 0

    def member(self, index: int) -> Gaussians:
        return _Member(self, index)

    def joint(self, shape: tuple[int, ...]) -> Float32:
        """A draw for all members at once."""
        return self._generator.randn(shape)

    def take(self, index: int, shape: tuple[int, ...]) -> Float32:
        at = self._taken[index] - self._first
        if at == len(self._drawn):
            self._drawn.append((self._generator.randn((self._members, *shape)), set()))
        values, takers = self._drawn[at]
        takers.add(index)
        self._taken[index] += 1
        while self._drawn and len(self._drawn[0][1]) == self._members:
            self._drawn.pop(0)
            self._first += 1
        mine: Float32 = values[index]
        return mine


class _Member:
    def __init__(self, stream: SharedStream, index: int) -> None:
        self._stream, self._index = stream, index

    def randn(self, shape: tuple[int, ...]) -> Float32:
        return self._stream.take(self._index, shape)


@dataclass(frozen=True, slots=True)
class RequestNoise:
    """Where a request's images take their noise from; `stream` when they share one."""

    members: tuple[Gaussians, ...]
    stream: SharedStream | None
    first_draws: bool = False

    def draw_for_pictures(self, count: int, shape: tuple[int, ...]) -> list[Float32]:
        """One unit draw an image for the latents of `count` pictures, as diffusers draws them.

        Images of one stream draw once a picture; images with seeds of their own draw for themselves, or with
        `first_draws` the first as many as there are pictures, for the others too.
        """
        if self.stream is None and self.first_draws:
            some = [member.randn(shape) for member in self.members[:count]]
            return [some[i % count] for i in range(len(self.members))]
        if self.stream is None:
            return [member.randn(shape) for member in self.members]
        drawn = self.stream.joint((count, *shape))
        return [drawn[i % count] for i in range(len(self.members))]


def make_generator(seed: int, device: str = "cpu") -> Gaussians:
    """The generator of a seed as torch has it on a device; see `check_seed_device`."""
    threads = check_seed_device(device)
    return TorchCpuGenerator(seed) if threads is None else TorchCudaGenerator(seed, threads=threads)


def check_seed_device(device: str) -> int | None:
    """The threads that a seed's GPU runs at once, which large draws depend on; `None` for the CPU.

    Devices are `"cpu"`, `"cuda"` (an A100's threads) and `"cuda:43008"`. Raises `UnknownNameError` for others.
    """
    if device == "cpu":
        return None
    kind, _, threads = str(device).partition(":")
    if kind != "cuda" or (threads and not (threads.isascii() and threads.isdigit())):
        raise UnknownNameError("seed device", str(device), ("cpu", "cuda", "cuda:THREADS"))
    return check_integer("threads", int(threads), 256, 2**31) if threads else THREADS


def request_noise(
    seeds: Sequence[int],
    *,
    shared: bool,
    device: str = "cpu",
    generators: Sequence[Gaussians] | None = None,
    first_draws: bool = False,
) -> RequestNoise:
    """A generator an image, or with `shared` the first one for all; `generators`, if given, instead of the seeds'."""
    sources = [make_generator(s, device) for s in seeds] if generators is None else list(generators)
    if shared:
        stream = SharedStream(sources[0], len(seeds))
        return RequestNoise(tuple(stream.member(i) for i in range(len(seeds))), stream)
    return RequestNoise(tuple(sources), None, first_draws)
