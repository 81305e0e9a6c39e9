"""`presets.json` is data: what is wrong in a row is said by its name and key."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fewstep.errors import CorruptError, FewstepError
from fewstep.presets import PRESETS, read_presets
from fewstep.schedules import resolve_sampler

GOOD: dict[str, Any] = {"name": "x", "pattern": "x-.*", "source": "a page", "sampler": "euler", "steps": 4}


def test_every_row_is_whole() -> None:
    assert len(PRESETS) > 10
    for preset in PRESETS:
        assert resolve_sampler(preset.sampler).name
        assert preset.source.startswith("https://")
        assert preset.timesteps is None or len(preset.timesteps) == preset.steps, preset.name
    assert read_presets(json.dumps([GOOD]))[0].suits("any family at all")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stepz": 4}, "preset 'x' has 'stepz'"),
        ({"steps": "4"}, "states steps = '4'"),
        ({"steps": 0}, "states steps"),
        ({"steps": True}, "states steps"),
        ({"guidance": float("inf")}, "states guidance"),
        ({"fixed": 1}, "states fixed"),
        ({"timesteps": [999, 1.5]}, "states timesteps"),
        ({"timesteps": []}, "states timesteps"),
        ({"prediction": "noise"}, "states prediction"),
        ({"options": {"eta": "1"}}, "states options"),
        ({"families": ["sd9"]}, "states families"),
        ({"pattern": "(x"}, "the pattern '\\(x'"),
        ({"sampler": "eulr"}, "unknown sampler 'eulr'"),
        ({"schedule": "trailling"}, "unknown schedule"),
        ({"name": ""}, "states name"),
        ({"sampler": None}, "lacks 'sampler'"),
    ],
)
def test_a_wrong_row_is_named(changes: dict[str, Any], words: str) -> None:
    row = {**GOOD, **changes}
    row = {k: v for k, v in row.items() if v is not None}
    with pytest.raises(FewstepError, match=words):
        read_presets(json.dumps([row]))


@pytest.mark.parametrize("text", ["", "{}", "[1]", "[", json.dumps([GOOD, GOOD])])
def test_a_wrong_table_is_refused(text: str) -> None:
    with pytest.raises(CorruptError, match="presets"):
        read_presets(text)
