"""Scratch memory shared on a stream."""

from __future__ import annotations

import gc

import torch
from fewstep.engines.scratch import Scratch

CPU = torch.device("cpu")


def test_a_stream_has_one_block_as_large_as_what_was_told_before_its_first_use() -> None:
    small, large, elsewhere = (Scratch(torch, CPU, n) for n in (10, 30, 20))
    for user in (small, large):
        user.expect(7)
    assert small.on(7) is large.on(7)
    assert len(small.on(7)) == 30
    assert elsewhere.on(8) is not small.on(7)


def test_what_was_given_out_stays_and_is_let_go_with_its_last_user() -> None:
    first = Scratch(torch, CPU, 10)
    before = first.on(9)
    later = Scratch(torch, CPU, 50)
    assert len(later.on(9)) == 50
    assert first.on(9) is before, "recorded work has its address"
    assert Scratch(torch, CPU, 5).on(9) is later.on(9)
    del first, later, before
    gc.collect()
    assert len(Scratch(torch, CPU, 5).on(9)) == 5
