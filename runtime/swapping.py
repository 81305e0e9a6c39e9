"""Weights of a loaded pipeline, replaced: by another bundle's of the same architecture, or with adapters merged."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ..bundle import Bundle, Component
from ..engines import Engine
from ..engines.base import Swappable
from ..engines.digest import sha256_file
from ..engines.gate.gate import gate_engine
from ..engines.gate.verify import load_cases
from ..engines.store import Store, default_store
from ..engines.weights import check_weights
from ..errors import ArgumentError, MismatchError, UnsupportedError
from ..weights.lora import Fusion
from ..weights.merged import Weights, mapped_weights, merge
from .prompts.lora_tags import Uses


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """What a component is to hold: weights by name, and their digest."""

    weights: Weights
    digest: str


class InFlight:
    """Requests that are being made, and changes that wait for their end; new ones wait for a change."""

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._threads: list[int] = []
        self._changing = False

    @contextmanager
    def request(self) -> Iterator[None]:
        own = threading.get_ident()
        with self._free:
            self._free.wait_for(lambda: not self._changing)
            self._threads.append(own)
        try:
            yield
        finally:
            with self._free:
                self._threads.remove(own)
                self._free.notify_all()

    @contextmanager
    def change(self) -> Iterator[None]:
        """Alone; `ArgumentError` where this thread itself has begun a request and not ended it."""
        with self._free:
            if threading.get_ident() in self._threads:
                raise ArgumentError("a request of this thread is not finished", expected="its end before new weights")
            self._free.wait_for(lambda: not self._changing)
            self._changing = True
            self._free.wait_for(lambda: not self._threads)
        try:
            yield
        finally:
            with self._free:
                self._changing = False
                self._free.notify_all()


def check_fits(base: Bundle, other: Bundle) -> None:
    """Raise `MismatchError` unless the other bundle's weights fit the base's graphs, and its prompts its tokenizers."""
    for name, part in base.components.items():
        if name not in other.components:
            raise MismatchError(f"the bundle {other.name!r} has no {name}", expected=f"all of {base.name!r}")
        one = other.components[name]
        if one.graph_sha256 != part.graph_sha256 or one.dtype != part.dtype:
            raise MismatchError(
                f"{name} of {other.name!r} is of another architecture than that of {base.name!r}",
                expected="the same graph in the same precision",
                remedy="Load that bundle itself.",
            )
    if [t.sha256 for t in other.tokenizers] != [t.sha256 for t in base.tokenizers]:
        raise MismatchError(
            f"the tokenizers of {other.name!r} are not those of {base.name!r}", remedy="Load that bundle itself."
        )


def plan_loading(
    bundle: Bundle, uses: Uses, paths: Sequence[Path], fusion: Fusion, store: Store | None
) -> dict[str, Loading]:
    """What each component of a bundle is to hold with some LoRAs, whose files are `paths`, merged into it."""
    files = [sha256_file(p) for p in paths]
    merged = [(file, component, scale) for file, (_, component, scale) in zip(files, uses, strict=True)]
    loadings = {}
    for name, part in bundle.components.items():
        weights, digest = mapped_weights(check_weights(bundle, part, store or default_store())), part.weights_sha256
        if fusion.deltas.get(name):
            weights = merge(weights, name, fusion, part.dtype)
            digest = hashlib.sha256(repr((digest, *merged)).encode()).hexdigest()
        loadings[name] = Loading(weights=weights, digest=digest)
    return loadings


def put_weights(engines: Sequence[tuple[str, Engine]], loadings: Mapping[str, Loading]) -> dict[str, float]:
    """Give engines, each of a component, what they are to hold; milliseconds by component.

    Raises `UnsupportedError` for an engine whose weights cannot be replaced, before any is changed.
    """
    for name, engine in engines:
        if not isinstance(engine, Swappable):
            raise UnsupportedError(
                f"the weights of {name!r} on {engine.backend} are not replaced where they lie",
                expected="a pipeline that was loaded for it",
                remedy="Load it with swappable=True, on ort-cpu, torch, or TensorRT's engines built with --refittable.",
            )
    took: dict[str, float] = {}
    for name, engine in engines:
        if isinstance(engine, Swappable) and engine.loaded != loadings[name].digest:
            began = time.perf_counter()
            engine.load_weights(loadings[name].weights, loadings[name].digest)
            took[name] = took.get(name, 0.0) + 1e3 * (time.perf_counter() - began)
    return took


def check_loaded(bundle: Bundle, engines: Sequence[tuple[str, Engine]]) -> None:
    """Compare engines with the reference of the bundle whose weights they hold; `GateError`, `MissingError`."""
    cases = load_cases(bundle)
    seen: set[str] = set()
    for name, engine in engines:
        if name not in seen and any(c.component == name for c in cases):
            seen.add(name)
            gate_engine(engine, cases, component=name, dtype=bundle.component(name).dtype)


def shown_as(base: Bundle, other: Bundle, loadings: Mapping[str, Loading]) -> Bundle:
    """The bundle as pictures tell of it: the other's name, scheduler and defaults, and the digests of what is held.

    What LoRAs were merged into is of no file.
    """
    components = {n: _as_held(p, loadings.get(n)) for n, p in other.components.items()}
    return replace(other, components={n: components[n] for n in base.components})


def _as_held(component: Component, loading: Loading | None) -> Component:
    if loading is None or loading.digest == component.weights_sha256:
        return component
    return replace(component, weights_sha256=loading.digest, source={})
