"""A component as it takes low-rank changes: the same weights under a graph with inputs for them, and its engine."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ..bundle import Bundle, Component
from .base import Engine
from .graph.accounting import count_operators
from .graph.low_rank import DOWN, UP, Layer, add_low_rank

INPUTS = (DOWN, UP)
RANKS = (4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Ranks that evaluations have: a row's own is filled up with zeros to the next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptedBundle(Bundle):
    """A bundle of which a component's graph was changed in memory: `graphs` by file name, `layers` by component.

    vocabularies: by component, the tokens that a text encoder which takes further words has itself.
    """

    graphs: Mapping[str, bytes] = field(default_factory=dict)
    layers: Mapping[str, tuple[Layer, ...]] = field(default_factory=dict)
    vocabularies: Mapping[str, int] = field(default_factory=dict)

    def read_graph(self, component: Component) -> bytes:
        own = self.graphs.get(component.graph)
        return Bundle.read_graph(self, component) if own is None else own


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapted:
    """An engine that takes low-rank changes of its layers beside its other inputs, and a text encoder's also words.

    vocabulary: tokens that a text encoder has itself; ids from there on are the words' that are given.
    """

    engine: Engine
    layers: tuple[Layer, ...]
    vocabulary: int | None = None

    @property
    def extent(self) -> tuple[int, int]:
        """Rows of `lora_down` and columns of `lora_up`."""
        last = self.layers[-1]
        return last.down + last.height, last.up + last.width


def with_low_rank(bundle: Bundle, name: str, *, kernels: bool) -> AdaptedBundle:
    """The bundle with a component whose graph takes low-rank changes of its layers.

    kernels: of convolutions of larger kernels too. Raises `UnsupportedError` for a graph without such layers.
    """
    part = bundle.component(name)
    changed = add_low_rank(bundle.read_graph(part), kernels=kernels)
    component = replace(
        part,
        graph=f"{name}.low-rank.onnx",
        graph_sha256=hashlib.sha256(changed.model).hexdigest(),
        inputs=(*part.inputs, *changed.inputs),
        operators=dict(count_operators(changed.model)),
    )
    own = {f.name: getattr(bundle, f.name) for f in fields(Bundle)}
    own["components"] = {**bundle.components, name: component}
    return AdaptedBundle(
        **own,
        graphs={component.graph: changed.model},
        layers={name: changed.layers},
        vocabularies={} if changed.vocabulary is None else {name: changed.vocabulary},
    )


def bucket(rank: int) -> int:
    """The rank to which one is filled up, so that few sizes are bound, built and recorded."""
    return next((r for r in RANKS if r >= rank), rank)


@lru_cache(maxsize=8)
def no_change(extent: tuple[int, int], rank: int) -> dict[str, npt.NDArray[np.float32]]:
    """The arrays of a row whose weights are as they are, the same ones each time."""
    down, up = extent
    return {DOWN: np.zeros((down, rank), np.float32), UP: np.zeros((rank, up), np.float32)}
