"""Whose noise a call draws: the generators it is given, or torch's global one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import ArgumentError
from ..noise.seeds import Gaussians, TorchCpuGenerator
from ..noise.torch_state import is_generator, read_generator, seed_of, write_back


@dataclass(frozen=True, slots=True)
class Streams:
    """The generators of a call, each with what draws in its place; `shared`: one for the whole batch."""

    shared: bool
    sources: Sequence[tuple[Any, Gaussians]]

    @property
    def drawn(self) -> tuple[Gaussians, ...] | None:
        return tuple(ours for _, ours in self.sources) or None

    @property
    def seeds(self) -> dict[str, Any]:
        """Seeds for the pictures' parameters."""
        seeds = [each if isinstance(each, int) else seed_of(each) for each, _ in self.sources]
        return {} if not seeds else {"seed": seeds[0] if len(seeds) == 1 else seeds}

    def leave(self) -> None:
        """Leave torch's generators where diffusers would leave them."""
        for theirs, ours in self.sources:
            if is_generator(theirs):
                write_back(theirs, ours)


def read_streams(generator: Any, where: str) -> Streams:
    """The streams of a call on a device, like `"cpu"` or `"cuda:0"`.

    Without a generator diffusers draws from torch's global one, which `torch.manual_seed` seeds; where the caller has
    not loaded torch there is none, and seeds are random.
    """
    if generator is None:
        generator = _global_generator(where)
        if generator is None:
            return Streams(False, ())
    one = not isinstance(generator, (list, tuple))
    return Streams(one, [(each, _source(each)) for each in ([generator] if one else generator)])


def _global_generator(where: str) -> Any:
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    kind, _, index = where.partition(":")
    if kind != "cuda":
        return torch.default_generator
    torch.cuda.init()
    return torch.cuda.default_generators[int(index or 0)]


def _source(each: Any) -> Gaussians:
    if isinstance(each, int) and not isinstance(each, bool):
        return TorchCpuGenerator(each)
    if is_generator(each):
        return read_generator(each)
    raise ArgumentError(f"a generator is {type(each).__name__}", expected="torch.Generator or an integer")
