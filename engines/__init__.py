"""Engines: one file per backend behind one protocol, and the store that keeps what they build."""

from .backends.registry import backend_names, choose_backend, register_in_memory
from .base import Binding, Engine, TensorSpec
from .build import BuiltEngine
from .open import build_engines, open_engine, open_engines
from .options import BuildOptions, RunOptions
from .profile import Profile, Span, profiles_for
from .store import Entry, Store, default_store

__all__ = [
    "Binding",
    "BuildOptions",
    "BuiltEngine",
    "Engine",
    "Entry",
    "Profile",
    "RunOptions",
    "Span",
    "Store",
    "TensorSpec",
    "backend_names",
    "build_engines",
    "choose_backend",
    "default_store",
    "open_engine",
    "open_engines",
    "profiles_for",
    "register_in_memory",
]
