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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import FewstepError
from .base import Engine
from .profile import profiles_for
from .registry import Progress

if TYPE_CHECKING:
    from ..bundle import Bundle
    from .store import Store

CANDIDATES = ("ort-cpu", "ort-openvino")  # all of them in float32: a choice never changes the precision
EVALUATIONS = 5
ENOUGH_SECONDS = 3.0
_measuring = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The backend to use for a component, why in words, and the medians in milliseconds that decided.

    The reason is empty where there was no choice.
    """

    backend: str
    reason: str
    milliseconds: Mapping[str, float]


def choose_measured(
    bundle: Bundle, component: str, *, store: Store, build: str = "if_missing", progress: Progress | None = None
) -> Choice:
    """The recorded choice, or a new one: what cannot be built here, or fails its gate, is not chosen.

    With `build="never"`, or a store that cannot be written to, nothing is measured: `ort-cpu` without a record.
    """
    from .build import engine_key
    from .registry import load_backend

    able = [n for n in CANDIDATES if _installed(n)]
    if len(able) < 2:
        return Choice(backend=CANDIDATES[0], reason="", milliseconds={})
    keys = [engine_key(bundle, component, load_backend(n)).digest for n in able]
    record = store.root / f".choice.{hashlib.sha256(' '.join(keys).encode()).hexdigest()[:32]}.json"
    found = _read(record)
    if found is not None:
        return found
    if build == "never" or store.read_only:
        return Choice(backend=CANDIDATES[0], reason="nothing was measured", milliseconds={})
    with _measuring:
        choice = _measure(bundle, component, able, store, progress or (lambda *_: None))
    part = record.with_name(f"{record.name}.{os.getpid()}.part")
    part.write_text(
        json.dumps({"backend": choice.backend, "reason": choice.reason, "milliseconds": dict(choice.milliseconds)})
    )
    part.replace(record)
    return choice


def _installed(backend: str) -> bool:
    from .backends.ort import PROVIDERS

    try:
        import onnxruntime
    except ImportError:
        return False
    return PROVIDERS[backend] in onnxruntime.get_available_providers()


def _measure(bundle: Bundle, component: str, able: list[str], store: Store, progress: Progress) -> Choice:
    from .build import build_engines, open_engine

    dims = profiles_for(bundle)[component][0].optimum
    times: dict[str, float] = {}
    failed = ""
    for name in able:
        try:
            build_engines(bundle, backend=name, components=(component,), store=store, progress=progress)
            progress(component, f"timing {name}", 0.0)
            times[name] = _time(open_engine(bundle, component, backend=name, store=store, build="never"), dims)
        except FewstepError as error:
            failed += f"; {name} cannot run it: {error.found}"
    if not times:
        return Choice(backend=CANDIDATES[0], reason=f"nothing was measured{failed}", milliseconds={})
    best = min(times, key=lambda n: times[n])
    words = " against ".join(f"{times[n]:.2f} ms on {n}" for n in sorted(times, key=lambda n: times[n]))
    return Choice(backend=best, reason=f"one evaluation takes {words}, measured here{failed}", milliseconds=times)


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


def _read(record: Any) -> Choice | None:
    """The choice on record; `None` without one, or one that cannot be read."""
    try:
        data = json.loads(record.read_bytes())
        choice = Choice(
            backend=str(data["backend"]),
            reason=str(data["reason"]),
            milliseconds={str(n): float(v) for n, v in data["milliseconds"].items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return choice if choice.backend in CANDIDATES else None
