"""Measuring contenders in one run: rounds in which each takes its turn, so that the machine's moods fall on all alike.

Workers live as long as the run; only the one that was asked computes. Where all of them do not fit into memory
together, fewstep meets some of its peers at a time (`peers_at_once`), and each meeting has rounds of its own.

Before and after each turn a probe tells how many cores the machine gives. Figures are of all turns, and once more of
those alone in which it gave all.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FewstepError
from .probe import CoreProbe
from .report import make_report
from .samples import Plan, Samples
from .workers import CONTENDERS, ContenderWorker, contender

Say = Callable[[str], None]
OURS = "fewstep"
SLOW_START_MS = 20_000.0
SETTLE_S = 0.1
"""Between turns: the threads of some libraries go on spinning after their work, and would slow the next contender's."""


def run(plan: Plan, say: Say) -> dict[str, Any]:
    """Measure; returns the report's data: by contender, and the ratios of each to each variant of fewstep."""
    names = [*plan.variants, *(_label(p, d) for p in plan.against for d in _precisions(plan, p))]
    samples = {n: Samples() for n in names}
    casts = [names]
    peers = [n for n in names if n not in plan.variants]
    if plan.peers_at_once and peers:
        size = plan.peers_at_once
        casts = [[*plan.variants, *peers[i : i + size]] for i in range(0, len(peers), size)]
    meetings = []
    for cast in casts:
        with tempfile.TemporaryDirectory() as folder:
            meetings.append(Meeting(plan, cast, Path(folder), say))
            meetings[-1].run()
    _cold_starts(plan, names, samples, say)
    for meeting in meetings:
        for name, part in meeting.samples.items():
            _merge(samples[name], part)
    return make_report(plan, samples, [meeting.samples for meeting in meetings])


def _precisions(plan: Plan, peer: str) -> tuple[str, ...]:
    """Those of the peer that are asked for, or its own."""
    own = contender(peer).precisions
    return tuple(p for p in plan.precisions if p in own) or own[:1]


def _label(peer: str, precision: str) -> str:
    return peer if precision == "float32" else f"{peer} {precision}"


class Meeting:
    """Workers that take turns. One that fails is out, with its error in its samples."""

    def __init__(self, plan: Plan, names: Sequence[str], folder: Path, say: Say) -> None:
        self.plan, self.say = plan, say
        self.samples = {n: Samples() for n in names}
        self._saved = {n: str(folder / f"{i}.npy") for i, n in enumerate(names)}
        self._inputs = folder / "inputs.npz"
        self._workers: dict[str, ContenderWorker] = {}
        if plan.unet is not None:
            arrays: dict[str, Any] = dict(_unet_inputs(plan.unet))
            np.savez(self._inputs, **arrays)

    def run(self) -> None:
        """Start the workers, warm them, and measure: `samples` holds them by contender."""
        probe = CoreProbe(self.plan.threads)
        try:
            for name in self.samples:
                self._load(name)
            for steps in self.plan.steps:
                self._rounds(steps, probe)
            for name in self._workers:
                if Path(self._saved[name]).is_file():
                    self.samples[name].output = np.load(self._saved[name])
        finally:
            probe.close()
            for worker in self._workers.values():
                worker.close()

    def _load(self, name: str) -> None:
        try:
            self._workers[name] = _start(self.plan, name)
        except FewstepError as error:
            self._out(name, error)
            return
        answer = self._ask(name, do="load", **_load(self.plan, name))
        if answer:
            samples = self.samples[name]
            samples.import_ms, samples.load_ms = answer["import_ms"], answer["load_ms"]
            samples.versions, samples.facts = answer["versions"], answer["facts"]
            self.say(f"{name}: loaded in {answer['load_ms']:.0f} ms")

    def _rounds(self, steps: int, probe: CoreProbe) -> None:
        question = _question(self.plan, steps, self._inputs)
        for name in list(self._workers):
            for _ in range(max(1, self.plan.warm_up)):
                self._ask(name, **question, save=self._saved[name])
        for turn in range(self.plan.repeat):
            before = probe.cores()
            for name in _rotated(list(self._workers), turn):
                for _ in range(self.plan.lead_in):
                    self._ask(name, **question)
                answer = self._ask(name, **question)
                time.sleep(SETTLE_S)
                after = probe.cores()
                if answer:
                    samples = self.samples[name]
                    samples.cores.setdefault(steps, []).append(round(min(before, after), 2))
                    samples.wall.setdefault(steps, []).append(answer["wall_ms"])
                    samples.cpu.setdefault(steps, []).append(answer["cpu_ms"])
                    samples.stages.setdefault(steps, []).append(answer["stages"])
                    samples.peak_mb = answer["peak_mb"]
                before = after
        medians = ", ".join(f"{n} {np.median(self.samples[n].wall[steps]):.1f} ms" for n in self._workers)
        self.say(f"{steps} step{'s' * (steps != 1)}: {medians}")

    def _ask(self, name: str, **question: Any) -> dict[str, Any] | None:
        if name not in self._workers:
            return None
        try:
            return self._workers[name].ask(**question)
        except FewstepError as error:
            self._workers.pop(name).close()
            self._out(name, error)
            return None

    def _out(self, name: str, error: FewstepError) -> None:
        self.samples[name].error = str(error)
        self.say(f"{name} is out: {error}")


def _rotated(names: list[str], turn: int) -> list[str]:
    """The order of a round: each contender comes first as often as any other."""
    first = turn % len(names) if names else 0
    return names[first:] + names[:first]


def _start(plan: Plan, name: str, store: Path | None = None) -> ContenderWorker:
    who = contender(OURS if name in plan.variants else name.split(" ")[0])
    threads, python = plan.load["threads"], plan.python.get(name)
    return ContenderWorker(who, environments=plan.environments, threads=threads, python=python, store=store)


def _load(plan: Plan, name: str) -> dict[str, Any]:
    if name in plan.variants:
        return {**plan.load, "precision": "float32", "options": plan.variants[name]}
    precision = name.partition(" ")[2] or "float32"
    return {**plan.load, "precision": precision}


def _question(plan: Plan, steps: int, inputs: Path) -> dict[str, Any]:
    if plan.unet is not None:
        return {"do": "unet", "inputs": str(inputs)}
    return {"do": "request", **plan.request, "steps": steps}


def _unet_inputs(shape: dict[str, Any]) -> dict[str, np.ndarray]:
    """Unit noise for every input, float32, from a fixed seed; SDXL's sizes are sizes."""
    rng = np.random.default_rng(2024)
    arrays = {n: rng.standard_normal(s).astype(np.float32) for n, s in shape.items()}
    arrays["timestep"] = np.full(shape["timestep"], 499.0, np.float32)
    if "time_ids" in arrays:
        arrays["time_ids"] = np.tile(np.array([1024, 1024, 0, 0, 1024, 1024], np.float32), (shape["time_ids"][0], 1))
    return arrays


def _cold_starts(plan: Plan, names: Sequence[str], samples: dict[str, Samples], say: Say) -> None:
    """Starts in rounds like the others; fewstep's with its engines stored, and with an empty store."""
    out: set[str] = set()  # those that cannot start, and those whose first start took too long to repeat
    for turn in range(plan.cold):
        for name in _rotated(list(names), turn):
            if name in out:
                continue
            try:
                spent = _first_image(plan, name)
                samples[name].cold.append(spent)
                if spent > SLOW_START_MS:
                    out.add(name)
                elif name in plan.variants:
                    with tempfile.TemporaryDirectory() as store:
                        samples[name].cold_unbuilt.append(_first_image(plan, name, Path(store)))
            except FewstepError:
                out.add(name)
    if plan.cold:
        say("cold starts: " + ", ".join(f"{n} {np.median(samples[n].cold):.0f} ms" for n in names if samples[n].cold))
    for name in (n for n in names if samples[n].cold_unbuilt):
        say(f"cold start that builds its engines: {name} {np.median(samples[name].cold_unbuilt):.0f} ms")


def _first_image(plan: Plan, name: str, store: Path | None = None) -> float:
    """Milliseconds from the start of a process to its first image."""
    with _starting(plan, name, store) as worker:
        worker.ask(do="load", **_load(plan, name))
        worker.ask(do="request", **plan.request, steps=plan.steps[0])
        return 1e3 * (time.perf_counter() - worker.began)


@contextmanager
def _starting(plan: Plan, name: str, store: Path | None) -> Iterator[ContenderWorker]:
    worker = _start(plan, name, store)
    try:
        yield worker
    finally:
        worker.close()


def _merge(into: Samples, part: Samples) -> None:
    for steps in part.wall:
        into.wall.setdefault(steps, []).extend(part.wall[steps])
        into.cores.setdefault(steps, []).extend(part.cores[steps])
        into.cpu.setdefault(steps, []).extend(part.cpu[steps])
        into.stages.setdefault(steps, []).extend(part.stages[steps])
    into.versions, into.facts = part.versions or into.versions, part.facts or into.facts
    into.import_ms, into.load_ms = part.import_ms or into.import_ms, part.load_ms or into.load_ms
    into.peak_mb = max(into.peak_mb, part.peak_mb)
    into.error = into.error or part.error
    into.output = part.output if part.output is not None else into.output


__all__ = ["CONTENDERS", "OURS", "Meeting", "Plan", "Samples", "run"]
