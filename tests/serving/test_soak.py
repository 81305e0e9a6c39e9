"""A few hundred requests of `bench/soak.py`: cancels, disconnects, bad inputs, overload."""

from __future__ import annotations

import os

from fewstep.bench.soak import soak


def test_overload_with_hostile_clients_leaves_nothing_behind() -> None:
    found = soak(requests=300, clients=64)
    assert found["wrong"] == []
    attacks = found["attacks"]
    assert {"dripping", "origin 403", "garbage 400", "socket"} <= set(attacks), attacks
    assert attacks.get("large picture 200", 0) + attacks.get("large picture 429", 0) > 0, attacks
    seen, server = found["seen"], found["server"]
    assert {"image 200", "image 429", "left", "bad 400"} <= set(seen), seen
    assert not [kind for kind in seen if kind.startswith("connection")]
    assert not [status for status in server["responses"] if status.startswith("5")]
    assert set(server["outcomes"]) == {"ok", "CancelledError"}
    before, after = found["before"], found["after"]
    pool = min(32, (os.cpu_count() or 1) + 4)  # the event loop's own threads, which come as they are needed
    assert after["threads"] <= before["threads"] + pool
    assert after["files"] <= before["files"] + 4
    # the allocator keeps what pictures of 4096x4096 took while they were decoded, two at a time
    assert after["memory_mb"] < before["memory_mb"] + 300
