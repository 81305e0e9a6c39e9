"""The backends: what builds, loads and runs engines of one library. A new one is its file and an import here."""

from . import ort_cpu, openvino, ort_cuda, tensorrt_build, torch  # noqa: F401, I001 - in the order of the listings
from .registry import (
    Backend,
    BuildJob,
    BuildProgress,
    OpenJob,
    backend_names,
    choose_backend,
    device_of,
    load_backend,
    makes_in_memory,
    measured_backends,
    plain_backend,
    register,
    register_in_memory,
    registered,
    registered_backend,
    unregister,
)

__all__ = [
    "Backend",
    "BuildJob",
    "BuildProgress",
    "OpenJob",
    "backend_names",
    "choose_backend",
    "device_of",
    "load_backend",
    "makes_in_memory",
    "measured_backends",
    "plain_backend",
    "register",
    "register_in_memory",
    "registered",
    "registered_backend",
    "unregister",
]
