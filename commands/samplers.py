"""`fewstep samplers`: every sampler and schedule, or which suit a checkpoint."""

from __future__ import annotations

import argparse

from .common import emit, open_bundle


def define(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--for", dest="bundle", metavar="BUNDLE", help="say which suit this bundle, and why the others do not"
    )


def execute(options: argparse.Namespace) -> int:
    from ..schedules import listing

    if options.bundle:
        return _suiting(options)
    samplers, schedules = listing.list_samplers(), listing.list_schedules()
    data = {"samplers": listing.as_data(samplers), "schedules": listing.as_data(schedules)}
    emit(options, data, f"{listing.format_samplers(samplers)}\n\n{listing.format_schedules(schedules)}")
    return 0


KINDS = ("lcm", "tcd", "turbo", "lightning", "hyper", "dmd2")


def kind_of(preset: str | None) -> str | None:
    """The kind of distillation that a preset's name tells of; DMD2's students are sampled as LCM's."""
    kind = next((k for k in KINDS if preset and k in preset), None)
    return "lcm" if kind == "dmd2" else kind


def _suiting(options: argparse.Namespace) -> int:
    from ..schedules import NoiseSchedule, listing

    bundle = open_bundle(options.bundle)
    noise = NoiseSchedule.from_diffusers(bundle.noise_config)
    verdicts = listing.samplers_for(noise, family=kind_of(bundle.defaults.preset))
    emit(options, {"bundle": bundle.name, "samplers": listing.as_data(verdicts)}, listing.format_suitability(verdicts))
    return 0
