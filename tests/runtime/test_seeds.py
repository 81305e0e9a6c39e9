"""Seeds: torch's CPU generator, number for number, without torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fewstep.errors import ArgumentError
from fewstep.runtime.noise.seeds import SharedStream, TorchCpuGenerator

SHAPES = [(1, 4, 64, 64), (4, 16, 16), (16,), (17,), (3, 5, 7), (15,), (1,), (2, 3)]


@pytest.mark.parametrize("seed", [0, 1, 42, 2**32 - 1, 2**32 + 5, 2**63 + 11])
def test_a_stream_equals_torch(seed: int) -> None:
    reference = torch.Generator().manual_seed(seed if seed < 2**63 else seed - 2**64)
    ours = TorchCpuGenerator(seed)
    for shape in SHAPES * 2:
        np.testing.assert_allclose(
            ours.randn(shape), torch.randn(shape, generator=reference).numpy(), atol=2e-6, rtol=0
        )


def test_shared_stream_is_one_generator_for_the_batch() -> None:
    reference = torch.Generator().manual_seed(7)
    stream = SharedStream(TorchCpuGenerator(7), 3)
    members = [stream.member(i) for i in range(3)]
    first, second = (torch.randn(3, 4, 8, 8, generator=reference).numpy() for _ in range(2))
    for i, member in enumerate(members):
        np.testing.assert_allclose(member.randn((4, 8, 8)), first[i], atol=2e-6)
    for i in (2, 0, 1):
        np.testing.assert_allclose(members[i].randn((4, 8, 8)), second[i], atol=2e-6)
    assert not stream._drawn, "draws that everybody took are kept"


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "0", True, None])
def test_bad_seeds_are_refused(seed: object) -> None:
    with pytest.raises(ArgumentError, match="seed is"):
        TorchCpuGenerator(seed)  # type: ignore[arg-type]
