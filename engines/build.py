"""Building one component's engine into the store, under a lock, and comparing it with the reference."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..bundle import Bundle
from ..errors import CorruptError, MissingError
from . import machine
from .backends.registry import Backend, BuildJob, BuildProgress
from .find import engine_key
from .gate.verify import gate_built
from .key import EngineKey
from .options import BuildOptions
from .profile import Profile
from .store import Entry, Store, now

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
    """Make one component's engine, unless the store has it; see `build_engines`."""
    report = progress or (lambda component, stage, fraction: None)
    key = engine_key(bundle, component, kind, options=options, profiles=profiles if kind.uses_profiles else ())
    built = _build(
        bundle,
        kind,
        key,
        options or BuildOptions(),
        store,
        force=force,
        progress=report,
        cancel=cancel or threading.Event(),
    )
    if gate and not store.read_only and not built.entry.gate and _runs_here(kind):
        report(component, "comparing with torch", 0.0)
        built = replace(built, entry=gate_built(bundle, built.entry, store))
    return built


def _build(
    bundle: Bundle,
    kind: Backend,
    key: EngineKey,
    options: BuildOptions,
    store: Store,
    *,
    force: bool,
    progress: BuildProgress,
    cancel: threading.Event,
) -> BuiltEngine:
    """Build one engine under its key's lock, unless another builder made it while this one waited."""
    began, name = time.monotonic(), key.component
    before = _stored(store, key)
    if before is not None and not force:
        return BuiltEngine(
            component=name, backend=kind.name, entry=before, reused=True, reason="already built", seconds=0.0
        )
    progress(name, "waiting for the lock", 0.0)
    with store.lock(key):
        current = _stored(store, key)
        if current is not None and (not force or current != before):
            spent = time.monotonic() - began
            return BuiltEngine(
                component=name,
                backend=kind.name,
                entry=current,
                reused=True,
                reason="another builder made it",
                seconds=spent,
            )
        part = store.part(key, kind.suffix)
        data = part.with_name(f"{os.urandom(8).hex()}.data")
        job = BuildJob(
            bundle=bundle,
            name=name,
            component=bundle.component(name),
            profiles=key.profiles,
            options=options,
            target=part,
            data=data,
            store=store,
            progress=progress,
            cancel=cancel,
        )
        try:
            facts = kind.build(job)
            spent = time.monotonic() - began
            built = {"at": now(), "seconds": round(spent, 3), "bundle": bundle.name}
            entry = store.commit(key, part, built=built, facts=facts, data=data if data.exists() else None)
        finally:
            part.unlink(missing_ok=True)
    reason = "it was asked for anew" if force else "none was stored"
    return BuiltEngine(component=name, backend=kind.name, entry=entry, reused=False, reason=reason, seconds=spent)


def _stored(store: Store, key: EngineKey) -> Entry | None:
    """The engine of this key, or `None` when there is none or it is visibly damaged: then it is built anew."""
    try:
        entry = store.find(key)
        if entry is not None and entry.path.stat().st_size == entry.digest.length:
            return entry
    except (CorruptError, MissingError, OSError) as error:
        _log.warning("the stored engine of %s is damaged (%s): building it again", key.component, error)
    return None


def _runs_here(kind: Backend) -> bool:
    """Whether engines of this kind can be run on this machine, and not only built."""
    return kind.device == "cpu" or machine.has_gpu_driver()
