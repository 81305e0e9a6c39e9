"""Schedules that were found for one model and one sampler: what the file of them holds, and their programs.

The file is JSON. For each number of steps it has the levels, and where they help the timesteps fed at them, options of
the sampler and fitted rows; beside that, for whom and how it was found, and how near to its teacher it came on prompts
and seeds that it was not found on.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ArgumentError, CorruptError, MismatchError, MissingError
from ..places import write_whole
from ..values import Reader, parse_json, read_json
from .compile import compile_program
from .fitted import MOST_KEPT, FittedRow, Kept, fitted_program
from .names import SEARCHED, resolve_sampler
from .noise import NoiseSchedule
from .options import check_option
from .program import Program
from .solvers.registry import find_sampler

KIND, FORMAT = "fewstep schedules", 1
METHODS = ("known", "klub", "trajectory", "endpoint", "rows")
MOST_STEPS = 1000
LEAST_SIGMA = 1e-8
MOST_FACTOR = 1e6
"""Of a fitted row; those of samplers stay below the infinite level's 4096."""
FORCE = "force this one: --force-schedule, or load_schedules(path, force=True)."


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundEntry:
    """What was found for one number of steps.

    sigmas [steps + 1]: falling, the last one where sampling ends. fed [steps]: timesteps for the network, `None`: the
    sigmas' own. options: of the sampler. rows: fitted ones, over what `kept` says, `None`: the sampler's own. between:
    sigmas [steps + 1] for the sampler's own rows, of which other numbers of steps are made. figures: on held-out
    prompts and seeds, for people.
    """

    steps: int
    method: str
    sigmas: tuple[float, ...]
    fed: tuple[float, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    kept: Kept | None = None
    rows: tuple[FittedRow, ...] | None = None
    between: tuple[float, ...] | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)

    def program(self, sampler: str, *, noise: NoiseSchedule, prediction: str | None = None, start: int = 0) -> Program:
        """Compile it; raises what `compile_program` raises."""
        asked: dict[str, Any] = {"sigmas": self.sigmas, "fed": self.fed, "prediction": prediction, **self.options}
        if self.rows is None or self.kept is None:
            program = compile_program(sampler, noise=noise, start=start, **asked)
        else:
            program = fitted_program(sampler, self.rows, self.kept, noise=noise, start=start, **asked)
        return replace(program, schedule=SEARCHED)

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {"steps": self.steps, "method": self.method, "sigmas": [*map(float, self.sigmas)]}
        data |= {k: [*map(float, v)] for k in ("fed", "between") if (v := getattr(self, k)) is not None}
        data |= {k: dict(v) for k in ("options", "figures") if (v := getattr(self, k))}
        if self.rows is not None:
            data |= {"kept": self.kept, "rows": [[row.a, *row.b] for row in self.rows]}
        return data


@dataclass(frozen=True, kw_only=True)
class FoundSchedules:
    """A file of found schedules of one sampler for one model.

    sampler: its canonical name. model: the digest of the network it was found on, and noise_digest that of its noise
    schedule. guidance, size (width, height): what it was found at. made: how it was found, for people. forced: whether
    it is used with whatever model and sampler.
    """

    sampler: str
    model: str
    noise_digest: str
    guidance: float
    size: tuple[int, int]
    entries: tuple[FoundEntry, ...]
    made: Mapping[str, Any] = field(default_factory=dict)
    forced: bool = False

    @property
    def steps(self) -> tuple[int, ...]:
        """The numbers of steps that were searched, rising."""
        return tuple(e.steps for e in self.entries)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what decides the pictures, in hexadecimal: how it was found and how good it is do not count."""
        data = self.to_json()
        for entry in data["entries"]:
            entry.pop("figures", None)
        text = json.dumps([data["sampler"], data["entries"]], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def nearest(self, steps: int) -> int:
        """So many steps where they lie between the fewest and the most that were searched, else the nearer of these."""
        return min(max(steps, self.steps[0]), self.steps[-1])

    def entry(self, steps: int) -> FoundEntry:
        """The one of so many steps; between searched ones, levels linear in ln(sigma) over the index, as the AYS paper
        interpolates (arXiv 2404.14507), of the next longer one.

        Raises `ArgumentError` for fewer steps than the fewest searched, and for more than the most.
        """
        found = {e.steps: e for e in self.entries}
        if steps in found:
            return found[steps]
        if not self.steps[0] <= steps <= self.steps[-1]:
            raise ArgumentError(
                f"{steps} steps of a schedule that was found for {', '.join(map(str, self.steps))}",
                expected=f"from {self.steps[0]} to {self.steps[-1]}",
                remedy=f"Search for it too: fewstep schedule search BUNDLE --steps {steps}",
            )
        longer = next(e for e in self.entries if e.steps > steps)
        return FoundEntry(
            steps=steps, method=longer.method, sigmas=interpolate_levels(longer.between or longer.sigmas, steps)
        )

    def program(self, steps: int, *, noise: NoiseSchedule, prediction: str | None = None, start: int = 0) -> Program:
        """The program of so many steps; raises as `entry` and `compile_program` do, `MismatchError` for another noise
        schedule than it was found on."""
        if noise_digest(noise) != self.noise_digest and not self.forced:
            raise MismatchError(
                "a schedule that was found on another noise schedule",
                expected=f"one of digest {self.noise_digest[:12]}, found {noise_digest(noise)[:12]}",
                remedy=f"Search one for this model, or {FORCE}",
            )
        return self.entry(steps).program(self.sampler, noise=noise, prediction=prediction, start=start)

    def check(self, *, model: str, sampler: str | None) -> None:
        """Raise `MismatchError` for another model's digest or another sampler than it was found for, unless forced."""
        if self.forced:
            return
        if model != self.model:
            raise MismatchError(
                f"a schedule that was found for another model ({self.made.get('bundle', self.model[:12])})",
                expected=f"the network of digest {self.model[:12]}, found {model[:12]}",
                remedy=f"Search one for this model (fewstep schedule search BUNDLE), or {FORCE}",
            )
        if sampler is not None and resolve_sampler(sampler).name != self.sampler:
            raise MismatchError(
                f"a schedule that was found for {self.sampler}, with the sampler {sampler}",
                expected=f"sampler {self.sampler}, or none",
                remedy=f"Search one for this sampler, or {FORCE}",
            )

    def warnings(self, *, guidance: float, size: tuple[int, int]) -> list[str]:
        """What a request goes against, in words; at 1 and below there is no guidance, whatever the number."""
        words = []
        if max(guidance, 1.0) != max(self.guidance, 1.0):
            words.append(f"the schedule was found at guidance {self.guidance:g}, and {guidance:g} is asked for")
        if size != self.size:
            words.append(
                f"the schedule was found at {self.size[0]}x{self.size[1]}, and {size[0]}x{size[1]} is asked for"
            )
        return words

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": KIND,
            "format": FORMAT,
            "sampler": self.sampler,
            "model": self.model,
            "noise": self.noise_digest,
            "guidance": self.guidance,
            "size": list(self.size),
            "entries": [e.to_json() for e in self.entries],
            "made": dict(self.made),
        }

    def to_text(self) -> str:
        """The file's text; whether these are forced is not in it."""
        return json.dumps(self.to_json(), indent=1) + "\n"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file; what was there stays until the new one is whole."""
        return write_whole(Path(path), self.to_text())


def noise_digest(noise: NoiseSchedule) -> str:
    """SHA-256 of a noise schedule, in hexadecimal: of alpha-bar to 12 digits, and of what the network is fed."""
    rounded = np.round(noise.alpha_bar, 12) + 0.0
    return hashlib.sha256(rounded.tobytes() + noise.timestep_type.encode()).hexdigest()


def interpolate_levels(sigmas: tuple[float, ...], steps: int) -> tuple[float, ...]:
    """Levels for another number of steps: linear in ln(sigma) over the index, both ends kept; the end may be 0."""
    inner = np.log(np.maximum(sigmas, 1e-12))[: len(sigmas) - (sigmas[-1] == 0.0)]
    count = steps + 1 - (sigmas[-1] == 0.0)
    if count == 1:
        return (sigmas[0], sigmas[-1])
    places = np.linspace(0, len(inner) - 1, count)
    levels = np.exp(np.interp(places, np.arange(len(inner)), inner))
    levels[0] = sigmas[0]
    return tuple(map(float, levels)) + ((0.0,) if sigmas[-1] == 0.0 else ())


def load_schedules(path: str | os.PathLike[str], *, force: bool = False) -> FoundSchedules:
    """Read a file that `fewstep schedule search BUNDLE` wrote. force: use it with whatever model and sampler.

    Raises `MissingError` where there is none, `CorruptError` for anything but such a file.
    """
    target = Path(path)
    if not target.is_file():
        raise MissingError(f"no file {str(target)!r}", expected="a file of `fewstep schedule search BUNDLE`")
    return replace(_found(read_json(target, target.name, finite=True), target.name), forced=force)


def parse_schedules(text: str | bytes, place: str) -> FoundSchedules:
    """The same from text; place: what holds it, for messages."""
    return _found(parse_json(text, place, finite=True), place)


def _found(data: object, place: str) -> FoundSchedules:
    reading = Reader(place=place, remedy="Search it again: fewstep schedule search BUNDLE.")
    stated = reading.mapping("itself", data)
    reading.choice("kind", stated.get("kind"), (KIND,))
    reading.integer("format", stated.get("format"), FORMAT, FORMAT)
    size = reading.array("size", stated.get("size"), 2, 2)
    sampler = _sampler(stated.get("sampler"), reading)
    entries = [_entry(e, sampler, reading) for e in reading.array("entries", stated.get("entries"), 1, MOST_STEPS)]
    counts = [e.steps for e in entries]
    if counts != sorted(set(counts)):
        raise reading.wrong("entries", counts, "entries of rising numbers of steps")
    return FoundSchedules(
        sampler=sampler,
        model=reading.text("model", stated.get("model"), most=128),
        noise_digest=reading.text("noise", stated.get("noise"), most=128),
        guidance=reading.number("guidance", stated.get("guidance"), 0.0, 1000.0),
        size=(reading.integer("width", size[0], 1), reading.integer("height", size[1], 1)),
        entries=tuple(entries),
        made=reading.mapping("made", stated.get("made", {})),
    )


def _sampler(name: object, reading: Reader) -> str:
    """A sampler's canonical name; a spelling that carries a schedule or options is none."""
    resolved = resolve_sampler(reading.text("sampler", name, most=64))
    if resolved.schedule is not None or resolved.options:
        raise reading.wrong("sampler", name, f"{resolved.name}, with options in the entries")
    return resolved.name


def _options(stated: object, sampler: str, reading: Reader) -> Mapping[str, Any]:
    """Options of the sampler, by name and range."""
    known = find_sampler(sampler).options
    for name, value in reading.mapping("options", stated).items():
        reading.choice(f"an option of {sampler}", name, known)
        try:
            check_option(name, value, known[name])
        except ArgumentError as error:
            raise CorruptError(f"{reading.place}: {error}", remedy=reading.remedy) from error
    return reading.mapping("options", stated)


def _entry(data: object, sampler: str, reading: Reader) -> FoundEntry:
    stated = reading.mapping("an entry", data)
    steps = reading.integer("steps", stated.get("steps"), 1, MOST_STEPS)
    numbers = {
        name: tuple(reading.number(name, v) for v in reading.array(name, stated.get(name), count, count))
        for name, count in (("sigmas", steps + 1), ("fed", steps), ("between", steps + 1))
        if name in stated or name == "sigmas"
    }
    for name in ("sigmas", "between"):
        levels = numbers.get(name)
        if levels is None:
            continue
        if levels[-1] < 0 or levels[-2] < LEAST_SIGMA or any(a <= b for a, b in itertools.pairwise(levels)):
            raise reading.wrong(name, list(levels), f"falling numbers of {LEAST_SIGMA:g} or more, the last perhaps 0")
    rows = None
    if "rows" in stated:
        listed = [reading.array("a row", row, 2, 1 + MOST_KEPT) for row in reading.array("rows", stated["rows"], 1)]
        parts = [[reading.number("a row's factor", v, -MOST_FACTOR, MOST_FACTOR) for v in row] for row in listed]
        rows = tuple(FittedRow(a, tuple(b)) for a, *b in parts)
    kept = None if rows is None else reading.choice("kept", stated.get("kept"), ("x0", "eps"))
    return FoundEntry(
        steps=steps,
        method=reading.choice("method", stated.get("method"), METHODS),
        sigmas=numbers["sigmas"],
        fed=numbers.get("fed"),
        between=numbers.get("between"),
        options=_options(stated.get("options", {}), sampler, reading),
        kept="eps" if kept == "eps" else "x0" if kept else None,
        rows=rows,
        figures=reading.mapping("figures", stated.get("figures", {})),
    )
