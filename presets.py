"""What distilled checkpoints need: sampler, schedule, steps and guidance, each with the page that says so.

An export recognises a preset by the names of the files or of the repository that it reads. Steps are part of a name
where a checkpoint is made for one number of steps only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .bundle import Bundle, Defaults
from .schedules import resolve_sampler, resolve_schedule

_HUB = "https://huggingface.co/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """One distilled model's needs. `most_steps`: more make it worse; `fixed`: made for exactly `steps`.

    `pattern` is searched in names in lower case with every separator made a hyphen. `side`: the pixels it was made
    for, `None` for the checkpoint's own. `largest_guidance`: above it images are spoilt.
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
    families: tuple[str, ...] = ("sd1", "sd2", "sdxl")


def _lightning(steps: int) -> Preset:
    return Preset(
        name=f"sdxl-lightning-{steps}",
        pattern=rf"lightning.*(?<!\d){steps}-?step",
        source=f"{_HUB}ByteDance/SDXL-Lightning",
        sampler="euler",
        schedule="trailing",
        steps=steps,
        fixed=True,
        prediction="sample" if steps == 1 else None,
        families=("sdxl",),
    )


def _hyper(steps: int) -> Preset:
    return Preset(
        name=f"hyper-sd-{steps}",
        pattern=rf"hyper-sd.*(?<!\d){steps}-?steps?-lora",
        source=f"{_HUB}ByteDance/Hyper-SD",
        sampler="ddim",
        schedule="trailing",
        steps=steps,
        fixed=True,
        families=("sd1", "sdxl"),
    )


PRESETS: tuple[Preset, ...] = (
    *(_lightning(n) for n in (1, 2, 4, 8)),
    Preset(
        name="sdxl-turbo",
        pattern=r"(sdxl|sd-xl)-turbo",
        source=f"{_HUB}stabilityai/sdxl-turbo",
        sampler="euler_ancestral",
        schedule="trailing",
        steps=1,
        most_steps=4,
        side=512,
        families=("sdxl",),
    ),
    Preset(
        name="sd-turbo",
        pattern=r"(?<![a-z])sd-turbo",
        source=f"{_HUB}stabilityai/sd-turbo",
        sampler="euler",
        schedule="trailing",
        steps=1,
        most_steps=4,
        side=512,
        families=("sd2",),
    ),
    Preset(
        name="lcm-lora",
        pattern=r"lcm-lora",
        source=f"{_HUB}latent-consistency/lcm-lora-sdxl",
        sampler="lcm",
        steps=4,
        guidance=1.0,
        largest_guidance=2.0,
        families=("sd1", "sdxl"),
    ),
    Preset(
        name="lcm",
        pattern=r"lcm-(dreamshaper|sdxl|sd-?v?1)",
        source=f"{_HUB}SimianLuo/LCM_Dreamshaper_v7",
        sampler="lcm",
        steps=4,
        guidance=8.0,
        largest_guidance=13.0,
        families=("sd1", "sdxl"),
    ),
    Preset(
        name="tcd-lora",
        pattern=r"tcd-.*lora|^tcd-",
        source=f"{_HUB}h1t/TCD-SDXL-LoRA",
        sampler="tcd",
        steps=4,
        families=("sd1", "sd2", "sdxl"),
    ),
    *(_hyper(n) for n in (2, 4, 8)),
    Preset(
        name="hyper-sd-unified",
        pattern=r"hyper-sd.*(?<!\d)1-?step-lora",
        source=f"{_HUB}ByteDance/Hyper-SD",
        sampler="tcd",
        options={"eta": 1.0},
        steps=4,
        most_steps=8,
        families=("sd1", "sdxl"),
    ),
    Preset(
        name="hyper-sdxl-1-unet",
        pattern=r"hyper-sdxl.*(?<!\d)1-?step-unet",
        source=f"{_HUB}ByteDance/Hyper-SD",
        sampler="lcm",
        steps=1,
        fixed=True,
        timesteps=(800,),
        families=("sdxl",),
    ),
    Preset(
        name="dmd2-4",
        pattern=r"dmd2.*(?<!\d)4-?step",
        source=f"{_HUB}tianweiy/DMD2",
        sampler="lcm",
        steps=4,
        fixed=True,
        timesteps=(999, 749, 499, 249),
        families=("sdxl",),
    ),
    Preset(
        name="dmd2-1",
        pattern=r"dmd2.*(?<!\d)1-?step",
        source=f"{_HUB}tianweiy/DMD2",
        sampler="lcm",
        steps=1,
        fixed=True,
        timesteps=(399,),
        families=("sdxl",),
    ),
)
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
    found = [_steps_warning(preset, asked.get("steps")), _guidance_warning(preset, asked.get("guidance"))]
    found.append(_schedule_warning(preset, defaults, asked.get("sampler"), asked.get("schedule")))
    size = asked.get("size")
    if size is not None and preset.side is not None and max(size) > preset.side:
        found.append(f"{preset.name} was made for {preset.side}x{preset.side} pixels, not {size[0]}x{size[1]}.")
    return [w for w in found if w]


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
