"""What a UNet is told besides latent and timestep: one record an input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """An input of the UNet besides sample and timestep, by row: its name and its shape behind the rows.

    group: the dictionary in which diffusers' UNet takes it, where it is not an argument of its own. argument: that of a
    call which gives its value beside prompts' own (`prompt_embeds`), if there is one. example: a row's values for
    comparing engines, where unit noise would not do. adapter: the name of the network beside the UNet that takes it; a
    row that is told nothing of it has zeros, with which the network changes nothing. joined: it is more channels of the
    sample, behind the latent's own and the same in every frame, which the graph puts there.
    """

    name: str
    shape: tuple[int | str, ...]
    group: str | None = None
    argument: str | None = None
    example: tuple[float, ...] | None = None
    adapter: str | None = None
    joined: bool = False
