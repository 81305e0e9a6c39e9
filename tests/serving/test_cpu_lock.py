"""CpuLock: one at a time, what begins or finishes a request first; and servers whose engines take them."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

import fewstep
import numpy as np
import pytest
from fewstep.serving import Server
from fewstep.serving.cpu_lock import CpuLock
from fewstep.serving.policy import STRETCHES, _in_time
from test_policy import Sim


def test_ticks_wait_for_whoever_else_wants_the_cpu() -> None:
    cpu, order, running = CpuLock(used=True), [], []

    def take(kind: str) -> None:
        with getattr(cpu, kind)():
            running.append(kind)
            assert len(running) == 1
            order.append(kind)
            time.sleep(0.01)
            running.pop()

    def waits() -> int:
        return len(cpu._changed._waiters)  # type: ignore[attr-defined]

    with cpu.tick():
        threads = []
        for kind in ("tick", "before_ticks", "tick", "before_ticks"):
            threads.append(threading.Thread(target=take, args=(kind,)))
            threads[-1].start()
            until = time.monotonic() + 10
            while waits() < len(threads):
                assert time.monotonic() < until, f"{kind} does not wait"
                time.sleep(0.001)
    for thread in threads:
        thread.join(10)
    assert order == ["before_ticks", "before_ticks", "tick", "tick"]
    with pytest.raises(RuntimeError), cpu.before_ticks():
        raise RuntimeError
    with cpu.tick():
        pass
    with CpuLock(used=False).before_ticks(), CpuLock(used=False).tick():
        pass


@pytest.mark.parametrize("row_threads", [1, 2])
def test_evaluations_and_decoding_overlap_only_with_rows_in_parallel(
    student: fewstep.Pipeline, monkeypatch: pytest.MonkeyPatch, row_threads: int, psnr
) -> None:
    with Server(student, row_threads=row_threads, most_slots=8, most_rows=4, queue=40) as server:
        decode, began = student.vae.decode, threading.Event()
        overlaps = []

        def slow(latents: Any, **given: Any) -> Any:
            before = server.stats().ticks
            began.set()
            time.sleep(0.1)
            overlaps.append(server.stats().ticks - before)
            return decode(latents, **given)

        monkeypatch.setattr(student.vae, "decode", slow)
        long = server.submit("a ring", steps=60, sampler="euler", seed=0)
        short = [server.submit("a red circle", steps=2, sampler="euler", seed=i) for i in range(3)]
        results = [t.result(60) for t in short]
        long.result(60)
        assert began.is_set()
        assert (max(overlaps) == 0) == (row_threads == 1), overlaps
        monkeypatch.undo()
        for seed, result in enumerate(results):
            alone = student("a red circle", steps=2, sampler="euler", seed=seed)
            assert psnr(result.images, alone.images) >= 50.0
            assert np.isfinite(result.timings["decode"])


def test_decoding_in_turn_is_work_that_others_wait_for() -> None:
    """Five that would all be in time, were their decoders not to come one after the other."""
    sim = Sim()
    beside = [replace(sim.request(1), tail_s=0.05, alone_s=0.055) for _ in range(5)]
    in_turn = [replace(c, in_turn=True) for c in beside]
    assert [len(_in_time(cs, 1, STRETCHES[-1], 0.0).kept) for cs in (beside, in_turn)] == [5, 2]
