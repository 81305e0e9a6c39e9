"""Gaussian noise from a seed as torch's CUDA generator gives it, without torch and without a GPU.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a counter of four 32-bit words
is mixed with the seed in ten rounds. PyTorch gives element i of a draw the thread i of its kernel: the counter is
(offset / 4, 0, i, 0), and the element is what its first two words make as radius and angle (Box and Muller, the sine,
as cuRAND has it). A draw moves the offset by 4. A tensor of more elements than the GPU runs threads at once wraps
around: thread t then makes the elements t, t + T, t + 2T and t + 3T of all four words, with T threads in all.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..arguments import check_integer, check_seed
from ..arrays import Float32

UInt32 = npt.NDArray[np.uint32]

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF
_BLOCK = 256
_PER_CALL = 4
_IN_CACHE = 4096
"""Threads whose words are mixed at once: six arrays of 64 bits fit a core's cache."""
_2POW32_INV = np.float32(2.0**-32)
_2POW32_INV_2PI = np.float32(2.0**-32 * 6.2831855)
THREADS = 108 * 8 * _BLOCK
"""Threads that an A100 runs at once, 221,184: its 108 multiprocessors times 2048. Draws of fewer elements (a latent of
up to 1880 x 1880 pixels) are the same on every GPU that runs as many; an RTX 3060, with 43,008, wraps earlier."""


def philox(counter: UInt32, key: tuple[int, int]) -> UInt32:
    """Philox4x32-10 of counters uint32 [4, n] under a key of two 32-bit words: uint32 [4, n]."""
    c0, c1, c2, c3 = (counter[i].astype(np.uint64) for i in range(4))
    first, second = np.empty_like(c0), np.empty_like(c0)
    k0, k1 = key
    low, shift = np.uint64(_WORD), np.uint64(32)
    for _ in range(_ROUNDS):
        np.multiply(c0, _MULTIPLIERS[0], out=first)
        np.multiply(c2, _MULTIPLIERS[1], out=second)
        # (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0))
        np.right_shift(second, shift, out=c0)
        np.bitwise_xor(c0, c1, out=c0)
        np.bitwise_xor(c0, np.uint64(k0), out=c0)
        np.bitwise_and(second, low, out=c1)
        np.right_shift(first, shift, out=c2)
        np.bitwise_xor(c2, c3, out=c2)
        np.bitwise_xor(c2, np.uint64(k1), out=c2)
        np.bitwise_and(first, low, out=c3)
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return np.stack([c0, c1, c2, c3]).astype(np.uint32)


class TorchCudaGenerator:
    """`torch.Generator("cuda").manual_seed(seed)`: successive `randn` calls continue one stream.

    `threads` is what the GPU runs at once, its multiprocessors times the threads of each (rounded down to blocks of
    256): it matters for draws of more elements only.
    """

    def __init__(self, seed: int, *, offset: int = 0, threads: int = THREADS) -> None:
        check_seed(seed)
        self.seed = int(seed)
        self.offset = check_integer("offset", offset, 0, 2**62)
        self.threads = check_integer("threads", threads, _BLOCK, 2**31) // _BLOCK * _BLOCK

    def randn(self, shape: tuple[int, ...]) -> Float32:
        """Unit noise, float32 of `shape`, as `torch.randn(shape, generator=..., device="cuda")` draws it."""
        count = int(np.prod(shape, dtype=np.int64))
        if count == 0:
            return np.empty(shape, np.float32)
        threads = min(-(-count // _BLOCK) * _BLOCK, self.threads)
        passes = (count - 1) // (threads * _PER_CALL) + 1
        used = min(4, -(-count // threads))
        normals = np.concatenate([self._normals(threads, i, used).reshape(-1) for i in range(passes)])
        self.offset += passes * _PER_CALL
        return normals[:count].reshape(shape)

    def _normals(self, threads: int, call: int, used: int) -> Float32:
        """The first `used` of the four that each thread's `call`-th turn gives, float32 [used, threads]."""
        at = self.offset // _PER_CALL + call
        normals = np.empty((-(-used // 2) * 2, threads), np.float32)
        for begin in range(0, threads, _IN_CACHE):
            part = slice(begin, min(begin + _IN_CACHE, threads))
            counter = np.zeros((4, part.stop - begin), np.uint32)
            counter[0], counter[1] = at & _WORD, at >> 32
            counter[2] = np.arange(begin, part.stop, dtype=np.uint32)
            bits = philox(counter, (self.seed & _WORD, self.seed >> 32))
            for half in range(0, len(normals), 2):
                normals[half, part], normals[half + 1, part] = _box_muller(bits[half], bits[half + 1])
        return normals[:used]


def _box_muller(x: UInt32, y: UInt32) -> tuple[Float32, Float32]:
    """cuRAND's pair of normals from two words of random bits: the sine's first, then the cosine's."""
    u = x.astype(np.float32) * _2POW32_INV + _2POW32_INV / np.float32(2)
    v = y.astype(np.float32) * _2POW32_INV_2PI + _2POW32_INV_2PI / np.float32(2)
    radius = np.sqrt(np.float32(-2.0) * np.log(u))
    return radius * np.sin(v), radius * np.cos(v)
