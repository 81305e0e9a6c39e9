"""What is measured, and what came of it, by contender."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ALL_CORES = 0.85
"""The share of its threads that a turn needs to count as one with all cores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is measured. `load` and `request` go to the workers; `unet` evaluates the UNet alone.

    `variants` are named sets of `fewstep.load` options, each a contender of its own; `precisions` are those of the
    peers, or a peer's own where it has none of them. A turn begins with `lead_in` requests that are not counted: they
    find the processor's caches as the contender before left them, which a warm request does not. `peers_at_once` (0:
    all) bounds a meeting. `python` are interpreters of variants that need another environment.
    """

    load: dict[str, Any]
    request: dict[str, Any]
    steps: tuple[int, ...]
    against: tuple[str, ...]
    variants: dict[str, dict[str, Any]]
    precisions: tuple[str, ...] = ("float32",)
    repeat: int = 20
    warm_up: int = 2
    lead_in: int = 1
    cold: int = 3
    peers_at_once: int = 0
    unet: dict[str, Any] | None = None
    python: dict[str, Path] = field(default_factory=dict)
    environments: Path = Path("build/bench")

    @property
    def threads(self) -> int:
        """Of every contender: as many as asked for, or one a core."""
        return int(self.load["threads"]) or os.cpu_count() or 1


@dataclass(slots=True)
class Samples:
    """What one contender did: milliseconds by number of steps, stages, and what it was made of.

    `cores` are those that the machine gave round each turn; `cold_unbuilt` are starts that found no engine stored.
    """

    wall: dict[int, list[float]] = field(default_factory=dict)
    cpu: dict[int, list[float]] = field(default_factory=dict)
    cores: dict[int, list[float]] = field(default_factory=dict)
    stages: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    cold: list[float] = field(default_factory=list)
    cold_unbuilt: list[float] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    import_ms: float = 0.0
    load_ms: float = 0.0
    peak_mb: float = 0.0
    error: str = ""
    output: np.ndarray | None = None

    def with_all_cores(self, steps: int, threads: int) -> list[float]:
        """The milliseconds of the turns in which the machine gave as many cores as there were threads."""
        turns = zip(self.wall.get(steps, ()), self.cores.get(steps, ()), strict=True)
        return [wall for wall, cores in turns if cores >= ALL_CORES * threads]
