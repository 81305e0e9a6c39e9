"""What distilled checkpoints need: sampler, schedule, steps and guidance, each with the page that says so.

The table is `presets.json`, a row a preset. An export recognises one by the names of the files or of the repository
that it reads. Steps are part of a name where a checkpoint is made for one number of steps only.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from .bundle import Bundle, Defaults
from .errors import ArgumentError, CorruptError, UnknownNameError
from .families import all_families
from .schedules import resolve_sampler, resolve_schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """One distilled model's needs. `most_steps`: more make it worse; `fixed`: made for exactly `steps`.

    `pattern` is searched in names in lower case with every separator made a hyphen. `side`: the pixels it was made
    for, `None` for the checkpoint's own. `largest_guidance`: above it images are spoilt. `families`: `None` for all.
    """

    name: str
    pattern: str
    source: str
    sampler: str
    steps: int
    schedule: str | None = None
    guidance: float = 0.0
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


def read_presets(text: str) -> tuple[Preset, ...]:
    """The presets of a JSON list, one object each; `CorruptError` names the row and the key that is wrong."""
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise CorruptError(f"the presets are not JSON ({error})", expected="a list of objects") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise CorruptError("the presets are not a list of objects", expected="one object a preset")
    presets = tuple(_read_row(row) for row in rows)
    if len({p.name for p in presets}) < len(presets):
        raise CorruptError("two presets have one name", expected="a name each")
    return presets


def _read_row(row: Mapping[str, Any]) -> Preset:
    name = str(row.get("name"))
    for key, value in row.items():
        if key not in _KINDS:
            raise CorruptError(f"preset {name!r} has {key!r}", expected=f"only {', '.join(_KINDS)}")
        if not _KINDS[key](value):
            raise CorruptError(f"preset {name!r} states {key} = {str(value)[:60]!r}", expected="a value of its kind")
    missing = [f.name for f in fields(Preset) if f.default is MISSING and f.default_factory is MISSING]
    missing = [key for key in missing if key not in row]
    if missing:
        raise CorruptError(f"preset {name!r} lacks {missing[0]!r}", expected="it")
    try:
        re.compile(row["pattern"])
    except re.error as error:
        raise CorruptError(f"preset {name!r} has the pattern {row['pattern']!r} ({error})") from error
    resolve_sampler(row["sampler"])
    if row.get("schedule"):
        resolve_schedule(row["schedule"])
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
    return Preset(**values)


def _text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


_KINDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("name", "pattern", "source", "sampler", "schedule"), _text),
    **dict.fromkeys(("steps", "most_steps", "side"), _count),
    **dict.fromkeys(("guidance", "largest_guidance"), _number),
    "fixed": lambda value: isinstance(value, bool),
    "timesteps": lambda value: isinstance(value, list) and bool(value) and all(map(_count, value)),
    "prediction": lambda value: value in ("epsilon", "v_prediction", "sample"),
    "options": lambda value: isinstance(value, dict) and all(map(_number, value.values())),
    "families": lambda value: isinstance(value, list) and all(v in (f.name for f in all_families()) for v in value),
}
PRESETS = read_presets(Path(__file__).with_name("presets.json").read_text(encoding="utf-8"))
PRESETS_BY_NAME = {p.name: p for p in PRESETS}


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
    if guidance is None or guidance <= preset.largest_guidance:
        return None
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
