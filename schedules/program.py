"""The program: a sampler under a schedule as one row of coefficients per evaluation of the network."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError, CorruptError, FewstepError
from ..values import Reader, parse_json
from .algebra import Recorded, Symbol, assign_ring
from .clip import Bound, Clip
from .noise import ZERO_SNR_FLOOR
from .spread import Spread

Array = npt.NDArray[np.float64]
Floats = npt.NDArray[np.floating[Any]]
Output = Floats | tuple[Floats, Floats]
"""What a network gives: out, or out and the variance that it says."""

FORMAT, CLIPPED_FORMAT, LEARNED_FORMAT = 1, 2, 3
"""A program that clips, and one that thresholds or whose noise a network spreads, are of formats of their own, so that
no reader of another leaves that out."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class Program:
    """One row per evaluation i of the network, with K ring slots of history and a unit noise n_i drawn after it:

        in_i         = input_scale x
        H[write]     = h_x x + h_out out_i
        x'           = a x + sum_k b[k] H[k] + c n_i + c_prev n_{i-1}
        x0 (preview) = x0_x x + x0_out out_i

    All arrays are float64 unless said otherwise, n rows long unless said otherwise, and read-only.

    sampler, schedule, prediction: names, for people.
    steps, start: steps of the whole schedule, and how many of them are skipped (img2img).
    timesteps: what the network is fed. sigmas [n + 1]: the noise level at each row, and that of the result
        (4096 stands for the infinite one of zero terminal SNR).
    input_scale: 1 for every sampler here, since the state *is* the network's input.
    h_x, h_out; write int64: the kept quantity, and the ring slot it goes to.
    a; b [n, K]; c; c_prev: the update. b is by physical ring slot, after the write. A slot that b names with 0 may
        hold anything. c_prev is not 0 in two-stage stochastic samplers only (their second stage, from one anchor).
    draws bool: whether the reference draws a unit noise at this row, even where c is 0.
    state_scale [n + 1]: factor from the state before row i (and at the end) to diffusers' latent.
    init_latent, init_noise: the starting state is init_latent * latent + init_noise * gaussian.
    anchored: whether a row steps from an earlier state, which it recovers from the present one: then nothing may
        change the state between two rows but where the outcome is overwritten too.
    clip: what clipping x0 adds to the rows, or `None`.
    spread: what a network that says its variance makes of their noise, or `None`.
    """

    sampler: str
    schedule: str
    prediction: str
    steps: int
    start: int
    timesteps: Array
    sigmas: Array
    input_scale: Array
    h_x: Array
    h_out: Array
    write: npt.NDArray[np.int64]
    a: Array
    b: Array
    c: Array
    c_prev: Array
    draws: npt.NDArray[np.bool_]
    x0_x: Array
    x0_out: Array
    state_scale: Array
    init_latent: float
    init_noise: float
    anchored: bool = False
    clip: Clip | None = None
    spread: Spread | None = None

    def __post_init__(self) -> None:
        n = len(self.timesteps)
        if n == 0 or self.b.ndim != 2 or self.b.shape[1] == 0:
            raise CorruptError("a program without rows or without history slots")
        for name, value in self._arrays():
            shape = (n, self.history) if name == "b" else (n + 1,) if name in ("sigmas", "state_scale") else (n,)
            if value.shape != shape:
                raise CorruptError(f"program field {name!r} has shape {value.shape}", expected=str(shape))
            if not np.all(np.isfinite(value)):
                raise CorruptError(f"program field {name!r} is not finite ({self.sampler}, {self.schedule})")
            value.setflags(write=False)
        for addition in (self.clip, self.spread):
            if addition is not None:
                addition.check(n)
        if not ((self.write >= 0) & (self.write < self.history)).all():
            raise CorruptError("program field 'write' names a slot that does not exist")

    @property
    def evaluations(self) -> int:
        """Evaluations of the network: the number of rows."""
        return len(self.timesteps)

    @property
    def history(self) -> int:
        """Ring slots of history: K."""
        return int(self.b.shape[1])

    @property
    def remembers(self) -> bool:
        """Whether any row uses what an earlier one kept; if not, the history need not be stored."""
        used = self.b != 0.0
        used[np.arange(self.evaluations), self.write] = False
        return bool(used.any())

    def run(
        self,
        model: Callable[[Floats, float], Output],
        gaussian: Floats,
        draw: Callable[[], Floats],
        latent: Floats | None = None,
    ) -> Floats:
        """The reference loop: what every runtime has to reproduce.

        model(x, t) -> out, or for a program with a spread (out, v), all of gaussian's shape and float type, which are
        one image's where x0 is thresholded; draw() gives the next unit noise and is called exactly where the reference
        would draw. `latent` is needed, and used, when `start` > 0. Returns the latent in diffusers' coordinates.
        """
        walk = self.walk(gaussian, draw, latent)
        asked = next(walk)
        while True:
            try:
                asked = walk.send(model(*asked))
            except StopIteration as end:
                result: Floats = end.value
                return result

    def walk(
        self, gaussian: Floats, draw: Callable[[], Floats], latent: Floats | None = None
    ) -> Generator[tuple[Floats, float], Output, Floats]:
        """The same loop as a generator, so that several share evaluations: yields (x, t), is sent what it gives."""
        if self.init_latent and latent is None:
            raise ArgumentError(
                f"this program starts after {self.start} steps from a latent", remedy="Pass latent=..., or start=0."
            )
        x = self.init_noise * gaussian
        if self.init_latent and latent is not None:
            x = x + self.init_latent * latent
        history: list[Floats] = [np.zeros_like(gaussian)] * self.history
        noise = previous = np.zeros_like(gaussian)
        for i in range(self.evaluations):
            output = yield float(self.input_scale[i]) * x, float(self.timesteps[i])
            out, variance = output if isinstance(output, tuple) else (output, None)
            history[self.write[i]] = float(self.h_x[i]) * x + float(self.h_out[i]) * out
            change = None
            if self.clip is not None:
                change = self.clip.change(float(self.x0_x[i]) * x + float(self.x0_out[i]) * out)
                history[self.write[i]] = history[self.write[i]] + float(self.clip.h[i]) * change
            if self.draws[i]:
                previous, noise = noise, draw()
                if self.spread is not None and self.spread.log[i]:
                    noise = noise * self.spread.factor(i, _given(variance))
            x = float(self.a[i]) * x
            if self.clip is not None and change is not None:
                x = x + float(self.clip.x[i]) * change
            for k in np.flatnonzero(self.b[i]):
                x = x + float(self.b[i, k]) * history[k]
            if self.c[i]:
                x = x + float(self.c[i]) * noise
            if self.c_prev[i]:
                x = x + float(self.c_prev[i]) * previous
        return float(self.state_scale[-1]) * x

    def to_json(self) -> str:
        """JSON text; `from_json` gives the same program back, bit for bit."""
        data: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("clip", "spread"):
                continue
            data[field.name] = value.tolist() if isinstance(value, np.ndarray) else value
        if self.clip is not None:
            data["clip"] = self.clip.to_json()
        if self.spread is not None:
            data["spread"] = self.spread.log.tolist()
        return json.dumps({"format": _format(data), **data})

    @classmethod
    def from_json(cls, text: str) -> Program:
        """Raises CorruptError when the text is not a program of this format."""
        reading = Reader(place="the text of a program")
        try:
            data = dict(reading.mapping("itself", parse_json(text, reading.place, finite=True)))
            if data.pop("format") != _format(data):
                raise CorruptError(
                    "a program of another format version",
                    expected=f"format {FORMAT}, {CLIPPED_FORMAT} with clip, or {LEARNED_FORMAT} with ratio or spread",
                )
            kinds = {"write": np.int64, "draws": np.bool_}
            clip = Clip.from_json(data.pop("clip")) if "clip" in data else None
            spread = Spread(log=np.array(data.pop("spread"), np.float64)) if "spread" in data else None
            return cls(
                clip=clip,
                spread=spread,
                **{
                    name: np.array(value, kinds.get(name, np.float64)) if isinstance(value, list) else value
                    for name, value in data.items()
                },
            )
        except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
            raise CorruptError(f"this text is not a program: {error}") from error

    def _arrays(self) -> list[tuple[str, npt.NDArray[Any]]]:
        pairs = [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]
        return [(name, value) for name, value in pairs if isinstance(value, np.ndarray)]


def _format(data: Mapping[str, Any]) -> int:
    """The format of a program's JSON."""
    if "spread" in data or "ratio" in data.get("clip", ()):
        return LEARNED_FORMAT
    return CLIPPED_FORMAT if "clip" in data else FORMAT


def _given(variance: Floats | None) -> Floats:
    if variance is None:
        raise ArgumentError("this program's noise is spread by the network's variance, and none was given")
    return variance


def program_from_rows(
    rows: Sequence[Recorded],
    *,
    names: tuple[str, str, str],
    steps: int,
    start: int,
    init: tuple[float, float],
    previews: Sequence[tuple[float, float]],
    state_scale: Sequence[float],
    final_sigma: float,
    anchored: bool = False,
    bound: Bound | None = None,
) -> Program:
    """Lay recorded rows out as a program: kept quantities get ring slots, and what nobody remembers is kept raw.

    names: sampler, schedule, prediction. init: factors of latent and Gaussian. previews: (x0_x, x0_out) a row.
    bound: of x0, where the rows were recorded with clipping.
    """
    count = len(rows)
    last_use = list(range(count))
    for later, row in enumerate(rows):
        for symbol, factor in row.after.terms.items():
            if symbol.kind == "history" and factor != 0.0:
                last_use[symbol.row] = max(last_use[symbol.row], later)
    ring = assign_ring(last_use)
    a, c, c_prev = np.zeros(count), np.zeros(count), np.zeros(count)
    b = np.zeros((count, ring.slots))
    h_x, h_out = np.array([row.h_x for row in rows]), np.array([row.h_out for row in rows])
    h_clip, x_clip = np.array([row.h_clip for row in rows]), np.zeros(count)
    for i, row in enumerate(rows):
        _check_noise(row, i, rows)
        a[i] = row.after[Symbol("state", i)]
        c[i] = row.after[Symbol("noise", i)]
        c_prev[i] = row.after[Symbol("noise", i - 1)]
        x_clip[i] = row.after[Symbol("clip", i)]
        for symbol, factor in row.after.terms.items():
            if symbol.kind == "history":
                b[i, ring.write[symbol.row]] += factor
        if last_use[i] == i:
            a[i] += h_x[i] * b[i, ring.write[i]]
            x_clip[i] += h_clip[i] * b[i, ring.write[i]]
            b[i, ring.write[i]] *= h_out[i]
            h_x[i], h_out[i], h_clip[i] = 0.0, 1.0, 0.0
    sampler, schedule, prediction = names
    return Program(
        sampler=sampler,
        schedule=schedule,
        prediction=prediction,
        steps=steps,
        start=start,
        timesteps=np.array([row.told.t for row in rows]),
        sigmas=np.minimum([row.level.sigma for row in rows] + [final_sigma], ZERO_SNR_FLOOR**-0.5),
        input_scale=np.ones(count),
        h_x=h_x,
        h_out=h_out,
        write=np.array(ring.write, np.int64),
        a=a,
        b=b,
        c=c,
        c_prev=c_prev,
        draws=np.array([row.draws for row in rows]),
        x0_x=np.array([x for x, _ in previews]),
        x0_out=np.array([out for _, out in previews]),
        state_scale=np.array(state_scale, np.float64),
        init_latent=init[0],
        init_noise=init[1],
        anchored=anchored,
        clip=None if bound is None else Clip(bound=bound, h=h_clip, x=x_clip),
        spread=Spread(log=np.array([row.spread for row in rows])) if any(row.spread for row in rows) else None,
    )


def _check_noise(row: Recorded, i: int, rows: Sequence[Recorded]) -> None:
    """A row may use its own draw and, if both rows draw, the one before; of clipping, its own alone."""
    for symbol, factor in row.after.terms.items():
        if symbol.kind == "clip" and factor != 0.0 and symbol.row != i:
            raise FewstepError(f"row {i} uses what was clipped at evaluation {symbol.row}, which no row can hold")
        if symbol.kind != "noise" or factor == 0.0 or symbol.row == i:
            continue
        if symbol.row != i - 1 or not (row.draws and rows[i - 1].draws):
            raise FewstepError(f"row {i} uses the noise drawn after evaluation {symbol.row}, which no row can hold")
