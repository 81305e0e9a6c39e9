"""Building a bundle's engines into the store, and opening them: the two calls that the rest of fewstep uses."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..errors import ArgumentError, CancelledError, CorruptError, FewstepError, GateError, MismatchError, MissingError
from . import machine
from .base import Engine
from .key import Difference, EngineKey, differences
from .options import BuildOptions, RunOptions, relevant
from .profile import Profile, dimension_names, profiles_for
from .registry import ON_CPU, Backend, BuildJob, OpenJob, Progress, choose_backend, load_backend, registered
from .store import Entry, Store, default_store, now

if TYPE_CHECKING:
    from ..bundle import Bundle, Component

POLICIES = ("if_missing", "never")
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
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
) -> dict[str, BuiltEngine]:
    """Make the engines that are not in the store yet; `force` makes them anew.

    `profiles` are by component (`profiles_for`; the bundle's default size otherwise) and mean nothing to ONNX Runtime,
    whose engines take any size and are tuned for the default size of the bundle that they were first built for.
    `gate` compares each new engine with the reference stored in the bundle, if there is one and the engine can run
    here; an engine that fails is marked, never used, and raises `GateError`. `CancelledError` once `cancel` is set.
    """
    where, cancelled = store or default_store(), cancel or threading.Event()
    chosen = options or BuildOptions()
    result = {}
    for part in components or tuple(bundle.components):
        component = bundle.component(part)
        if cancelled.is_set():
            raise CancelledError(f"the build was cancelled before {part!r}")
        name, why = backend_for(bundle, part, backend, store=where, options=options, progress=progress)
        _log.info("%s on %s: %s", part, name, why)
        kind = load_backend(name)
        sizes = profiles or (profiles_for(bundle) if kind.uses_profiles else {})
        key = engine_key(
            bundle, part, kind, options=chosen, profiles=tuple(sizes.get(part, ())) if kind.uses_profiles else ()
        )
        built = _build(
            bundle,
            part,
            component,
            kind,
            key,
            chosen,
            where,
            force=force,
            progress=progress or _quiet,
            cancel=cancelled,
        )
        if gate and not where.read_only and not built.entry.gate and _runs_here(kind):
            from .gate.verify import gate_built

            (progress or _quiet)(part, "comparing with torch", 0.0)
            built = replace(built, entry=gate_built(bundle, built.entry, where))
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
    progress: Progress | None = None,
) -> Engine:
    """Load a component's engine for these sizes; `build="if_missing"` makes it first where there is none that fits.

    With `build="never"` a missing engine raises `MissingError` and one made for something else `MismatchError`, both
    with the command that mends it. A corrupted engine raises `CorruptError`, one that failed the gate `GateError`,
    under either policy. `options=None` takes an engine whatever options it was built with.
    """
    if build not in POLICIES:
        raise ArgumentError(f"build is {build!r}", expected=f"one of {', '.join(POLICIES)}")
    part, session = bundle.component(component), run or RunOptions()
    name, _ = backend_for(bundle, component, backend, store=store, options=options, build=build, progress=progress)
    factory = registered(name)
    if factory is not None:
        return factory(bundle, component, session)
    if name == "torch":
        raise MissingError(
            "the torch backend is not registered", remedy="Import fewstep.export first: pip install 'fewstep[export]'"
        )
    kind, where = load_backend(name), store or default_store()
    try:
        entry = find_engine(bundle, component, kind, dims=dims, options=options, store=where)
    except (MissingError, MismatchError) as error:
        if build == "never" or where.read_only:
            raise
        _log.info("building %s: %s", component, error.found)
        wanted = {component: _default_profiles(bundle, component, dims)} if kind.uses_profiles else None
        built = build_engines(
            bundle,
            backend=name,
            components=(component,),
            profiles=wanted,
            options=options,
            store=where,
            progress=progress,
        )
        entry = built[component].entry
    if entry.failed:
        raise GateError(
            f"the engine {entry.name} failed its comparison with torch: {entry.gate.get('reason', '')}",
            expected="an engine that passed",
            remedy=f"Rebuild it with: {command(bundle, name)} --force",
        )
    job = OpenJob(
        bundle=bundle, name=component, component=part, entry=entry, data=entry.read(), run=session, store=where
    )
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
    progress: Progress | None = None,
) -> dict[str, Engine]:
    """`open_engine` for several components, side by side: loading is mostly the backend's own work."""
    where = store or (None if backend == "torch" else default_store())
    # One after another: a backend that is being timed wants the machine to itself.
    backends = {
        n: backend_for(bundle, n, backend, store=where, options=options, build=build, progress=progress)[0]
        for n in components
    }

    def one(name: str) -> Engine:
        return open_engine(
            bundle,
            name,
            backend=backends[name],
            dims=(dims or {}).get(name),
            options=options,
            run=run,
            store=where,
            build=build,
            progress=progress,
        )

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
    progress: Progress | None = None,
) -> tuple[str, str]:
    """The backend of one component, and why: as `choose_backend`, and among the CPU's the one measured fastest.

    Build options are those of one backend, so that with any that are not the defaults nothing is measured.
    """
    name, why = choose_backend(backend)
    if backend != "auto" or name != "ort-cpu" or (options or BuildOptions()) != BuildOptions():
        return name, why
    from .measured import choose_measured

    choice = choose_measured(bundle, component, store=store or default_store(), build=build, progress=progress)
    return choice.backend, f"{why}; {choice.reason}" if choice.reason else why


def engine_key(
    bundle: Bundle,
    component: str,
    kind: Backend,
    *,
    options: BuildOptions | None = None,
    profiles: Sequence[Profile] = (),
) -> EngineKey:
    """The key of the engine that a build with these options would make on this machine."""
    part = bundle.component(component)
    device, capability = kind.target(options)
    return EngineKey(
        component=component,
        backend=kind.name,
        backend_version=kind.version(),
        graph_sha256=part.graph_sha256,
        weights_sha256=part.weights_sha256,
        dtype=part.dtype,
        system=machine.os_identity(),
        device=device,
        capability=capability,
        options=relevant(options or BuildOptions(), kind.heeds),
        profiles=tuple(profiles),
    )


def find_engine(
    bundle: Bundle,
    component: str,
    kind: Backend,
    *,
    dims: Mapping[str, int] | None = None,
    options: BuildOptions | None = None,
    store: Store,
) -> Entry:
    """The stored engine that fits best: exact profiles before dynamic ones, default options before others.

    Raises `MissingError` when nothing was built for this component, `MismatchError` when all that was is for something
    else; the message names the fields of the nearest one.
    """
    needed = engine_key(bundle, component, kind, options=options)
    nearest: tuple[Difference, ...] = ()
    fitting: list[tuple[int, str, Entry]] = []
    for entry in store.entries(component, kind.name):
        key = entry.key if options is not None else replace(entry.key, options=needed.options)
        found = differences(key, needed, dims=dims)
        if not found:
            loose = sum(not p.is_exact for p in entry.key.profiles)
            fitting.append((2 * (entry.key.options != needed.options) + bool(loose), entry.built.get("at", ""), entry))
        elif not nearest or len(found) < len(nearest):
            nearest = found
    if fitting:
        best = min(rank for rank, _, _ in fitting)
        return max((f for f in fitting if f[0] == best), key=lambda f: f[1])[2]
    unreadable = _unreadable(store, component, kind.name)
    remedy = f"Build it with: {command(bundle, kind.name, dims)}"
    if unreadable is not None:
        raise unreadable
    if not nearest:
        raise MissingError(f"no engine of {component!r} for {kind.name} is in the store", remedy=remedy)
    raise MismatchError(
        f"the engine of {component!r} for {kind.name} was made for something else: {'; '.join(map(str, nearest))}",
        remedy=remedy,
    )


def command(bundle: Bundle, backend: str, dims: Mapping[str, int] | None = None) -> str:
    """The command that builds a bundle's engines for these sizes."""
    parts = [f"fewstep build {bundle.folder.name} --backend {backend}"]
    if dims and "width" in dims and "height" in dims:
        parts.append(f"--size {dims['width'] * bundle.latent.factor}x{dims['height'] * bundle.latent.factor}")
    if dims and (count := dims.get("rows") or dims.get("batch")):
        parts.append(f"--batch {count}")
    return " ".join(parts)


def _unreadable(store: Store, component: str, backend: str) -> FewstepError | None:
    """The error of an engine whose manifest cannot be read, if there is one."""
    for folder in store.folders(component, backend):
        try:
            store.read_entry(folder)
        except FewstepError as error:
            return error
    return None


def _default_profiles(bundle: Bundle, component: str, dims: Mapping[str, int] | None) -> tuple[Profile, ...]:
    if dims is None:
        return profiles_for(bundle)[component]
    part = bundle.component(component)
    return (Profile.exact({n: dims[n] for n in dimension_names((*part.inputs, *part.outputs)) if n in dims}),)


def _build(
    bundle: Bundle,
    name: str,
    component: Component,
    kind: Backend,
    key: EngineKey,
    options: BuildOptions,
    store: Store,
    *,
    force: bool,
    progress: Progress,
    cancel: threading.Event,
) -> BuiltEngine:
    """Build one engine under its key's lock, unless another builder made it while this one waited."""
    began = time.monotonic()
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
            component=component,
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
    return kind.name in ON_CPU or machine.has_gpu_driver()


def _quiet(component: str, stage: str, fraction: float) -> None:
    """Report no progress."""
