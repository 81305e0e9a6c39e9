"""What distilled checkpoints need: sampler, schedule, steps and guidance, each with the page that says so.

The table is `presets.json`, a row a preset. An export recognises one by the names of the files or of the repository
that it reads. Steps are part of a name where a checkpoint is made for one number of steps only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .bundle import Bundle, Defaults
from .errors import ArgumentError, UnknownNameError
from .schedules import resolve_sampler, resolve_schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """One distilled model's needs. `most_steps`: more make it worse; `fixed`: made for exactly `steps`.

    `pattern` is searched in names in lower case with every separator made a hyphen. `sampler`: `None` for the
    checkpoint's own scheduler. `side`: the pixels it was made for, `None` for the checkpoint's own. `least_guidance`,
    `largest_guidance`: below and above them images are spoilt. `options`: of the sampler and of its schedule.
    `families`: `None` for all.
    """

    name: str
    pattern: str
    source: str
    sampler: str | None
    steps: int
    schedule: str | None = None
    guidance: float = 0.0
    least_guidance: float = 0.0
    largest_guidance: float = 1.0
    fixed: bool = False
    most_steps: int | None = None
    side: int | None = None
    timesteps: tuple[int, ...] | None = None
    prediction: str | None = None
    options: Mapping[str, float] = field(default_factory=dict)
    families: tuple[str, ...] | None = None

    def suits(self, family: str) -> bool:
        return self.families is None or family in self.families


def _read(row: Mapping[str, Any]) -> Preset:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
    return Preset(**fields)


PRESETS = tuple(map(_read, json.loads(Path(__file__).with_name("presets.json").read_text(encoding="utf-8"))))
PRESETS_BY_NAME = {p.name: p for p in PRESETS}


KINDS = {
    **{k: k for k in ("lcm", "tcd", "turbo", "lightning", "hyper")},
    **dict.fromkeys(("dmd2", "nitrosd", "sid-lsg"), "lcm"),
    "pcm": "hyper",
}
"""What presets' names tell of, and whose samplers suit that."""


def kind_of(preset: str | None) -> str | None:
    """The kind of distillation that a preset's name tells of; DMD2's students, say, are sampled as LCM's."""
    return next((kind for k, kind in KINDS.items() if preset and k in preset), None)


def preset_warnings(bundle: Bundle, asked: Mapping[str, Any]) -> list[str]:
    """What in a request goes against the bundle's preset, one sentence each.

    asked: `steps`, `guidance`, `sampler`, `schedule` and `size` as a caller gave them; `None` or absent for the
    bundle's own.
    """
    defaults = bundle.defaults
    preset = PRESETS_BY_NAME.get(defaults.preset or "")
    if preset is None:
        return []
    warnings = [_steps_warning(preset, asked.get("steps")), _guidance_warning(preset, asked.get("guidance"))]
    warnings.append(_schedule_warning(preset, defaults, asked.get("sampler"), asked.get("schedule")))
    size = asked.get("size")
    if size is not None and preset.side is not None and max(size) > preset.side:
        warnings.append(f"{preset.name} was made for {preset.side}x{preset.side} pixels, not {size[0]}x{size[1]}.")
    return [w for w in warnings if w]


def _steps_warning(preset: Preset, steps: int | None) -> str | None:
    if steps is None:
        return None
    if preset.fixed and steps != preset.steps:
        return f"{preset.name} was made for {preset.steps} steps, not {steps}."
    if preset.most_steps is not None and steps > preset.most_steps:
        return f"{preset.name} was made for at most {preset.most_steps} steps, not {steps}."
    return None


def _guidance_warning(preset: Preset, guidance: float | None) -> str | None:
    if guidance is None or preset.least_guidance <= guidance <= preset.largest_guidance:
        return None
    if guidance < preset.least_guidance:
        return f"{preset.name} was made for guidance of at least {preset.least_guidance:g}, not {guidance:g}."
    if preset.largest_guidance <= 1:
        return f"{preset.name} was made to run without guidance, not with {guidance:g}; use --guidance 0."
    return f"{preset.name} was made for guidance of at most {preset.largest_guidance:g}, not {guidance:g}."


def _schedule_warning(preset: Preset, defaults: Defaults, sampler: str | None, schedule: str | None) -> str | None:
    if preset.schedule is None:
        return None
    named = resolve_schedule(schedule) if schedule else resolve_sampler(sampler).schedule if sampler else None
    if named in (None, preset.schedule):
        return None
    return f"{preset.name} was made for {preset.schedule} timesteps, not {named}; use --schedule {preset.schedule}."


def find_preset(name: str, family: str) -> Preset:
    """A preset by its name; `UnknownNameError` lists the nearest, `ArgumentError` refuses another family's."""
    if name not in PRESETS_BY_NAME:
        raise UnknownNameError("preset", name, PRESETS_BY_NAME)
    preset = PRESETS_BY_NAME[name]
    if not preset.suits(family):
        raise ArgumentError(
            f"preset {name} for a checkpoint of family {family}", expected=f"one of {', '.join(preset.families or ())}"
        )
    return preset


def recognise_preset(names: Iterable[str], family: str) -> Preset | None:
    """The preset that one of the names (files, repositories, folders) tells; the first name that tells one decides."""
    for name in names:
        plain = re.sub(r"[^a-z0-9]+", "-", name.lower().removesuffix(".safetensors"))
        for preset in PRESETS:
            if preset.suits(family) and re.search(preset.pattern, plain):
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
