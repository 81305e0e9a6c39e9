"""`presets.json` is data, and this says what a row of it must be."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fewstep.families import all_families
from fewstep.presets import PRESETS, PRESETS_BY_NAME, Preset, kind_of
from fewstep.schedules import NoiseSchedule, resolve_sampler, resolve_schedule
from fewstep.schedules.listing import samplers_for

ROWS: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "presets.json").read_text(encoding="utf-8"))


NOISE = NoiseSchedule.scaled_linear()


def is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


KINDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("name", "pattern", "schedule"), is_text),
    "sampler": lambda value: value is None or is_text(value),
    **dict.fromkeys(("steps", "most_steps", "side"), is_count),
    **dict.fromkeys(("guidance", "least_guidance", "largest_guidance"), is_number),
    "source": lambda value: is_text(value) and value.startswith("https://"),
    "fixed": lambda value: isinstance(value, bool),
    "timesteps": lambda value: isinstance(value, list) and bool(value) and all(map(is_count, value)),
    "prediction": lambda value: value in ("epsilon", "v_prediction", "sample"),
    "options": lambda value: isinstance(value, dict) and all(map(is_number, value.values())),
    "families": lambda value: isinstance(value, list) and set(value) <= {f.name for f in all_families()},
}


@pytest.mark.parametrize("row", ROWS, ids=[r["name"] for r in ROWS])
def test_a_row_is_whole(row: dict[str, Any]) -> None:
    assert {key: KINDS[key](value) for key, value in row.items()} == dict.fromkeys(row, True)
    re.compile(row["pattern"])
    preset = PRESETS_BY_NAME[row["name"]]
    assert preset.sampler is None or resolve_sampler(preset.sampler).name
    assert preset.least_guidance <= preset.guidance <= preset.largest_guidance or preset.guidance == 0
    assert preset.schedule is None or resolve_schedule(preset.schedule)
    assert preset.timesteps is None or len(preset.timesteps) == preset.steps


def test_a_presets_own_sampler_suits_its_kind() -> None:
    """What `fewstep samplers --for` says of a distilled checkpoint does not go against what it was made for."""
    kinds = {p.name: kind_of(p.name) for p in PRESETS if p.sampler is not None}
    suiting = {k: {s.sampler for s in samplers_for(NOISE, family=k) if s.suits} for k in set(kinds.values())}
    own = {name: resolve_sampler(str(PRESETS_BY_NAME[name].sampler)).name for name in kinds}
    assert {name for name, kind in kinds.items() if own[name] not in suiting[kind]} == set()
    assert {name for name, kind in kinds.items() if kind is None} == {"sdxl-flash"}


def test_the_kinds_are_those_of_a_preset_and_names_are_given_once() -> None:
    assert KINDS.keys() == {f.name for f in dataclasses.fields(Preset)}
    assert len(PRESETS) == len(PRESETS_BY_NAME) == len(ROWS) > 10
