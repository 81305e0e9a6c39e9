"""The update of a slot's state by one evaluation's coefficients of its program, in place, in NumPy.

Nothing is allocated after construction but the small coefficient table of a program seen for the first time.
Coefficients are compiled in float64 and applied in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import ArgumentError
from ...schedules import Program
from ...schedules.clip import Bound
from ..arrays import Float32

Scalar = npt.NDArray[np.float32]
"""A factor as an array of no dimensions: NumPy multiplies by these faster than by Python floats."""


@dataclass(frozen=True, slots=True)
class _Coefficients:
    """One position's coefficients as the kernel wants them: without terms that do nothing (None), and with what nothing
    later reads folded into the factors of x and out.

    keep: (slot, factor of x or None, factor of out), the quantity to store, or None where nothing reads it.
    adds: whether it is stored times its own factor at this position, which so adds it as it is; the factors of
        later positions make up for that.
    x, out: factors of the state and of the network's output. terms: (slot, factor) of the history.
    c, c_prev: factors of this draw and of the one before. holds: whether the next position reads this draw again.
    clip: where x0 is clipped, its bound and the factors of what that changes in the stored quantity and in the state.
    spread: the logarithm by which the network's variance spreads this draw.
    """

    scale: Scalar | None
    keep: tuple[int, Scalar | None, Scalar] | None
    adds: bool
    x: Scalar | None
    out: Scalar | None
    terms: tuple[tuple[int, Scalar], ...]
    c: Scalar | None
    c_prev: Scalar | None
    holds: bool
    preview: tuple[Scalar | None, Scalar]
    clip: tuple[Bound, Scalar | None, Scalar | None] | None
    spread: Scalar | None


def _scalar(value: float) -> Scalar:
    return np.array(value, np.float32)


def _unless(value: float, idle: float) -> Scalar | None:
    return None if value == idle else _scalar(value)


def _compile(program: Program) -> list[_Coefficients]:
    table = []
    stored_as = np.ones(program.history)
    for i in range(program.evaluations):
        slot, p, q = int(program.write[i]), float(program.h_x[i]), float(program.h_out[i])
        b = program.b[i]
        own = float(b[slot])
        x, out, keep, adds = float(program.a[i]) + own * p, own * q, None, False
        terms = tuple((int(k), _scalar(b[k] / stored_as[k])) for k in np.flatnonzero(b) if k != slot)
        if _is_read_later(program, i):
            # Added as it is stored, unless its own factor is so small that storing it times that would blow up others.
            adds = abs(own) > 1e-3
            stored_as[slot] = own if adds else 1.0
            keep = (slot, _unless(p * stored_as[slot], 0.0), _scalar(q * stored_as[slot]))
            if adds:
                x, out = float(program.a[i]), 0.0
        clip = None
        if program.clip is not None:
            kept, state = float(program.clip.h[i]), float(program.clip.x[i])
            stored = kept * stored_as[slot] if keep is not None else 0.0
            moved = state if adds else state + own * kept
            clip = (program.clip.bound, _unless(stored, 0.0), _unless(moved, 0.0))
        following = i + 1 < program.evaluations and bool(program.c_prev[i + 1])
        table.append(
            _Coefficients(
                scale=_unless(float(program.input_scale[i]), 1.0),
                keep=keep,
                adds=adds,
                x=_unless(x, 1.0),
                out=_unless(out, 0.0),
                terms=terms,
                c=_unless(float(program.c[i]), 0.0),
                c_prev=_unless(float(program.c_prev[i]), 0.0),
                holds=following,
                preview=(_unless(float(program.x0_x[i]), 0.0), _scalar(float(program.x0_out[i]))),
                clip=clip,
                spread=None if program.spread is None else _unless(float(program.spread.log[i]), 0.0),
            )
        )
    return table


def _is_read_later(program: Program, i: int) -> bool:
    """Whether a position after i reads the ring slot that i writes, before it is written anew."""
    slot = program.write[i]
    for later in range(i + 1, program.evaluations):
        if program.write[later] == slot:
            return False
        if program.b[later, slot] != 0.0:
            return True
    return False


class SlotState:
    """The sampling state of S slots, each walking its own program.

    latent: float32 [S, *shape], the network's input before scaling.
    history: float32 [S, K, *shape], the kept quantities, each up to a factor that the tables know.
    noise: float32 [S, *shape], the unit draw for the coming position; the caller fills it where
    `program.draws[position]`.
    """

    def __init__(self, slots: int, shape: tuple[int, ...], history: int) -> None:
        if slots < 1 or history < 1 or any(d < 1 for d in shape):
            raise ArgumentError(f"{slots} slots of shape {shape} with {history} history", expected="positive sizes")
        self.latent: Float32 = np.zeros((slots, *shape), np.float32)
        self.history: Float32 = np.zeros((slots, history, *shape), np.float32)
        self.noise: Float32 = np.zeros((slots, *shape), np.float32)
        self._held: Float32 = np.zeros((slots, *shape), np.float32)
        self._scratch: Float32 = np.zeros(shape, np.float32)
        self._converted: Float32 = np.zeros(shape, np.float32)
        self._change: Float32 = np.zeros(shape, np.float32)
        self._latents = list(self.latent)
        self._histories = [list(rings) for rings in self.history]
        self._noises = list(self.noise)
        self._helds = list(self._held)
        self._tables: list[tuple[Program | None, list[_Coefficients]]] = [(None, [])] * slots

    def wipe(self, slot: int) -> None:
        """Forget who was in a slot. A zero coefficient would not silence a NaN, so the memory itself is zeroed."""
        self._latents[slot].fill(0.0)
        self.history[slot].fill(0.0)
        self._noises[slot].fill(0.0)
        self._helds[slot].fill(0.0)
        self._tables[slot] = (None, [])

    @property
    def bytes(self) -> int:
        return sum(a.nbytes for a in (self.latent, self.history, self.noise, self._held))

    def table(self, slot: int, program: Program) -> list[_Coefficients]:
        """The slot's coefficients for `program`, one entry a position, compiled when the slot first sees it."""
        known, table = self._tables[slot]
        if known is program:
            return table
        if program.history > self.history.shape[1] and program.remembers:
            raise ArgumentError(
                f"program {program.sampler!r} needs {program.history} history slots",
                expected=f"at most the {self.history.shape[1]} this state was made with",
                remedy="Make SlotState with a larger history.",
            )
        table = _compile(program)
        self._tables[slot] = (program, table)
        return table

    def model_input(self, slot: int, program: Program, i: int, out: npt.NDArray[Any]) -> None:
        """Write the network's input at position i into `out`, a float32 or float16 view of the engine's buffer."""
        known, table = self._tables[slot]
        if known is not program:
            table = self.table(slot, program)
        scale = table[i].scale
        if scale is None:
            out[...] = self._latents[slot]
        else:
            np.multiply(self._latents[slot], scale, out=out, casting="same_kind")

    def advance(
        self,
        slots: Sequence[int],
        programs: Sequence[Program],
        positions: Sequence[int],
        outputs: Sequence[npt.NDArray[Any]] | npt.NDArray[Any],
        variances: Sequence[npt.NDArray[Any]] | None = None,
    ) -> None:
        """Move slots[j] on from positions[j] of programs[j], given outputs[j] of the network (float32 or float16).

        variances: what it says of its variance, for programs whose noise that spreads.
        """
        for j, (slot, program, i, output) in enumerate(zip(slots, programs, positions, outputs, strict=True)):
            known, table = self._tables[slot]
            if known is not program:
                table = self.table(slot, program)
            if (log := table[i].spread) is not None:
                self._spread(slot, log, None if variances is None else variances[j])
            self._advance(slot, table[i], output)

    def _spread(self, slot: int, log: Scalar, variance: npt.NDArray[Any] | None) -> None:
        """n exp(log v) in place of the unit draw n."""
        if variance is None:
            raise ArgumentError("the program's noise is spread by a variance", expected="a network that says one")
        np.multiply(variance, log, out=self._scratch)
        np.exp(self._scratch, out=self._scratch)
        np.multiply(self._noises[slot], self._scratch, out=self._noises[slot])

    def preview(self, slot: int, program: Program, i: int, output: npt.NDArray[Any], into: Float32) -> None:
        """Write x0 as the output at position i implies it into `into`; before `advance`, which moves the state on."""
        step = self.table(slot, program)[i]
        self._x0(slot, step, self._as_float32(output), into)
        if step.clip is not None:
            into[...] = step.clip[0].clipped(into)

    def _x0(self, slot: int, step: _Coefficients, output: Float32, into: Float32) -> None:
        x_factor, out_factor = step.preview
        np.multiply(output, out_factor, out=into)  # x0 = x0_x x + x0_out out
        if x_factor is not None:
            np.multiply(self._latents[slot], x_factor, out=self._scratch)
            np.add(into, self._scratch, out=into)

    def finish(self, slot: int, program: Program, into: npt.NDArray[Any]) -> None:
        """Write the slot's result, in diffusers' latent coordinates, into `into`."""
        scale = float(program.state_scale[-1])
        if not math.isfinite(scale):
            raise ArgumentError(f"state scale {scale}", expected="a finite number")
        np.multiply(self._latents[slot], scale, out=into, casting="same_kind")

    def _as_float32(self, output: npt.NDArray[Any]) -> Float32:
        if output.dtype == np.float32:
            return output
        np.copyto(self._converted, output)
        return self._converted

    def _advance(self, slot: int, step: _Coefficients, output: npt.NDArray[Any]) -> None:
        x, scratch, history = self._latents[slot], self._scratch, self._histories[slot]
        multiply, add = np.multiply, np.add
        if output.dtype != np.float32:
            output = self._as_float32(output)
        if step.clip is not None:
            bound, clip_kept, clip_moved = step.clip
            self._x0(slot, step, output, self._change)
            np.subtract(bound.clipped(self._change), self._change, out=self._change)  # d = clip(x0) - x0
        if step.keep is not None:
            ring, p, q = step.keep
            kept = history[ring]
            multiply(output, q, kept)  # H[write] = h_x x + h_out out
            if p is not None:
                multiply(x, p, scratch)
                add(kept, scratch, kept)
            if step.clip is not None and clip_kept is not None:
                multiply(self._change, clip_kept, scratch)
                add(kept, scratch, kept)  # + h d
        if step.x is not None:
            multiply(x, step.x, x)  # x' = a x ...
        if step.out is not None:
            multiply(output, step.out, scratch)
            add(x, scratch, x)  # + b[write] H[write], where nothing later reads H[write]: its part in out
        if step.clip is not None and clip_moved is not None:
            multiply(self._change, clip_moved, scratch)
            add(x, scratch, x)  # + x d
        if step.adds:
            add(x, kept, x)  # + b[write] H[write], stored with its factor
        for ring, factor in step.terms:
            multiply(history[ring], factor, scratch)
            add(x, scratch, x)  # + b[k] H[k]
        if step.c is not None:
            multiply(self._noises[slot], step.c, scratch)
            add(x, scratch, x)  # + c n_i
        if step.c_prev is not None:
            multiply(self._helds[slot], step.c_prev, scratch)
            add(x, scratch, x)  # + c_prev n_{i-1}
        if step.holds:
            np.copyto(self._helds[slot], self._noises[slot])
