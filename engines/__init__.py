"""Engines: one file per backend behind one protocol, and the store that keeps what they build."""

from .base import Binding, Engine, TensorSpec
from .build import BuiltEngine, build_engines, open_engine, open_engines
from .options import BuildOptions, RunOptions
from .profile import Profile, Span, profiles_for
from .registry import BACKENDS, choose_backend, register_backend
from .store import Entry, Store, default_store

__all__ = [
    "BACKENDS",
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
    "build_engines",
    "choose_backend",
    "default_store",
    "open_engine",
    "open_engines",
    "profiles_for",
    "register_backend",
]
