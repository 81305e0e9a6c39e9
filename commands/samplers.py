"""`fewstep samplers`: every sampler and schedule, or which suit a checkpoint and what was searched for it."""

from __future__ import annotations

import argparse

from .common import emit, open_bundle


def define(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--for",
        dest="bundle",
        metavar="BUNDLE",
        help="say which suit this bundle, why the others do not, and which schedules it holds",
    )


def execute(options: argparse.Namespace) -> int:
    from ..schedules import listing

    if options.bundle:
        return _suiting(options)
    samplers, schedules = listing.list_samplers(), listing.list_schedules()
    data = {"samplers": listing.as_data(samplers), "schedules": listing.as_data(schedules)}
    emit(options, data, f"{listing.format_samplers(samplers)}\n\n{listing.format_schedules(schedules)}")
    return 0


def _suiting(options: argparse.Namespace) -> int:
    from ..presets import kind_of
    from ..schedules import NoiseSchedule, listing

    bundle = open_bundle(options.bundle)
    noise = NoiseSchedule.from_diffusers(bundle.noise_config)
    verdicts = listing.samplers_for(noise, family=kind_of(bundle.defaults.preset))
    held = listing.list_found([bundle.searched(s.sampler) for s in bundle.schedules])
    data = {"bundle": bundle.name, "samplers": listing.as_data(verdicts), "searched": listing.as_data(held)}
    text = listing.format_suitability(verdicts)
    emit(options, data, f"{text}\n\n{listing.format_found(held)}" if held else text)
    return 0
