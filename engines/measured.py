"""The fastest of the CPU's backends for a component, by measurement: both are built and timed once, and the store keeps
what was found.

Which one it is differs from graph to graph and from machine to machine, so it is not written down as a rule. A choice
holds for these graphs, weights, versions and this processor; anything else is measured again.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..bundle import Bundle
from ..errors import CorruptError, FewstepError
from ..values import read_json
from .backends.registry import Backend, BuildProgress, OpenJob, measured_backends, plain_backend
from .base import Engine
from .build import build_engine
from .find import check_passed, engine_key
from .profile import profiles_for
from .store import Store, writing_engine

EVALUATIONS = 5
ENOUGH_SECONDS = 3.0
_measuring = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredChoice:
    """The backend to use for a component, why in words, and the medians in milliseconds that decided.

    The reason is empty where there was no choice.
    """

    backend: str
    reason: str
    milliseconds: Mapping[str, float]


def choose_measured(
    bundle: Bundle, component: str, *, store: Store, build: str = "if_missing", progress: BuildProgress | None = None
) -> MeasuredChoice:
    """The recorded choice, or a new one: what cannot be built here, or fails its gate, is not chosen.

    With `build="never"`, or a store that cannot be written to, nothing is measured: the plain one without a record.
    """
    plain = plain_backend().name
    able = [b for b in measured_backends() if b.available()]
    if len(able) < 2:
        return MeasuredChoice(backend=plain, reason="", milliseconds={})
    keys = [engine_key(bundle, component, kind).digest for kind in able]
    record = store.root / f".choice.{hashlib.sha256(' '.join(keys).encode()).hexdigest()[:32]}.json"
    recorded = _read(record)
    if recorded is not None:
        return recorded
    if build == "never" or store.read_only:
        return MeasuredChoice(backend=plain, reason="nothing was measured", milliseconds={})
    with _measuring:
        choice = _measure(bundle, component, able, store, progress or (lambda *_: None))
    part = record.with_name(f"{record.name}.{os.getpid()}.part")
    with writing_engine(component, store.root):
        part.write_text(json.dumps(asdict(choice)))
        part.replace(record)
    return choice


def _measure(
    bundle: Bundle, component: str, able: list[Backend], store: Store, progress: BuildProgress
) -> MeasuredChoice:
    dims = profiles_for(bundle)[component][0].optimum
    times: dict[str, float] = {}
    failed = ""
    for kind in able:
        name = kind.name
        try:
            entry = build_engine(bundle, component, kind, store=store, progress=progress).entry
            check_passed(bundle, entry)
            progress(component, f"timing {name}", 0.0)
            times[name] = _time(kind.open(OpenJob.of(bundle, entry, store)), dims)
        except FewstepError as error:
            failed += f"; {name} cannot run it: {error.found}"
    if not times:
        return MeasuredChoice(backend=plain_backend().name, reason=f"nothing was measured{failed}", milliseconds={})
    best = min(times, key=lambda n: times[n])
    words = " against ".join(f"{times[n]:.2f} ms on {n}" for n in sorted(times, key=lambda n: times[n]))
    return MeasuredChoice(
        backend=best, reason=f"one evaluation takes {words}, measured here{failed}", milliseconds=times
    )


def _time(engine: Engine, dims: Mapping[str, int]) -> float:
    """The median of some evaluations in milliseconds, after one that is not counted; unit noise for floats."""
    binding = engine.bind(dims)
    draw = np.random.default_rng(0)
    for value in binding.inputs.values():
        value[...] = draw.standard_normal(value.shape) if value.dtype.kind == "f" else 0
    binding.enqueue()
    spent: list[float] = []
    while len(spent) < EVALUATIONS and sum(spent) < ENOUGH_SECONDS:
        began = time.perf_counter()
        binding.enqueue()
        spent.append(time.perf_counter() - began)
    return 1e3 * statistics.median(spent)


def _read(record: Path) -> MeasuredChoice | None:
    """The choice on record; `None` without one, or one that cannot be read."""
    try:
        data = read_json(record, "a choice on record", finite=True)
        choice = MeasuredChoice(
            backend=str(data["backend"]),
            reason=str(data["reason"]),
            milliseconds={str(n): float(v) for n, v in data["milliseconds"].items()},
        )
    except (CorruptError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return choice if choice.backend in {b.name for b in measured_backends()} else None
