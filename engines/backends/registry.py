"""What a backend is, the backends by name, and the choice among them."""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...bundle import Bundle, Component
from ...errors import MissingError, UnknownNameError
from .. import machine
from ..base import Engine
from ..options import BuildOptions, RunOptions
from ..profile import Profile
from ..store import Entry, Store

_log = logging.getLogger("fewstep.engines")

BuildProgress = Callable[[str, str, float], None]
"""Called with the component, what is being done, and how far it is (0 to 1)."""

EngineFactory = Callable[[Bundle, str, RunOptions], Engine]
"""Makes an engine without a build: what `register_in_memory` takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildJob:
    """One engine to build: from this graph and these weights into `target`, and if need be `data` beside it."""

    bundle: Bundle
    name: str
    component: Component
    profiles: tuple[Profile, ...]
    options: BuildOptions
    target: Path
    data: Path
    store: Store
    progress: BuildProgress
    cancel: threading.Event


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenJob:
    """One stored engine to load; `data` are its bytes, already checked."""

    bundle: Bundle
    name: str
    component: Component
    entry: Entry
    data: memoryview
    run: RunOptions
    store: Store

    @classmethod
    def of(cls, bundle: Bundle, entry: Entry, store: Store, run: RunOptions | None = None) -> OpenJob:
        """For a stored engine of a bundle; reads and checks its bytes."""
        name = entry.key.component
        component, session = bundle.component(name), run or RunOptions()
        store.check()
        return cls(
            bundle=bundle, name=name, component=component, entry=entry, data=entry.read(), run=session, store=store
        )


class Backend(ABC):
    """A way to build, load and run engines, with its facts as attributes; its own file makes and registers it.

    name: of the backend. device: where its bindings' buffers lie, `"cpu"` or `"cuda"`. suffix: of engine files. heeds:
    the build options that reach the engine. uses_profiles: whether an engine is made for sizes. computes: the precision
    of its engines whatever the component's (`None`: the component's own). measured: whether `"auto"` may take it for
    being the fastest on this processor; it must then compute in float32. splits_rows: whether an engine of one thread
    is worth running on parts of its rows at once. rank: the place among those that `"auto"` asks on a machine with a
    GPU (`None`: never).
    """

    name: str
    device = "cpu"
    suffix: str
    heeds: tuple[str, ...] = ()
    uses_profiles = False
    computes: str | None = None
    measured = False
    splits_rows = False
    rank: int | None = None

    @abstractmethod
    def version(self) -> str:
        """The version of the library; `MissingExtraError` without it."""

    @abstractmethod
    def available(self) -> bool:
        """Whether the library is installed, as far as can be told without loading it."""

    @abstractmethod
    def target(self, options: BuildOptions | None) -> tuple[str, str]:
        """The device's name (`ANY_DEVICE`: of any) and its capability, for the key."""

    @abstractmethod
    def memory(self, job_bytes: int) -> int:
        """Host memory in bytes that a build from weights of this size needs at its peak: a cautious estimate."""

    @abstractmethod
    def build(self, job: BuildJob) -> Mapping[str, Any]:
        """Write the engine to `job.target`; returns facts for the manifest."""

    @abstractmethod
    def open(self, job: OpenJob) -> Engine: ...

    def realised(self, engine: Engine) -> Mapping[str, Any]:
        """What an engine of this backend turned out to be, as its own library tells: for the record of its gate."""
        return {}

    def suits(self) -> str | None:
        """Why `"auto"` takes it on this machine, which has a GPU; `None` where it does not."""
        return None


_backends: dict[str, Backend] = {}
_in_memory: dict[str, EngineFactory | None] = {}


def register(backend: Backend) -> None:
    """Add a backend that builds engine files."""
    _backends[backend.name] = backend


def unregister(name: str) -> None:
    _backends.pop(name, None)


def register_in_memory(name: str, factory: EngineFactory | None = None) -> None:
    """Give a name to a backend that makes its engines in memory, with no build; without a factory it is announced."""
    if name in _backends:
        raise UnknownNameError("backend to register", name, tuple(_in_memory))
    _in_memory[name] = factory


@contextmanager
def registered_backend(name: str, factory: EngineFactory) -> Iterator[None]:
    """A backend in memory for as long as the block lasts; what had its name before has it again afterwards."""
    before = dict(_in_memory)
    register_in_memory(name, factory)
    try:
        yield
    finally:
        _in_memory.clear()
        _in_memory.update(before)


def backend_names() -> tuple[str, ...]:
    return (*_backends, *_in_memory)


def makes_in_memory(name: str) -> bool:
    """Whether a backend makes its engines in memory, so that there is nothing to build or to store."""
    return name in _in_memory


def registered(name: str) -> EngineFactory | None:
    """The factory of a backend in memory; `None` for the others, `MissingError` where its package is not loaded."""
    if name in _in_memory and _in_memory[name] is None:
        raise MissingError(
            f"the {name} backend is not registered", remedy="Import fewstep.export first: pip install 'fewstep[export]'"
        )
    return _in_memory.get(name)


def load_backend(name: str) -> Backend:
    """The backend with this name, for building and loading. Raises `UnknownNameError`, `MissingError`."""
    if name in _in_memory:
        raise MissingError(
            f"the backend {name!r} makes no engine files",
            expected=f"one of {', '.join(_backends)}",
            remedy="It runs the exported modules themselves: there is nothing to build.",
        )
    if name not in _backends:
        raise UnknownNameError("backend", name, (*backend_names(), "auto"))
    return _backends[name]


def device_of(name: str) -> str:
    """Where the engines of a backend have their buffers, if its options do not say otherwise."""
    return "cpu" if name in _in_memory else load_backend(name).device


def plain_backend() -> Backend:
    """The CPU's backend that needs nothing but what is installed anyway."""
    return next(b for b in _backends.values() if b.device == "cpu")


def measured_backends() -> tuple[Backend, ...]:
    return tuple(b for b in _backends.values() if b.measured)


def choose_backend(name: str = "auto") -> tuple[str, str]:
    """The backend to use and, in words, why; `"auto"` takes the fastest that is installed and can run here."""
    if name != "auto":
        if name not in backend_names():
            raise UnknownNameError("backend", name, (*backend_names(), "auto"))
        return name, "it was asked for"
    if not machine.has_gpu_driver():
        return plain_backend().name, "no NVIDIA driver is loaded"
    ranked = sorted((b for b in _backends.values() if b.rank is not None), key=lambda b: b.rank or 0)
    for backend in ranked:
        if backend.available() and (reason := backend.suits()):
            return backend.name, reason
    reason = "a GPU is there, but neither TensorRT nor ONNX Runtime with CUDA is installed"
    _log.warning("%s: the CPU is used. Install one with: pip install 'fewstep[cuda]'", reason)
    return plain_backend().name, reason
