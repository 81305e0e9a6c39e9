"""Rows in parallel: the parts' own bits in the parts' places, failures and all, and threads that go with the server."""

from __future__ import annotations

import threading
from typing import Any

import fewstep
import numpy as np
import pytest
from fewstep.engines.parallel import ParallelEngine
from fewstep.errors import ArgumentError
from fewstep.serving import Server

DIMS = {"height": 8, "width": 8, "tokens": 77}


def fill(binding: Any, seed: int) -> None:
    noise = np.random.default_rng(seed)
    for values in binding.inputs.values():
        values[...] = noise.standard_normal(values.shape)


@pytest.mark.parametrize(("rows", "ways", "parts"), [(1, 2, [1]), (2, 2, [1, 1]), (5, 2, [2, 3]), (7, 3, [2, 2, 3])])
def test_each_part_is_what_it_is_alone(student: fewstep.Pipeline, rows: int, ways: int, parts: list[int]) -> None:
    unet = student.engines["unet"]
    engine = ParallelEngine(unet, ways=ways)
    whole = engine.bind({**DIMS, "rows": rows})
    for seed in (1, 2):
        fill(whole, seed)
        whole.enqueue()
        at = 0
        for count in parts:
            part = unet.bind({**DIMS, "rows": count})
            for name, values in part.inputs.items():
                values[...] = whole.inputs[name][at : at + count]
            part.enqueue()
            np.testing.assert_array_equal(whole.outputs["out"][at : at + count], part.outputs["out"])
            at += count
        assert at == rows
    engine.close()


@pytest.mark.parametrize("broken", [0, 1])
def test_a_part_that_raises_is_heard_and_the_next_evaluation_is_right(
    student: fewstep.Pipeline, monkeypatch: pytest.MonkeyPatch, broken: int
) -> None:
    engine = ParallelEngine(student.engines["unet"], ways=2)
    whole: Any = engine.bind({**DIMS, "rows": 4})
    fill(whole, 1)
    whole.enqueue()
    expected = whole.outputs["out"].copy()
    part = whole._parts[broken][1]
    with monkeypatch.context() as spoiled:
        spoiled.setattr(type(part), "enqueue", lambda self: 1 / (self is not part))
        with pytest.raises(ZeroDivisionError):
            whole.enqueue()
    whole.outputs["out"][...] = 0
    whole.enqueue()
    np.testing.assert_array_equal(whole.outputs["out"], expected)
    engine.close()


def test_what_cannot_be_split_is_refused(student: fewstep.Pipeline) -> None:
    with pytest.raises(ArgumentError, match="without rows"):
        ParallelEngine(student.engines["vae_decoder"], ways=2)
    with pytest.raises(ArgumentError, match="split in 1"):
        ParallelEngine(student.engines["unet"], ways=1)
    with pytest.raises(ArgumentError, match="row_threads"):
        Server(student, row_threads=0)


def test_threads_go_with_the_server(student: fewstep.Pipeline) -> None:
    def helpers() -> list[threading.Thread]:
        return [t for t in threading.enumerate() if t.name == "fewstep-rows"]

    before = set(helpers())
    with Server(student, row_threads=3, most_rows=4) as server:
        made = [t for t in helpers() if t not in before]
        assert len(made) == 2
        server.generate("a circle", steps=1, guidance=2.0)
    for thread in made:
        thread.join(10)
        assert not thread.is_alive()
