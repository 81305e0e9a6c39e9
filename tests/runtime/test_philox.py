"""Philox against published vectors, and its noise against published values of torch on CUDA. Not run on a GPU."""

from __future__ import annotations

from typing import Any

import fewstep
import numpy as np
import pytest
from fewstep.errors import ArgumentError, UnknownNameError
from fewstep.runtime.noise.torch_cuda import THREADS, TorchCudaGenerator, philox
from fewstep.runtime.pictures.parameters import command_line

VECTORS = [  # Random123's kat_vectors, philox4x32 of 10 rounds: counter, key, result
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
SEED_0 = [  # torch.randn on CUDA with seed 0, as the A1111 web UI documents it
    [-0.92466259, -0.42534415, -2.6438457, 0.14518388],
    [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
    [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
]


def words(text: str) -> np.ndarray:
    return np.array([int(w, 16) for w in text.split()], np.uint32)


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_the_published_vectors(counter: str, key: str, expected: str) -> None:
    first, second = (int(w) for w in words(key))
    np.testing.assert_array_equal(philox(words(counter)[:, None], (first, second))[:, 0], words(expected))


def test_the_published_noise() -> None:
    np.testing.assert_allclose(TorchCudaGenerator(0).randn((3, 4)), SEED_0, atol=1e-6)


def reference(seed: int, offset: int, count: int, threads: int) -> tuple[np.ndarray, int]:
    """PyTorch's kernel as its source states it, one thread after the other, in float64."""
    blocks = min(-(-count // 256), threads // 256)
    total = blocks * 256
    out = np.full(count, np.nan)
    passes = (count - 1) // (total * 4) + 1
    for thread in range(total):
        for call in range(passes):
            at = offset // 4 + call
            counter = np.array([at & 0xFFFFFFFF, at >> 32, thread, 0], np.uint32)
            bits = philox(counter[:, None], (seed & 0xFFFFFFFF, seed >> 32))[:, 0].astype(np.float64)
            normals = []
            for x, y in (bits[:2], bits[2:]):
                radius = np.sqrt(-2 * np.log((x + 0.5) / 2**32))
                angle = 2 * np.pi * (y + 0.5) / 2**32
                normals += [radius * np.sin(angle), radius * np.cos(angle)]
            for i, value in enumerate(normals):
                place = thread + call * total * 4 + i * total
                if place < count:
                    out[place] = value
    return out, offset + passes * 4


@pytest.mark.parametrize("count", [1, 255, 600, 1100, 2600])
def test_large_draws_wrap_around_the_threads_of_the_gpu(count: int) -> None:
    seed, offset = 2**40 + 17, 8
    generator = TorchCudaGenerator(seed, offset=offset, threads=512)
    expected, after = reference(seed, offset, count, 512)
    np.testing.assert_allclose(generator.randn((count,)), expected, atol=3e-6)
    assert generator.offset == after


def test_draws_continue_one_stream_of_unit_noise() -> None:
    generator = TorchCudaGenerator(5)
    first, second = generator.randn((4, 64, 64)), generator.randn((4, 64, 64))
    assert generator.offset == 8
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.02
    both = np.concatenate([first.ravel(), second.ravel()])
    assert abs(both.mean()) < 0.02
    assert abs(both.std() - 1) < 0.02
    np.testing.assert_array_equal(TorchCudaGenerator(5, offset=4).randn((4, 64, 64)), second)
    assert TorchCudaGenerator(5).randn((0, 3)).shape == (0, 3)
    assert TorchCudaGenerator(5, threads=1000).threads == 768
    with pytest.raises(ArgumentError, match="seed is -1"):
        TorchCudaGenerator(-1)


def test_requests_by_the_seeds_of_a_gpu(sd1_bundle: Any) -> None:
    pipe = fewstep.load(sd1_bundle)
    call = {"steps": 2, "guidance": 1.0, "sampler": "euler"}
    result = pipe("a", seed=[7, 8], seed_device="cuda", **call)
    shape = result.latents.shape[1:]
    noise = np.stack([TorchCudaGenerator(s).randn(shape) for s in (7, 8)])
    np.testing.assert_array_equal(result.images, pipe(["a", "a"], latents=noise, **call).images)
    assert np.abs(result.images.astype(int) - pipe("a", seed=[7, 8], **call).images).max() > 20
    assert "--seed-device=cuda" in command_line(result.parameters[0], "x.png")
    joint = pipe(["a", "b"], seed=7, seed_device=f"cuda:{THREADS}", shared_stream=True, **call)
    together = TorchCudaGenerator(7).randn((2, *shape))
    np.testing.assert_array_equal(joint.images, pipe(["a", "b"], latents=together, **call).images)
    for wrong in ("gpu", "cuda:many", "cuda:3"):
        with pytest.raises((UnknownNameError, ArgumentError)):
            pipe("a", seed=1, seed_device=wrong, **call)
