"""The backends by name, each loaded when it is first asked for, and the choice among them."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import MissingError, UnknownNameError
from . import machine
from .base import Engine
from .options import BuildOptions, RunOptions
from .profile import Profile

if TYPE_CHECKING:
    from ..bundle import Bundle, Component
    from .store import Entry, Store

BACKENDS = ("ort-cpu", "ort-openvino", "ort-openvino-bf16", "ort-cuda", "tensorrt", "tensorrt-rtx", "torch")
ON_CPU = ("ort-cpu", "ort-openvino", "ort-openvino-bf16")
_MODULES = {
    "ort-cpu": "backends.ort_build",
    "ort-openvino": "backends.ort_build",
    "ort-openvino-bf16": "backends.ort_build",
    "ort-cuda": "backends.ort_build",
    "tensorrt": "backends.tensorrt_build",
    "tensorrt-rtx": "backends.tensorrt_build",
}
_log = logging.getLogger("fewstep.engines")

Progress = Callable[[str, str, float], None]
"""Called with the component, what is being done, and how far it is (0 to 1)."""

EngineFactory = Callable[["Bundle", str, RunOptions], Engine]
"""Makes an engine without a build: what `register_backend` takes."""


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
    progress: Progress
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


class Backend(Protocol):
    """What builds and loads engines of one kind. `heeds` names the build options that reach the engine."""

    name: str
    suffix: str
    heeds: tuple[str, ...]
    uses_profiles: bool

    def version(self) -> str:
        """The version of the library; `MissingExtraError` without it."""

    def target(self, options: BuildOptions | None) -> tuple[str, str]:
        """The device's name and its capability, for the key."""

    def memory(self, job_bytes: int) -> int:
        """Host memory in bytes that a build from weights of this size needs at its peak: a cautious estimate."""

    def build(self, job: BuildJob) -> Mapping[str, Any]:
        """Write the engine to `job.target`; returns facts for the manifest."""

    def open(self, job: OpenJob) -> Engine: ...


_factories: dict[str, EngineFactory] = {}


def register_backend(name: str, factory: EngineFactory) -> None:
    """Give a name to a backend that makes its engines in memory, with no build (the torch engine)."""
    if name in _MODULES:
        raise UnknownNameError("backend to register", name, ("torch",))
    _factories[name] = factory


def registered(name: str) -> EngineFactory | None:
    return _factories.get(name)


def load_backend(name: str) -> Backend:
    """The backend with this name, for building and loading. Raises `UnknownNameError`, `MissingError`."""
    if name not in _MODULES:
        known = (*BACKENDS, *_factories, "auto")
        if name not in known:
            raise UnknownNameError("backend", name, known)
        raise MissingError(
            f"the backend {name!r} makes no engine files",
            expected=f"one of {', '.join(_MODULES)}",
            remedy="It runs the exported modules themselves: there is nothing to build.",
        )
    module = importlib.import_module(f".{_MODULES[name]}", __package__)
    result: Backend = module.backend(name)
    return result


def choose_backend(name: str = "auto") -> tuple[str, str]:
    """The backend to use and, in words, why; `"auto"` takes the fastest that is installed and can run here."""
    if name != "auto":
        if name not in BACKENDS and name not in _factories:
            raise UnknownNameError("backend", name, (*BACKENDS, "auto"))
        return name, "it was asked for"
    if not machine.has_gpu_driver():
        return "ort-cpu", "no NVIDIA driver is loaded"
    if _installed("tensorrt_rtx") and machine.gpu().compute_capability in RTX_CAPABILITIES:
        return "tensorrt-rtx", "a GPU that TensorRT-RTX supports, and its module is installed"
    if _installed("tensorrt"):
        return "tensorrt", "a GPU, and TensorRT is installed"
    if _installed("onnxruntime"):
        import onnxruntime

        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            return "ort-cuda", "a GPU, and ONNX Runtime was installed with CUDA"
    reason = "a GPU is there, but neither TensorRT nor ONNX Runtime with CUDA is installed"
    _log.warning("%s: the CPU is used. Install one with: pip install 'fewstep[cuda]'", reason)
    return "ort-cpu", reason


RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
