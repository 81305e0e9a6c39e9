"""A bundle's engines: which backend, built where there is none that fits, opened. What the rest of fewstep calls."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from ..bundle import Bundle
from ..errors import ArgumentError, CancelledError, MismatchError, MissingError
from .backends.registry import (
    BuildProgress,
    OpenJob,
    choose_backend,
    load_backend,
    makes_in_memory,
    plain_backend,
    registered,
)
from .base import Engine
from .build import BuiltEngine, build_engine
from .find import check_passed, find_engine
from .measured import choose_measured
from .options import BuildOptions, RunOptions
from .profile import Profile, change_spans, dimension_names, profiles_for
from .store import Store, default_store

POLICIES = ("if_missing", "never")
_log = logging.getLogger("fewstep.engines")


def build_engines(
    bundle: Bundle,
    *,
    backend: str = "auto",
    components: Sequence[str] | None = None,
    profiles: Mapping[str, Sequence[Profile]] | None = None,
    options: BuildOptions | None = None,
    store: Store | None = None,
    force: bool = False,
    gate: bool = True,
    progress: BuildProgress | None = None,
    cancel: threading.Event | None = None,
) -> dict[str, BuiltEngine]:
    """Make the engines that are not in the store yet; `force` makes them anew.

    `profiles` are by component (`profiles_for`; the bundle's default size otherwise) and mean nothing to ONNX Runtime,
    whose engines take any size and are tuned for the default size of the bundle that they were first built for.
    `gate` compares each new engine with the reference stored in the bundle, if there is one and the engine can run
    here; an engine that fails is marked, never used, and raises `GateError`. `CancelledError` once `cancel` is set.
    """
    where, cancelled = store or default_store(), cancel or threading.Event()
    result = {}
    for part in components or tuple(bundle.components):
        bundle.component(part)
        if cancelled.is_set():
            raise CancelledError(f"the build was cancelled before {part!r}")
        name, why = backend_for(bundle, part, backend, store=where, options=options, progress=progress)
        _log.info("%s on %s: %s", part, name, why)
        kind = load_backend(name)
        sizes = profiles or (profiles_for(bundle) if kind.uses_profiles else {})
        built = build_engine(
            bundle,
            part,
            kind,
            store=where,
            options=options,
            profiles=tuple(sizes.get(part, ())),
            force=force,
            gate=gate,
            progress=progress,
            cancel=cancelled,
        )
        if name != backend:
            built = replace(built, reason=f"{built.reason}; {why}")
        result[part] = built
    return result


def open_engine(
    bundle: Bundle,
    component: str,
    *,
    backend: str = "auto",
    dims: Mapping[str, int] | None = None,
    options: BuildOptions | None = None,
    run: RunOptions | None = None,
    store: Store | None = None,
    build: str = "if_missing",
    progress: BuildProgress | None = None,
) -> Engine:
    """Load a component's engine for these sizes; `build="if_missing"` makes it first where there is none that fits.

    With `build="never"` a missing engine raises `MissingError` and one made for something else `MismatchError`, both
    with the command that mends it. A corrupted engine raises `CorruptError`, one that failed the gate `GateError`,
    under either policy. `options=None` takes an engine whatever options it was built with.
    """
    if build not in POLICIES:
        raise ArgumentError(f"build is {build!r}", expected=f"one of {', '.join(POLICIES)}")
    bundle.component(component)
    session = run or RunOptions()
    name, _ = backend_for(bundle, component, backend, store=store, options=options, build=build, progress=progress)
    factory = registered(name)
    if factory is not None:
        return factory(bundle, component, session)
    kind, where = load_backend(name), store or default_store()
    try:
        entry = find_engine(bundle, component, kind, dims=dims, options=options, store=where)
    except (MissingError, MismatchError) as error:
        if build == "never" or where.read_only:
            raise
        _log.info("building %s: %s", component, error.found)
        sizes = _default_profiles(bundle, component, dims) if kind.uses_profiles else ()
        entry = build_engine(
            bundle, component, kind, store=where, options=options, profiles=sizes, progress=progress
        ).entry
    check_passed(bundle, entry)
    job = OpenJob.of(bundle, entry, where, session)
    if not where.read_only:
        entry.mark_used()
    return kind.open(job)


def open_engines(
    bundle: Bundle,
    components: Sequence[str],
    *,
    backend: str = "auto",
    dims: Mapping[str, Mapping[str, int]] | None = None,
    options: BuildOptions | None = None,
    run: RunOptions | None = None,
    store: Store | None = None,
    build: str = "if_missing",
    progress: BuildProgress | None = None,
) -> dict[str, Engine]:
    """`open_engine` for several components, side by side: loading is mostly the backend's own work."""
    where = store or (None if makes_in_memory(backend) else default_store())
    shared: dict[str, Any] = {"store": where, "options": options, "build": build, "progress": progress}
    # One after another: a backend that is being timed wants the machine to itself.
    backends = {n: backend_for(bundle, n, backend, **shared)[0] for n in components}

    def one(name: str) -> Engine:
        return open_engine(bundle, name, backend=backends[name], dims=(dims or {}).get(name), run=run, **shared)

    with ThreadPoolExecutor(max_workers=max(1, min(len(components), os.cpu_count() or 1))) as pool:
        return dict(zip(components, pool.map(one, components), strict=True))


def backend_for(
    bundle: Bundle,
    component: str,
    backend: str = "auto",
    *,
    store: Store | None = None,
    options: BuildOptions | None = None,
    build: str = "if_missing",
    progress: BuildProgress | None = None,
) -> tuple[str, str]:
    """The backend of one component, and why: as `choose_backend`, and among the CPU's the one measured fastest.

    Build options are those of one backend, so that with any that are not the defaults nothing is measured.
    """
    name, why = choose_backend(backend)
    if backend != "auto" or name != plain_backend().name or (options or BuildOptions()) != BuildOptions():
        return name, why
    choice = choose_measured(bundle, component, store=store or default_store(), build=build, progress=progress)
    return choice.backend, f"{why}; {choice.reason}" if choice.reason else why


def _default_profiles(bundle: Bundle, component: str, dims: Mapping[str, int] | None) -> tuple[Profile, ...]:
    if dims is None:
        return profiles_for(bundle)[component]
    part = bundle.component(component)
    names = dimension_names((*part.inputs, *part.outputs))
    changes = {n: s for n, s in change_spans().items() if n in names}
    exact = Profile.exact({n: dims[n] for n in names if n in dims and n not in changes})
    return (Profile(spans={**exact.spans, **changes}),)
