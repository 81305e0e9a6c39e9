"""The stored engine that fits: its key on this machine, the nearest one where none does, the command that makes one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..bundle import Bundle
from ..errors import FewstepError, GateError, MismatchError, MissingError
from . import machine
from .backends.registry import Backend
from .key import Difference, EngineKey, differences
from .options import BuildOptions, relevant
from .profile import Profile
from .store import Entry, Store


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

    Raises `MissingError` when nothing was built for this component or its file is gone, `MismatchError` when all that
    was is for something else; the message names the fields of the nearest one.
    """
    needed = engine_key(bundle, component, kind, options=options)
    nearest: tuple[Difference, ...] = ()
    fitting: list[tuple[int, str, Entry]] = []
    robbed: Entry | None = None
    for entry in store.entries(component, kind.name):
        key = entry.key if options is not None else replace(entry.key, options=needed.options)
        differing = differences(key, needed, dims=dims)
        if not differing and entry.lost:
            robbed = entry
        elif not differing:
            loose = sum(not p.is_exact for p in entry.key.profiles)
            fitting.append((2 * (entry.key.options != needed.options) + bool(loose), entry.built.get("at", ""), entry))
        elif not nearest or len(differing) < len(nearest):
            nearest = differing
    if fitting:
        best = min(rank for rank, _, _ in fitting)
        return max((f for f in fitting if f[0] == best), key=lambda f: f[1])[2]
    unreadable = _unreadable(store, component, kind.name)
    remedy = f"Build it with: {command(bundle, kind.name, dims)}"
    if unreadable is not None:
        raise unreadable
    if robbed is not None:
        raise MissingError(
            f"the engine {robbed.name} has lost its file {robbed.lost}",
            expected="the file that its manifest names",
            remedy=remedy,
        )
    if not nearest:
        raise MissingError(f"no engine of {component!r} for {kind.name} is in the store", remedy=remedy)
    raise MismatchError(
        f"the engine of {component!r} for {kind.name} was made for something else: {'; '.join(map(str, nearest))}",
        remedy=remedy,
    )


def check_passed(bundle: Bundle, entry: Entry) -> None:
    """Raise `GateError` for an engine that failed its comparison with torch."""
    if entry.failed:
        raise GateError(
            f"the engine {entry.name} failed its comparison with torch: {entry.gate.get('reason', '')}",
            expected="an engine that passed",
            remedy=f"Rebuild it with: {command(bundle, entry.key.backend)} --force",
        )


def command(bundle: Bundle, backend: str, dims: Mapping[str, int] | None = None) -> str:
    """The command that builds a bundle's engines for these sizes."""
    parts = [f"fewstep build {bundle.folder.name} --backend {backend}"]
    if dims and "width" in dims and "height" in dims:
        parts.append(f"--size {dims['width'] * bundle.latent.factor}x{dims['height'] * bundle.latent.factor}")
    if dims and (count := dims.get("batch") or dims.get("rows")):
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
