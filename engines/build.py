"""Building one component's engine into the store, under a lock, and comparing it with the reference."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ..bundle import Bundle
from ..errors import CorruptError, MissingError
from . import machine
from .backends.registry import Backend, BuildJob, BuildProgress
from .find import engine_key
from .gate.reference import stated_reference
from .key import EngineKey
from .options import BuildOptions
from .profile import Profile
from .store import Entry, Store, now, sweep, writing_engine
from .weights import source_bytes

_log = logging.getLogger("fewstep.engines")


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltEngine:
    """What `build_engines` did for one component: the stored engine, whether it was there before, and why."""

    component: str
    backend: str
    entry: Entry
    reused: bool
    reason: str
    seconds: float


def build_engine(
    bundle: Bundle,
    component: str,
    kind: Backend,
    *,
    store: Store,
    options: BuildOptions | None = None,
    profiles: Sequence[Profile] = (),
    force: bool = False,
    gate: bool = True,
    progress: BuildProgress | None = None,
    cancel: threading.Event | None = None,
) -> BuiltEngine:
    """Make one component's engine under its key's lock, unless the store has it; see `build_engines`."""
    report = progress or (lambda component, stage, fraction: None)
    key = engine_key(bundle, component, kind, options=options, profiles=profiles if kind.uses_profiles else ())
    gates = gate and not store.read_only and _runs_here(kind)
    began, before = time.monotonic(), _stored(store, key)
    entry, reason, reused = before, "already built", True
    if entry is None or force:
        if gates:
            stated_reference(bundle)  # raises where the gate could not run: no engine is stored that was to be compared
        report(component, "waiting for the lock", 0.0)
        with store.lock(key):
            entry, reason = _stored(store, key), "another builder made it"
            if entry is None or (force and entry == before):
                part = store.part(key, kind.suffix)
                job = BuildJob(
                    bundle=bundle,
                    name=component,
                    component=bundle.component(component),
                    profiles=key.profiles,
                    options=options or BuildOptions(),
                    target=part,
                    data=part.with_name(f"{os.urandom(8).hex()}.data"),
                    store=store,
                    progress=report,
                    cancel=cancel or threading.Event(),
                )
                entry, reused = _make(kind, key, job, began), False
                reason = "it was asked for anew" if force else "none was stored"
    spent = time.monotonic() - began
    if gates and not entry.gate:
        from .gate.verify import gate_built

        report(component, "comparing with torch", 0.0)
        entry = gate_built(bundle, entry, store)
    return BuiltEngine(component=component, backend=kind.name, entry=entry, reused=reused, reason=reason, seconds=spent)


def _make(kind: Backend, key: EngineKey, job: BuildJob, began: float) -> Entry:
    """Build an engine and put it into the store; nothing stays of one that fails."""
    try:
        with writing_engine(job.name, job.target.parent, needed=source_bytes(job.bundle, job.component)):
            facts = kind.build(job)
            built = {"at": now(), "seconds": round(time.monotonic() - began, 3), "bundle": job.bundle.name}
            data = job.data if job.data.exists() else None
            return job.store.commit(key, job.target, built=built, facts=facts, data=data)
    except BaseException:
        sweep(job.target.parent)
        raise


def _stored(store: Store, key: EngineKey) -> Entry | None:
    """The engine of this key, or `None` when there is none or it is visibly damaged: then it is built anew."""
    try:
        entry = store.find(key)
        if entry is None or not (damaged := entry.damaged):
            return entry
        _log.warning("the stored engine of %s has no whole %s: building it again", key.component, damaged)
    except (CorruptError, MissingError, OSError) as error:
        _log.warning("the stored engine of %s is damaged (%s): building it again", key.component, error)
    return None


def _runs_here(kind: Backend) -> bool:
    """Whether engines of this kind can be run on this machine, and not only built."""
    return kind.device == "cpu" or machine.has_gpu_driver()
