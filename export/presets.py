"""Presets at export: which one a checkpoint asks for, by its own names or by the user's, and what it sets."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ..errors import ArgumentError, UnknownNameError
from ..presets import PRESETS, PRESETS_BY_NAME, Preset

__all__ = ["Preset", "find_preset", "preset_defaults", "recognise_preset"]


def find_preset(name: str, family: str) -> Preset:
    """A preset by its name; `UnknownNameError` lists the nearest, `ArgumentError` refuses another family's."""
    if name not in PRESETS_BY_NAME:
        raise UnknownNameError("preset", name, PRESETS_BY_NAME)
    found = PRESETS_BY_NAME[name]
    if family not in found.families:
        raise ArgumentError(
            f"preset {name} for a checkpoint of family {family}", expected=f"one of {', '.join(found.families)}"
        )
    return found


def recognise_preset(names: Iterable[str], family: str) -> Preset | None:
    """The preset that one of the names (files, repositories, folders) tells; the first name that tells one decides."""
    for name in names:
        plain = re.sub(r"[^a-z0-9]+", "-", name.lower().removesuffix(".safetensors"))
        for preset in PRESETS:
            if family in preset.families and re.search(preset.pattern, plain):
                return preset
    return None


def preset_defaults(preset: Preset, width: int, height: int) -> dict[str, Any]:
    """The fields of `Defaults` that a preset sets, beside a checkpoint's own size."""
    return {
        "width": preset.side or width,
        "height": preset.side or height,
        "steps": preset.steps,
        "guidance": preset.guidance,
        "sampler": preset.sampler,
        "schedule": preset.schedule,
        "preset": preset.name,
        "timesteps": preset.timesteps,
        "prediction": preset.prediction,
        "options": dict(preset.options),
    }
