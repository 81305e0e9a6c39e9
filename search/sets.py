"""Prompts with seeds in three sets that share neither: to search on, to choose by, and to be judged by in the end."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ArgumentError, MissingError
from ..runtime import Pipeline
from ..runtime.arrays import Float32, Shape
from ..runtime.conditioning import Conditioning
from ..runtime.noise.seeds import TorchCpuGenerator
from .problem import Pairs

MEDIA = ("a photo", "an oil painting", "a watercolour", "a pencil drawing", "a film still", "a digital illustration")
SUBJECTS = (
    *(
        "a lighthouse",
        "an old fisherman",
        "two children reading",
        "a red bicycle",
        "a bowl of lemons",
        "a sleeping cat",
    ),
    *("a steam train", "a mountain hut", "a violin on a chair", "an astronaut", "a city street", "a field of poppies"),
    *("a ceramic teapot", "a barn owl", "a sailing boat", "a woman with a hat"),
)
LIGHTS = ("at dawn", "in heavy rain", "under neon light", "in soft window light", "at night", "on a bright winter day")
MOST_PROMPTS = 10_000
FLOOR_PAIRS, CURVE_PAIRS = 16, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Pairs to search on, to choose by, and held out."""

    search: int
    choose: int
    held_out: int

    @property
    def total(self) -> int:
        return self.search + self.choose + self.held_out

    @property
    def floor(self) -> int:
        """Held-out pairs that the teacher is compared with itself on."""
        return min(FLOOR_PAIRS, max(2, self.held_out // 4))

    @property
    def curve(self) -> int:
        """Held-out pairs that published tables are looked at on, at more steps than are searched."""
        return min(CURVE_PAIRS, max(2, self.held_out // 2))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sets:
    """Three sets of pairs, and the conditioning of each pair by its index."""

    search: Pairs
    choose: Pairs
    held_out: Pairs
    conditionings: tuple[Conditioning, ...]

    @property
    def counts(self) -> Counts:
        return Counts(search=len(self.search), choose=len(self.choose), held_out=len(self.held_out))


def usual_prompts() -> list[str]:
    """Captions of many kinds, for models of general pictures."""
    return [f"{m} of {s} {light}" for m, s, light in itertools.product(MEDIA, SUBJECTS, LIGHTS)]


def read_prompts(path: Path) -> list[str]:
    """A file's lines, empty ones and those that begin with # left out; `MissingError`, `ArgumentError`."""
    if not path.is_file():
        raise MissingError(f"no file {str(path)!r}", expected="a file with a prompt a line")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{path.name} is not UTF-8", expected="a file with a prompt a line") from error
    return [line for line in lines if line and not line.startswith("#")]


def check_prompts(prompts: Sequence[str]) -> list[str]:
    """Those that differ, in their order; `ArgumentError` for fewer than three, as the sets share none."""
    different = list(dict.fromkeys(prompts))
    if not 3 <= len(different) <= MOST_PROMPTS:
        raise ArgumentError(
            f"{len(different)} different prompts", expected=f"3 to {MOST_PROMPTS}, as three sets share none"
        )
    return different


def prompts_digest(prompts: Sequence[str]) -> str:
    """SHA-256 of prompts, in hexadecimal."""
    return hashlib.sha256("\n".join(prompts).encode("utf-8")).hexdigest()


def share_prompts(prompts: Sequence[str], counts: Counts, seed: int) -> list[list[str]]:
    """Prompts for each set's pairs: no prompt in two sets, and repeated within one where there are too few."""
    order = np.random.default_rng(seed).permutation(len(prompts))
    shuffled = [prompts[i] for i in order]
    wanted = (counts.search, counts.choose, counts.held_out)
    scale = min(1.0, len(shuffled) / counts.total)
    shares = [max(1, int(n * scale)) for n in wanted]
    while sum(shares) > len(shuffled):
        shares[int(np.argmax(shares))] -= 1
    edges = np.cumsum([0, *shares])
    return [
        list(itertools.islice(itertools.cycle(shuffled[a:b]), n))
        for (a, b), n in zip(itertools.pairwise(edges), wanted, strict=True)
    ]


def make_sets(
    pipeline: Pipeline,
    prompts: Sequence[str],
    counts: Counts,
    *,
    seed: int,
    guidance: float,
    size: tuple[int, int],
    negative: str | None,
    loras: Mapping[str, Any] | None = None,
) -> Sets:
    """Encode the prompts and draw each pair's noise; no seed is in two sets. loras: on every pair."""
    shared = share_prompts(prompts, counts, seed)
    conditionings: list[Conditioning] = []
    shape: Shape | None = None
    for part in _parts([p for of_set in shared for p in of_set], 64):
        asked = pipeline.request(part, negative=negative, seed=0, guidance=guidance, size=size, steps=1, loras=loras)
        prepared = pipeline.prepare(asked)
        conditionings += [s.conditioning for s in prepared.samplings]
        shape = prepared.shape
    if shape is None:
        raise ArgumentError("no pairs", expected="at least one in each set")
    first, sets = 0, []
    for n in (counts.search, counts.choose, counts.held_out):
        index = np.arange(first, first + n)
        sets.append(Pairs(index=index, gaussians=_noise([seed + int(i) for i in index], shape)))
        first += n
    return Sets(search=sets[0], choose=sets[1], held_out=sets[2], conditionings=tuple(conditionings))


def _noise(seeds: Sequence[int], shape: Shape) -> Float32:
    """What a request with each of these seeds starts from."""
    return np.stack([TorchCpuGenerator(s).randn((1, *shape))[0] for s in seeds])


def _parts(prompts: Sequence[str], most: int) -> list[list[str]]:
    return [list(prompts[i : i + most]) for i in range(0, len(prompts), most)]
