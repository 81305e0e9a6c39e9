"""What a live session's page can offer of a model: sizes, samplers and schedules that suit it, and presets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...presets import PRESETS, kind_of
from ...runtime.pictures.parameters import command_line
from ...runtime.pipeline import Pipeline
from ...runtime.request import Request
from ...runtime.result import picture_parameters
from ...schedules import NoiseSchedule, listing

EMBEDDED = "embedded-"
"""How the names begin of bundles that the command line knows without it."""
OUTPUT, INPUT = "picture.png", "input.jpg"


def offers(pipeline: Pipeline) -> dict[str, Any]:
    """By kind, as data: names of samplers, of schedules, and presets with the settings that they stand for.

    Samplers that suit the model stand apart from the others, which may be what its weights were distilled for.
    """
    bundle = pipeline.bundle
    suiting = listing.samplers_for(
        NoiseSchedule.from_diffusers(bundle.noise_config), family=kind_of(bundle.defaults.preset)
    )
    presets = [
        {"name": p.name, "steps": p.steps, "guidance": p.guidance, "sampler": p.sampler, "schedule": p.schedule}
        for p in PRESETS
        if p.suits(bundle.family) and not p.options and p.timesteps is None
    ]
    return {
        "samplers": [s.sampler for s in suiting if s.suits],
        "other_samplers": [s.sampler for s in suiting if not s.suits],
        "schedules": [s.name for s in listing.list_schedules()],
        "presets": presets,
    }


def commands(pipeline: Pipeline, requests: Mapping[bool, Request]) -> dict[str, str]:
    """The commands that make a session's frames again, from noise and from a picture. requests: by whether from one."""
    return {("picture" if image else "noise"): _command(pipeline, r, image=image) for image, r in requests.items()}


def _command(pipeline: Pipeline, request: Request, *, image: bool) -> str:
    p = dict(picture_parameters(pipeline.bundle, request)[0])
    p["bundle"] = pipeline.bundle.name.removeprefix(EMBEDDED)
    if image:
        p |= {"image": INPUT, "recorded": {**p["recorded"], "fit": "cover"}}
    return command_line(p, OUTPUT)
