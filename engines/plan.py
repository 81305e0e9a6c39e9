"""What a build would do, without doing it: which engines, why, how large, and whether memory and disk suffice."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bundle import Bundle
from ..errors import FewstepError, MissingError
from .backends.registry import choose_backend, load_backend
from .find import engine_key
from .machine import available_memory
from .options import BuildOptions
from .profile import Profile, profiles_for
from .store import Store, default_store

MARGIN_BYTES = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One engine of a build to come. `length` is its estimated size, `memory` the build's estimated peak, in bytes."""

    component: str
    backend: str
    name: str
    profiles: tuple[Profile, ...]
    exists: bool
    reason: str
    length: int
    memory: int

    def to_json(self) -> dict[str, Any]:
        data = {k: getattr(self, k) for k in self.__slots__}
        data["profiles"] = [str(p) for p in self.profiles]
        return data


def plan_build(
    bundle: Bundle,
    *,
    backend: str = "auto",
    components: Sequence[str] | None = None,
    profiles: Mapping[str, Sequence[Profile]] | None = None,
    options: BuildOptions | None = None,
    store: Store | None = None,
    force: bool = False,
) -> list[Planned]:
    """The engines that `build_engines` with the same arguments would make or find. Takes no lock and writes nothing."""
    name, why = choose_backend(backend)
    kind, where = load_backend(name), store or default_store()
    sizes = profiles or (profiles_for(bundle) if kind.uses_profiles else {})
    result = []
    for component in components or tuple(bundle.components):
        own_sizes = tuple(sizes.get(component, ())) if kind.uses_profiles else ()
        key = engine_key(bundle, component, kind, options=options, profiles=own_sizes)
        try:
            entry = where.find(key)
            reason = "already built" if entry is not None else f"none is stored; {name}: {why}"
        except FewstepError as error:
            entry, reason = None, f"the stored one is damaged: {error.found}"
        if entry is not None and force:
            reason = "it is asked for anew"
        weights = bundle.path(bundle.component(component).weights).stat().st_size
        result.append(
            Planned(
                component=component,
                backend=name,
                name=where.entry_folder(key).name,
                profiles=own_sizes,
                exists=entry is not None and not force,
                reason=reason,
                length=entry.length if entry is not None else weights,
                memory=kind.memory(weights),
            )
        )
    return result


def check_resources(planned: Sequence[Planned], folder: Path) -> None:
    """Raise `MissingError` when host memory or disk cannot hold the largest build, before it begins."""
    todo = [p for p in planned if not p.exists]
    if not todo:
        return
    largest = max(todo, key=lambda p: p.memory)
    available = available_memory()
    if available is not None and available < largest.memory:
        raise MissingError(
            f"{available / 1e9:.1f} GB of memory are free",
            expected=f"about {largest.memory / 1e9:.1f} GB to build {largest.component!r} for {largest.backend}",
            remedy="Close other programs, build on a larger machine, or go on with: --no-preflight",
        )
    needed = sum(p.length for p in todo) + MARGIN_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise MissingError(
            f"{free / 1e9:.1f} GB of disk are free where engines are kept",
            expected=f"about {needed / 1e9:.1f} GB",
            remedy="Free some with: fewstep engines prune, or set FEWSTEP_CACHE_DIR.",
        )
