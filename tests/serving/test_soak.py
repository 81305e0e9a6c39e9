"""A few hundred requests of `bench/soak.py`: cancels, disconnects, bad inputs, overload."""

from __future__ import annotations

import os

import fewstep
from fewstep.bench.soak import soak


def test_overload_with_hostile_clients_leaves_nothing_behind(student: fewstep.Pipeline) -> None:
    found = soak(student, requests=300, clients=64)
    assert found["wrong"] == []
    seen = found["seen"]
    assert {"image 200", "image 429", "left", "bad 400"} <= set(seen), seen
    assert not [kind for kind in seen if kind.startswith("connection") or kind.endswith(" 500")]
    before, after = found["before"], found["after"]
    pool = min(32, (os.cpu_count() or 1) + 4)  # the event loop's own threads, which come as they are needed
    assert after["threads"] <= before["threads"] + pool
    assert after["files"] <= before["files"] + 4
    assert after["memory_mb"] < before["memory_mb"] + 60
    assert found["server"]["failed"] == 0
