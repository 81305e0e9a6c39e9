"""The NumPy device: slots in preallocated arrays on the CPU, moved on in place."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from ...engines import Binding, Engine, RunOptions
from ...engines.machine import available_memory
from ...errors import OutOfMemoryError
from ...schedules import Program
from ..arrays import Float32, Shape
from ..conditioning import conditioning_inputs, write_row
from .base import MOST_HISTORY, MOST_ROWS, VARIANCE, Decoded, Evaluator, Sampling, Slots, TickTimes, unet_dims
from .numpy_update import SlotState


class NumpyDevice:
    """The CPU, without torch."""

    name = engines = "cpu"
    whole_requests = records = False

    def run_options(self, run: RunOptions) -> RunOptions:
        return run

    def on_host(self, engine: Engine) -> Engine:
        return engine

    def make_slots(self, engine: Engine, shape: Shape, count: int) -> Slots:
        return NumpySlots(engine, slots=count, shape=shape)

    @contextmanager
    def guard_memory(self, doing: str) -> Iterator[None]:
        try:
            yield
        except MemoryError as error:
            raise OutOfMemoryError(
                f"memory does not suffice for {doing}",
                expected="less at once",
                remedy="Ask for fewer images or a smaller size at once; `fewstep memory BUNDLE` says what fits.",
            ) from error

    def free_bytes(self) -> int | None:
        return available_memory()


class NumpySlots(Slots):
    """Slots as NumPy arrays; see `Slots`."""

    def __init__(self, engine: Engine, *, slots: int, shape: Shape, most_rows: int = MOST_ROWS) -> None:
        super().__init__(engine, slots=slots, shape=shape, most_rows=most_rows)
        self._values = SlotState(slots, shape, MOST_HISTORY)
        self._bindings: dict[tuple[int, ...], _Rows] = {}
        self._mixed = np.zeros((slots, *shape), np.float32)
        self._times = TickTimes()

    @property
    def bytes(self) -> int:
        return self._values.bytes + self._mixed.nbytes

    def take_times(self) -> TickTimes:
        times, self._times = self._times, TickTimes()
        return times

    def _place(self, slot: int, sampling: Sampling, start: Float32) -> None:
        self._values.wipe(slot)
        self._values.latent[slot] = start

    def _clear(self, slot: int) -> None:
        self._values.wipe(slot)

    def _finish(self, slot: int, program: Program, into: Float32) -> None:
        self._values.finish(slot, program, into)

    def _state(self, slot: int) -> Float32:
        state: Float32 = self._values.latent[slot]
        return state

    def _run(self, slots: list[int], tokens: int, evaluations: int, decoder: Engine) -> Decoded:
        for _ in range(evaluations):
            self.tick(slots)
        binding = decoder.bind({"batch": len(slots), **self._sides})
        latents = binding.inputs["latent"]
        for slot, into in zip(slots, latents, strict=True):
            self._finish(slot, self.sampling(slot).program, into)
        binding.enqueue()
        finite = np.isfinite(latents).all(axis=(1, 2, 3)) & binding.outputs["finite"]
        return Decoded(images=binding.outputs["image"].copy(), latents=latents.copy(), finite=finite)

    def _evaluate(self, slots: list[int], tokens: int, rows: int, previews: Mapping[int, Float32]) -> None:
        began = time.perf_counter()
        samplings = [self.sampling(s) for s in slots]
        evaluator = self._evaluator(samplings)
        evaluation = self._rows(evaluator, max(rows, sum(s.rows for s in samplings)), tokens)
        row = 0
        for slot, sampling in zip(slots, samplings, strict=True):
            evaluation.timestep[row : row + sampling.rows] = sampling.program.timesteps[sampling.position]
            sample = evaluation.sample[row]
            self._values.model_input(slot, sampling.program, sampling.position, sample)
            factors = sampling.conditioning.factors(sampling.position)
            for i, arrays in enumerate(evaluator.parts(sampling)):
                if i:
                    np.copyto(evaluation.sample[row + i], sample)
                evaluation.tell(row + i, arrays, factors)
            row += sampling.rows
        gathered = time.perf_counter()
        evaluation.binding.enqueue()
        evaluated = time.perf_counter()
        outputs = self._guide(samplings, evaluation.out)
        variances = self._variances(samplings, evaluation.variance)
        guided = time.perf_counter()
        self._advance(slots, samplings, outputs, variances, previews)
        ended = time.perf_counter()
        self._times.gather += 1e3 * (gathered - began)
        self._times.evaluations.append(1e3 * (evaluated - gathered))
        self._times.guidance += 1e3 * (guided - evaluated)
        self._times.update += 1e3 * (ended - guided)

    def _guide(self, samplings: Sequence[Sampling], out: Float32) -> list[Float32]:
        """One output a slot."""
        outputs, row = [], 0
        for i, sampling in enumerate(samplings):
            if sampling.rows == 1:
                outputs.append(out[row])
            else:
                # u + g (c - u), with u the negative's row and c the prompt's
                mixed = self._mixed[i]
                np.subtract(out[row + 1], out[row], out=mixed)
                np.multiply(mixed, self._factor(sampling), out=mixed)
                np.add(mixed, out[row], out=mixed)
                outputs.append(mixed)
            row += sampling.rows
        return outputs

    @staticmethod
    def _variances(samplings: Sequence[Sampling], variance: Float32 | None) -> list[Float32] | None:
        """That of each slot's prompt, its last row, which no guidance changes."""
        if variance is None:
            return None
        last = itertools.accumulate(s.rows for s in samplings)
        return [variance[row - 1] for row in last]

    def _factor(self, sampling: Sampling) -> Float32 | np.float32:
        if not isinstance(sampling.guidance, tuple):
            return np.float32(sampling.guidance)
        return np.array(sampling.guidance, np.float32).reshape(-1, *(1,) * (len(self.shape) - 1))  # by frame

    def _advance(
        self,
        slots: Sequence[int],
        samplings: Sequence[Sampling],
        outputs: list[Float32],
        variances: list[Float32] | None,
        previews: Mapping[int, Float32],
    ) -> None:
        values = self._values
        for slot, sampling, output in zip(slots, samplings, outputs, strict=True):
            if slot in previews:
                values.preview(slot, sampling.program, sampling.position, output, previews[slot])
            if sampling.program.draws[sampling.position]:
                np.copyto(values.noise[slot], sampling.noise.randn(self.shape))
        programs, positions = [s.program for s in samplings], [s.position for s in samplings]
        values.advance(slots, programs, positions, outputs, variances)
        for slot, sampling in zip(slots, samplings, strict=True):
            if sampling.blend is not None:
                sampling.blend.apply(values.latent[slot], sampling.position, self._mixed[0])

    def _rows(self, evaluator: Evaluator, rows: int, tokens: int) -> _Rows:
        key = (rows, tokens, *evaluator.key)
        if key not in self._bindings:
            engine = evaluator.engine
            self._bindings[key] = _Rows(engine, engine.bind(unet_dims(self.shape, rows, tokens, evaluator.rank)), rows)
        return self._bindings[key]


class _Rows:
    """A binding's buffers by row; what a row is told already is not written again."""

    def __init__(self, engine: Engine, binding: Binding, rows: int) -> None:
        self.binding = binding
        self.sample: Float32 = binding.inputs["sample"]
        self.timestep: Float32 = binding.inputs["timestep"]
        self.out: Float32 = binding.outputs["out"]
        self.variance: Float32 | None = binding.outputs.get(VARIANCE)
        self._buffers = [(name, binding.inputs[name]) for name in conditioning_inputs(engine.inputs)]
        self._written: list[dict[str, tuple[Float32, float]]] = [{} for _ in range(rows)]

    def tell(self, row: int, arrays: Mapping[str, Float32], factors: Mapping[str, float]) -> None:
        written = self._written[row]
        for name, buffer in self._buffers:
            array, factor = arrays[name], factors.get(name, 1.0)
            known = written.get(name)
            if known is None or known[0] is not array or known[1] != factor:
                write_row(buffer[row, ...], array)
                if factor != 1.0:
                    np.multiply(buffer[row, ...], np.float32(factor), out=buffer[row, ...])
                written[name] = array, factor
