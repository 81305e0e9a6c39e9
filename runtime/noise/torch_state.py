"""A torch generator's noise without torch: its state is read from its bytes, and written back when it was used."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from ...errors import ArgumentError, UnsupportedError
from ..arguments import LARGEST_SEED
from ..arrays import UInt8
from .seeds import Gaussians, TorchCpuGenerator
from .torch_cuda import TorchCudaGenerator

_CPU_BYTES, _CUDA_BYTES = 5056, 16
_WORDS = 624
_HEAD = struct.Struct("<Qii Q")
"""Of the CPU generator: seed, values left of the 624, whether it was seeded, index of the next. Then come the 624 words
as 64-bit integers, three float64, of which the second is a normal kept for the next call, and whether one is kept."""
_NORMALS = struct.Struct("<dddi")


def is_generator(value: object) -> bool:
    """Whether a value is used as torch.Generator is."""
    return all(hasattr(value, name) for name in ("get_state", "set_state", "initial_seed", "device"))


def read_generator(generator: Any) -> Gaussians:
    """What a torch generator will draw; `write_back` moves the generator on by what was drawn."""
    state: UInt8 = generator.get_state().numpy()
    kind = getattr(generator.device, "type", str(generator.device))
    if kind == "cpu" and len(state) == _CPU_BYTES:
        seed, left, _, following = _HEAD.unpack_from(state.data)
        words = state[_HEAD.size : _HEAD.size + 8 * _WORDS].view(np.uint64).astype(np.uint32)
        _, kept, _, valid = _NORMALS.unpack_from(state.data, _HEAD.size + 8 * _WORDS)
        position = _WORDS if left == 1 else following
        return TorchCpuGenerator.at(seed, words, position, kept if valid else None)
    if kind == "cuda" and len(state) == _CUDA_BYTES:
        seed, offset = struct.unpack("<QQ", state.tobytes())
        return TorchCudaGenerator(seed, offset=offset)
    raise UnsupportedError(
        f"a generator of {kind!r} with {len(state)} bytes of state", expected="torch's CPU or CUDA generator"
    )


def write_back(generator: Any, drawn: Gaussians) -> None:
    """Leave a torch generator where drawing what `drawn` drew would have left it."""
    tensor = generator.get_state()
    state: UInt8 = tensor.numpy()
    if isinstance(drawn, TorchCudaGenerator):
        state[:] = np.frombuffer(struct.pack("<QQ", drawn.seed, drawn.offset), np.uint8)
    elif isinstance(drawn, TorchCpuGenerator):
        words, position, kept = drawn.position()
        seed, _, seeded, _ = _HEAD.unpack_from(state.data)
        left, following = (1, 0) if position == _WORDS else (_WORDS - position + 1, position)
        state[: _HEAD.size] = np.frombuffer(_HEAD.pack(seed, left, seeded, following), np.uint8)
        state[_HEAD.size : _HEAD.size + 8 * _WORDS] = words.astype(np.uint64).view(np.uint8)
        normals = _NORMALS.pack(0.0, kept or 0.0, 0.0, int(kept is not None))
        state[_HEAD.size + 8 * _WORDS :][: _NORMALS.size] = np.frombuffer(normals, np.uint8)
    generator.set_state(tensor)


def seed_of(generator: Any) -> int:
    """The seed a generator was made with, for a picture's parameters."""
    seed = int(generator.initial_seed())
    if not 0 <= seed <= LARGEST_SEED:
        raise ArgumentError(f"a generator's seed is {seed}", expected="0 to 2^64 - 1")
    return seed
