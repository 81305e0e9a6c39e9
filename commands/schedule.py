"""`fewstep schedule`: show a sampler's rows under a schedule; search, check and store schedules for a bundle."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError
from .common import BUNDLE_HELP, add_force_option, emit, open_bundle, opened_schedule, schedule
from .sampling import add_sampler_options, sampler_options
from .searching import check, define_check, define_search, search

if TYPE_CHECKING:
    from ..bundle import Bundle
    from ..schedules import NoiseSchedule, Program

USUAL_STEPS = 10


def define(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, (words, more) in ACTIONS.items():
        action = actions.add_parser(name, help=words, description=f"{words[0].upper()}{words[1:]}.")
        action.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="data as JSON on stdout")
        more(action)


def _define_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sampler", help="any name of `fewstep samplers`")
    parser.add_argument(
        "--schedule",
        type=schedule,
        action="append",
        metavar="NAME|FILE",
        help="any schedule, or a .json file of found ones; repeatable for --plot (default: the sampler's)",
    )
    add_force_option(parser)
    parser.add_argument("--steps", type=int, help=f"default: {USUAL_STEPS}, or the nearest that were searched")
    parser.add_argument("--start", type=int, default=0, help="steps to skip, as image-to-image does")
    parser.add_argument(
        "--for", dest="bundle", metavar="BUNDLE", help="with this bundle's noise schedule and prediction"
    )
    parser.add_argument("--prediction", help="epsilon, v_prediction or sample")
    parser.add_argument("--compat", choices=("diffusers",), help="follow that library's conventions, quirks included")
    add_sampler_options(parser)
    parser.add_argument("--plot", metavar="FILE", help="draw sigma over steps, one line a schedule")


def _define_store(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help=BUNDLE_HELP)
    parser.add_argument("file", metavar="FILE", help="found schedules, which it then holds as its own")


ACTIONS = {
    "show": ("show the rows of a sampler under a schedule", _define_show),
    "search": ("find a schedule for a bundle's own model, on its own engine", define_search),
    "check": ("compare found schedules with the known ones, at any guidance and size", define_check),
    "store": ("put found schedules into a bundle, as its own", _define_store),
}


def execute(options: argparse.Namespace) -> int:
    doing = {"show": _show, "search": search, "check": check, "store": _store}
    return doing[options.action](options)


def _show(options: argparse.Namespace) -> int:
    from ..schedules import NoiseSchedule
    from ..schedules.listing import format_program, program_table

    bundle = open_bundle(options.bundle) if options.bundle else None
    noise = NoiseSchedule.from_diffusers(bundle.noise_config) if bundle else NoiseSchedule.scaled_linear()
    programs = [_program(options, s, noise, bundle) for s in options.schedule or [None]]
    data: dict[str, Any] = {
        "programs": [
            {
                "sampler": p.sampler,
                "schedule": p.schedule,
                "prediction": p.prediction,
                "steps": p.steps,
                "rows": program_table(p),
            }
            for p in programs
        ]
    }
    text = "\n\n".join(format_program(p) for p in programs)
    if options.plot:
        from ..schedules.plot import plot_schedules

        plot_schedules(programs, options.plot, title=f"{programs[0].sampler}, {programs[0].steps} steps")
        data["plot"] = options.plot
        text += f"\n{options.plot}"
    emit(options, data, text)
    return 0


def _program(
    options: argparse.Namespace, named: str | Path | None, noise: NoiseSchedule, bundle: Bundle | None
) -> Program:
    """The sampler under a schedule; without a bundle a file's model is not compared."""
    from ..schedules import FoundSchedules, compile_program

    found = opened_schedule(named, force=options.force_schedule)
    asked = sampler_options(options)
    if bundle is not None:
        from ..runtime.searched import find_schedules

        found = find_schedules(bundle, options.sampler, found) or found
    if not isinstance(found, FoundSchedules):
        return compile_program(
            options.sampler,
            schedule=found,
            steps=USUAL_STEPS if options.steps is None else options.steps,
            noise=noise,
            prediction=options.prediction,
            start=options.start,
            compat=options.compat,
            **asked,
        )
    if asked or options.compat:
        raise ArgumentError("sampler options, or --compat, beside found schedules", remedy="Leave them out.")
    found.check(model=found.model if bundle is None else bundle.unet_digest, sampler=options.sampler)
    steps = found.nearest(USUAL_STEPS) if options.steps is None else options.steps
    return found.program(steps, noise=noise, prediction=options.prediction, start=options.start)


def _store(options: argparse.Namespace) -> int:
    from ..bundle import add_schedules
    from ..schedules import load_schedules

    bundle = open_bundle(options.bundle)
    found = load_schedules(options.file)
    add_schedules(bundle.folder, found)
    data = {
        "bundle": str(bundle.folder),
        "sampler": found.sampler,
        "steps": list(found.steps),
        "digest": found.digest,
        "file": f"searched_{found.sampler}.json",
    }
    steps = ", ".join(map(str, found.steps))
    emit(options, data, f"{bundle.name} holds {found.digest[:12]} for {found.sampler}: {steps} steps")
    return 0
