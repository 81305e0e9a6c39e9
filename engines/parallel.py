"""Rows in parallel: an engine whose evaluations are split among threads, for engines that use one thread each.

Threads that share out every operator of an evaluation wait for one another hundreds of times; threads with rows of
their own wait once. For small models that is faster, and a core that something else is using costs less.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from itertools import pairwise
from typing import Any

import numpy as np

from ..errors import ArgumentError
from .base import Binding, Engine, TensorSpec
from .profile import check_dims


class ParallelEngine:
    """An engine on the CPU whose rows are evaluated in up to `ways` parts at once, as equal as can be.

    All inputs and outputs must have rows as their first dimension (`ArgumentError`). Bindings share its threads; one
    of them is evaluated at a time.
    """

    def __init__(self, engine: Engine, *, ways: int) -> None:
        tensors = (*engine.inputs.values(), *engine.outputs.values())
        wrong = [t.name for t in tensors if not t.shape or t.shape[0] != "rows"]
        if wrong or engine.device != "cpu" or ways < 2:
            raise ArgumentError(
                f"an engine on {engine.device} with {len(wrong)} tensors without rows cannot be split in {ways}",
                expected="an engine of rows on a CPU, and two parts or more",
            )
        self._engine, self._ways = engine, ways
        self._helpers = [_Helper() for _ in range(ways - 1)]

    @property
    def backend(self) -> str:
        return self._engine.backend

    @property
    def device(self) -> str:
        return "cpu"

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        return self._engine.inputs

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        return self._engine.outputs

    @property
    def capture(self) -> str:
        return "none"

    def bind(self, dims: Mapping[str, int]) -> Binding:
        """As the engine's; raises what it raises when it does not admit the parts."""
        check_dims((*self.inputs.values(), *self.outputs.values()), dims)
        rows = dims["rows"]
        parts = min(self._ways, rows)
        if parts < 2:
            return self._engine.bind(dims)
        edges = [i * rows // parts for i in range(parts + 1)]
        return _Split(
            [(slice(a, b), self._engine.bind({**dims, "rows": b - a})) for a, b in pairwise(edges)],
            {n: np.zeros(s.resolve(dims), s.dtype) for n, s in self.inputs.items()},
            {n: np.zeros(s.resolve(dims), s.dtype) for n, s in self.outputs.items()},
            self._helpers,
        )

    def close(self) -> None:
        """End its threads, after what they are doing; bindings cannot be evaluated any more."""
        for helper in self._helpers:
            helper.close()


class _Helper:
    """A thread that does what it is given. It is a daemon: a hung evaluation must not keep the process alive."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], None], Future[None]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="fewstep-rows", daemon=True).start()

    def put(self, call: Callable[[], None]) -> Future[None]:
        done: Future[None] = Future()
        self._jobs.put((call, done))
        return done

    def close(self) -> None:
        self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            call, done = job
            try:
                call()
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(None)


class _Split:
    """Buffers of all rows, and bindings of the parts, between which rows are copied: microseconds."""

    def __init__(
        self,
        parts: list[tuple[slice, Binding]],
        inputs: Mapping[str, Any],
        outputs: Mapping[str, Any],
        helpers: list[_Helper],
    ) -> None:
        self._parts, self._helpers = parts, helpers
        self.inputs, self.outputs = inputs, outputs

    def enqueue(self, stream: int | None = None) -> None:
        """Evaluate all parts; returns, or raises what one of them raised, when none is running any more."""
        if stream is not None:
            raise ArgumentError("a CUDA stream was given to an engine on the CPU", expected="no stream")
        others = [
            helper.put(lambda part=part: self._evaluate(*part))  # type: ignore[misc]
            for helper, part in zip(self._helpers, self._parts[1:], strict=False)
        ]
        try:
            self._evaluate(*self._parts[0])
        finally:
            wait(others)
        for other in others:
            other.result()

    def _evaluate(self, rows: slice, binding: Binding) -> None:
        for name, values in binding.inputs.items():
            np.copyto(values, self.inputs[name][rows])
        binding.enqueue()
        for name, values in binding.outputs.items():
            np.copyto(self.outputs[name][rows], values)
