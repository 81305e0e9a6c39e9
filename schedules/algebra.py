"""Linear forms, and the tape that turns a sampler run on them into rows.

A sampler in scope is linear in everything but the network: its state, what it remembers and its noise enter with
coefficients that the schedule alone decides. So a sampler written as ordinary code can be run once on symbols
instead of arrays; what it hands to the network at evaluation i + 1, as a form of the symbols so far, *is* row i.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ..errors import FewstepError
from .levels import Level, Preconditioning

Kind = Literal["state", "anchor", "history", "noise", "clip"]
Keep = Literal["x0", "eps", "out"] | tuple[float, float]
"""What is remembered of an evaluation; two numbers are factors of its input and of its raw output."""


@dataclass(frozen=True, slots=True, order=True)
class Symbol:
    """One unknown: the state before evaluation `row`, an anchor, what is kept of it, or the unit noise after it.

    `clip` is what clipping the x0 of that evaluation adds to it: the one unknown that is not linear in the others.
    """

    kind: Kind
    row: int


class Form:
    """A linear combination of symbols, with the arithmetic that sampler code needs and no more."""

    __slots__ = ("terms",)

    def __init__(self, terms: dict[Symbol, float]) -> None:
        self.terms = terms

    def __add__(self, other: Form | Literal[0]) -> Form:
        if isinstance(other, int):
            return self
        terms = dict(self.terms)
        for symbol, c in other.terms.items():
            terms[symbol] = terms.get(symbol, 0.0) + c
        return Form(terms)

    __radd__ = __add__

    def __sub__(self, other: Form) -> Form:
        return self + (-1.0) * other

    def __mul__(self, factor: float) -> Form:
        return Form({symbol: factor * c for symbol, c in self.terms.items()})

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Form:
        return self * (1.0 / divisor)

    def __getitem__(self, symbol: Symbol) -> float:
        return self.terms.get(symbol, 0.0)

    def without(self, symbol: Symbol) -> Form:
        return Form({s: c for s, c in self.terms.items() if s != symbol})


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The network at one level: the same answer told as x0, as eps and as its raw output."""

    x0: Form
    eps: Form
    out: Form


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """One evaluation as the tape saw it.

    level: the state's; told: the one that the network is told, by which its output is read.
    h_x, h_out, h_clip: the kept quantity H = h_x * input + h_out * out + h_clip * (clipped x0 - x0).
    draws: whether the sampler drew a unit noise after it. spread: what a network's variance does to that (`Spread`).
    after: the next network input (or the result) over this row's input, kept quantities and noises.
    """

    level: Level
    told: Level
    h_x: float
    h_out: float
    h_clip: float
    draws: bool
    spread: float
    after: Form


class Tape:
    """Stands for the network while a sampler runs on symbols.

    The state that a row carries is the network's input itself, so that no separate input scaling is left at run
    time; `space` says in which coordinates the sampler is written: "vp" (x = alpha x0 + s noise, the input) or
    "ve" (x = x0 + sigma noise, of which the input is `level.scale` times).

    clips: whether x0 is clipped. The sampler's eps is then that of the clipped x0 with "eps", the network's own with
    "x0".
    """

    def __init__(
        self,
        precondition: Preconditioning,
        *,
        space: Literal["vp", "ve"],
        clips: Literal["x0", "eps"] | None = None,
    ) -> None:
        self.precondition = precondition
        self.space = space
        self.clips = clips
        self._levels: list[Level] = []
        self._told: list[Level] = []
        self._kept: list[tuple[float, float, float]] = []
        self._definitions: list[Form] = []
        self._anchors: dict[Symbol, Form] = {}
        self._draws: dict[int, float] = {}
        self.anchored = False

    def start(self, level: Level) -> Form:
        """The state before the first evaluation, in the sampler's coordinates."""
        return Form({Symbol("state", 0): 1.0 / self._input_scale(level)})

    def __call__(self, x: Form, level: Level, keep: Keep = "x0", *, told: Level | None = None) -> Evaluation:
        """Evaluate the network on state `x` at `level`; `keep` names the quantity that goes into the history.

        told: the level that the network is told, where that is not the state's: its output is read by that one.

        From here on `x` is known by the new row's state symbol (the form is renamed in place), so that what follows
        from it is said over this row, while states that the sampler kept from earlier stay said over theirs.
        """
        row = len(self._levels)
        if row:
            self._definitions.append(x * self._input_scale(level))
            x.terms = {Symbol("state", row): 1.0 / self._input_scale(level)}
        told = told or level
        reading = self.precondition.at(told)
        eps_clip = -told.scale / told.noise_scale if self.clips == "eps" else 0.0
        h_x, h_out, h_clip = (
            (*keep, 0.0)
            if isinstance(keep, tuple)
            else {
                "x0": (reading.x0_x, reading.x0_out, 1.0),
                "eps": (reading.eps_x, reading.eps_out, eps_clip),
                "out": (0.0, 1.0, 0.0),
            }[keep]
        )
        if h_out == 0.0:
            raise FewstepError(f"{keep} does not determine the network's output at sigma {told.sigma}")
        clip = Form({Symbol("clip", row): 1.0} if self.clips else {})
        self._levels.append(level)
        self._told.append(told)
        self._kept.append((h_x, h_out, h_clip if self.clips else 0.0))
        inputs, kept = Form({Symbol("state", row): 1.0}), Form({Symbol("history", row): 1.0})
        out = (kept - h_x * inputs - h_clip * clip) / h_out
        if keep == "x0":
            raw = kept if self.clips == "eps" else kept - clip
            return Evaluation(x0=kept, eps=(inputs - told.scale * raw) / told.noise_scale, out=out)
        x0 = reading.x0_x * inputs + reading.x0_out * out + clip
        eps = kept if keep == "eps" else reading.eps_x * inputs + reading.eps_out * out + eps_clip * clip
        return Evaluation(x0=x0, eps=eps, out=out)

    def noise(self, spread: float = 0.0) -> Form:
        """The unit Gaussian drawn after the latest evaluation, times exp(spread v) of the variance that it says."""
        row = len(self._levels) - 1
        self._draws[row] = spread
        return Form({Symbol("noise", row): 1.0})

    def hold(self, x: Form) -> Form:
        """Give a state between two calls a symbol of its own, to step from it again later (a corrector's anchor)."""
        row = len(self._levels) - 1
        symbol = Symbol("anchor", row)
        self._anchors[symbol] = self._reduce(x, row)
        return Form({symbol: 1.0})

    def finish(self, x: Form) -> list[Recorded]:
        """Close the tape with the sampler's result and read the rows off."""
        self._definitions.append(x)
        return [
            Recorded(
                level=level,
                told=self._told[row],
                h_x=self._kept[row][0],
                h_out=self._kept[row][1],
                h_clip=self._kept[row][2],
                draws=row in self._draws,
                spread=self._draws.get(row, 0.0),
                after=self._reduce(self._definitions[row], row),
            )
            for row, level in enumerate(self._levels)
        ]

    def _input_scale(self, level: Level) -> float:
        return 1.0 if self.space == "vp" else level.scale

    def _reduce(self, form: Form, row: int) -> Form:
        """Rewrite a form over the current state, kept quantities and noises alone: anchors are eliminated.

        An older state s is recovered from a newer one whose definition contains it,
        state_k = f s + rest  =>  s = (state_k - rest) / f, newest definition first.
        """
        for _ in range(4 * (row + 2)):
            stale = self._stale(form, row)
            if stale is None:
                return form
            factor = form[stale]
            form = form.without(stale) + factor * self._recover(stale, row)
        raise FewstepError("this sampler's anchors cannot be eliminated")

    @staticmethod
    def _stale(form: Form, row: int) -> Symbol | None:
        current = Symbol("state", row)
        old = [s for s, c in form.terms.items() if s.kind in ("state", "anchor") and s != current and c != 0.0]
        return min(old, key=lambda s: (s.row, s.kind)) if old else None

    def _recover(self, stale: Symbol, row: int) -> Form:
        if stale.kind == "anchor" and stale.row == row:
            return self._anchors[stale]
        for later in range(row, stale.row, -1):
            definition = self._definitions[later - 1]
            if definition[stale] != 0.0:
                self.anchored = True
                return (Form({Symbol("state", later): 1.0}) - definition.without(stale)) / definition[stale]
        raise FewstepError(f"no later state depends on the {stale.kind} of evaluation {stale.row}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ring:
    """Where each kept quantity lives: its slot, and how many slots there are."""

    write: list[int]
    slots: int


def assign_ring(last_use: Iterable[int]) -> Ring:
    """Give each kept quantity a slot from its row to its last use, reusing the slots of those no longer needed."""
    busy_until: list[int] = []
    write: list[int] = []
    for row, last in enumerate(last_use):
        free = [slot for slot, until in enumerate(busy_until) if until < row]
        slot = free[0] if free else len(busy_until)
        if not free:
            busy_until.append(last)
        busy_until[slot] = last
        write.append(slot)
    return Ring(write=write, slots=len(busy_until))
