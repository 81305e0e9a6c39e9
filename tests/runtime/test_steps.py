"""A step that is kept: it shows its own call's latents or refuses, whoever has the slots by then."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import fewstep
import numpy as np
import pytest
from fewstep.errors import ArgumentError, FewstepError
from fewstep.runtime.result import Step

CALL = {"steps": 4, "sampler": "euler", "schedule": "trailing", "guidance": 0.0}
GONE_ON = "gone on, or ended"


@pytest.fixture(scope="module", params=["cpu", "cpu:torch"])
def pipe(request: pytest.FixtureRequest) -> fewstep.Pipeline:
    from fewstep.export.embedded import embedded_bundle

    return fewstep.load(embedded_bundle("student")[0], backend="torch", device=request.param, mode="shared", threads=1)


def kept_steps(pipe: fewstep.Pipeline) -> Iterator[tuple[str, Step]]:
    """A step of a call in each way that a call can go on without it; the set of slots is one, and used again."""
    request = pipe.request("a star", seed=1, **CALL)
    stream = pipe.stream(request)
    first = next(stream)
    second = next(stream)
    yield "the next evaluation", first
    stream.close()
    yield "a stream that was closed", second
    told: list[Step] = []
    pipe.run(request, on_step=told.append)
    for step in told:
        yield "a call that returned", step
    del told[:]

    def fail(step: Step) -> None:
        told.append(step)
        raise KeyError

    with pytest.raises(KeyError):
        pipe.run(request, on_step=fail)
    yield "a call that raised", told[0]


def test_a_kept_step_refuses_instead_of_reading_another_calls_latents(pipe: fewstep.Pipeline) -> None:
    for how, step in kept_steps(pipe):
        with pytest.raises(ArgumentError, match=GONE_ON):
            step.latents()
        other = pipe.stream(pipe.request("a red circle", seed=2, **CALL))
        while next(other).index < step.index:
            pass  # the other call stands in the same slots, as many evaluations on
        with pytest.raises(ArgumentError, match=GONE_ON):
            pytest.fail(f"{how}: {step.latents().shape}")
        other.close()


def test_a_step_reads_its_own_latents_until_the_call_goes_on(pipe: fewstep.Pipeline) -> None:
    """From any thread, at any moment: what this evaluation left, or a refusal, and never what a later one makes."""
    request = pipe.request("a star", seed=1, **CALL)
    expected = [s.latents() for s in pipe.stream(request)]
    assert len({e.tobytes() for e in expected}) == len(expected)
    seen: list[tuple[int, Any]] = []
    refused: set[str] = set()
    steps: list[Step] = []
    over = threading.Event()

    def read() -> None:
        while not over.is_set():
            for step in list(steps):
                try:
                    seen.append((step.index, step.latents()))
                except FewstepError as error:
                    refused.add(error.found)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for step in pipe.stream(request):
            steps.append(step)
            while not any(i == step.index for i, _ in list(seen)):
                over.wait(0.001)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert all(GONE_ON in words for words in refused)
    assert {i for i, _ in seen} == set(range(len(expected)))
    for index, latents in seen:
        np.testing.assert_array_equal(latents, expected[index])
