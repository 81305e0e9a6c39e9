"""Verifying a bundle: its ONNX graphs on the CPU and each stored engine that can run here, against torch."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

from ...bundle import LOWERED, Bundle, Component
from ...errors import CorruptError, GateError, MismatchError, MissingError, UnknownNameError
from ..backends.ort import OrtEngine
from ..backends.registry import OpenJob, load_backend
from ..base import Engine
from ..find import engine_key
from ..key import differences
from ..low_rank import AdaptedBundle
from ..options import RunOptions
from ..store import Entry, Store
from ..weights import check_graph, check_weights
from .gate import Evaluate, GateReport, failure, gate_engine
from .reference import FILE, Case, read_reference, stated_reference
from .sizes import cases_of_profiles, with_changes

_log = logging.getLogger("fewstep.engines")


def load_cases(bundle: Bundle) -> list[Case]:
    """The reference stored in a bundle; `MissingError` when it has none, `CorruptError` for one that was changed."""
    return read_reference(stated_reference(bundle) or bundle.folder / FILE)


def verify_graph(bundle: Bundle, component: str, cases: Sequence[Case]) -> GateReport:
    """The ONNX graph itself, run by ONNX Runtime on the CPU without optimisation."""
    part = bundle.component(component)
    path = check_graph(bundle, part)
    check_weights(bundle, part, None)
    engine = OrtEngine.from_onnx(path, inputs=part.inputs, outputs=part.outputs, optimization="disabled")
    own = judged_by_own(part, cases)
    return gate_engine(engine, own, component=component, dtype=part.dtype, name="the ONNX graph", check=False)


def judged_by_own(part: Component, cases: Sequence[Case], computes: str | None = None) -> list[Case]:
    """The cases, with a lowered component's own error where torch's stands in others.

    Torch has no such precision: an engine may err 1.5 times as much as the graph did that its budget was judged on.
    computes: the precision of what is left in floats, if not float32: its own error comes on top.
    """
    stated = part.source.get("relative_l2")
    if part.dtype not in LOWERED or not isinstance(stated, (int, float)):
        return list(cases)
    return [
        replace(c, torch_error={**c.torch_error, part.dtype: float(stated) + c.torch_error.get(computes or "", 0.0)})
        for c in cases
    ]


def verify_entry(
    bundle: Bundle, entry: Entry, cases: Sequence[Case], store: Store, *, run: RunOptions | None = None
) -> GateReport:
    """A stored engine, at sizes that it is built for; the verdict goes into its manifest, and a failed engine is not
    opened again.
    """
    name = entry.key.component
    part = bundle.component(name)
    kind = load_backend(entry.key.backend)
    engine = kind.open(OpenJob.of(bundle, entry, store, run))
    floats = kind.computes or ("float16" if entry.key.options.get("float16") else None)
    dtype = part.dtype if part.dtype in LOWERED else floats or part.dtype
    own = judged_by_own(part, [c for c in cases if c.component == name], floats)
    if isinstance(bundle, AdaptedBundle):
        own = with_changes(bundle, own)
    admitted, makers = cases_of_profiles(bundle, own, entry.key.profiles) if own else (own, [])
    report = gate_engine(engine, admitted, component=name, dtype=dtype, name=f"the engine {entry.name}", check=False)
    if not store.read_only:
        store.record_gate(entry, {**report.to_json(), "reference": makers, "realised": dict(kind.realised(engine))})
    return report


def verify_bundle(
    bundle: Bundle,
    *,
    store: Store,
    components: Sequence[str] | None = None,
    extra: dict[str, Engine | Evaluate] | None = None,
    check: bool = True,
) -> list[GateReport]:
    """Each component's graph, its engines of this machine, and what `extra` adds (the torch engine, say).

    Engines of other machines or versions are passed over: `list_engines` names them. With `check` the first failure
    raises `GateError` once everything was compared.
    """
    cases = load_cases(bundle)
    reports = []
    for name in components or tuple(bundle.components):
        part = bundle.component(name)
        reports.append(verify_graph(bundle, name, cases))
        reports += [verify_entry(bundle, entry, cases, store) for entry in engines_here(bundle, name, store)]
        if extra and name in extra:
            reports.append(gate_engine(extra[name], cases, component=name, dtype=part.dtype, check=False))
    failed = [r for r in reports if not r.passed]
    if check and failed:
        raise failure(failed[0])
    return reports


def engines_here(bundle: Bundle, component: str, store: Store) -> Iterator[Entry]:
    """The stored engines of a component that this machine can load."""
    for entry in store.entries(component):
        try:
            needed = engine_key(bundle, component, load_backend(entry.key.backend))
        except (MissingError, MismatchError, UnknownNameError):
            continue
        if all(d.field == "options" for d in differences(entry.key, needed)):
            yield entry


def gate_built(bundle: Bundle, entry: Entry, store: Store) -> Entry:
    """Gate an engine that was just built, unless the bundle's export had its gate off; a failed one is marked.

    Raises `GateError`, and the errors of `stated_reference`. The log says where an engine is not compared.
    """
    path = stated_reference(bundle)
    cases = [] if path is None else read_reference(path, entry.key.component)
    if not cases:
        why = "the bundle was exported without a gate" if path is None else f"{FILE} has no case of it"
        _log.warning("the engine %s is not compared with torch: %s", entry.name, why)
        return entry
    try:
        report = verify_entry(bundle, entry, cases, store)
    except (CorruptError, GateError):
        store.record_gate(entry, {"passed": False, "reason": "it could not be loaded or compared"})
        raise
    if not report.passed:
        raise failure(report)
    return store.read_entry(entry.folder)
