"""`fewstep schedule show SAMPLER --schedule S --steps N`: the rows of a program, and a picture of its sigmas."""

from __future__ import annotations

import argparse
from typing import Any

from .common import emit, open_bundle
from .sampling import add_sampler_options, sampler_options


def define(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("show",))
    parser.add_argument("sampler", help="any name of `fewstep samplers`")
    parser.add_argument(
        "--schedule", action="append", help="any schedule; repeatable for --plot (default: the sampler's)"
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--start", type=int, default=0, help="steps to skip, as image-to-image does")
    parser.add_argument(
        "--for", dest="bundle", metavar="BUNDLE", help="with this bundle's noise schedule and prediction"
    )
    parser.add_argument("--prediction", help="epsilon, v_prediction or sample")
    parser.add_argument("--compat", choices=("diffusers",), help="follow that library's conventions, quirks included")
    add_sampler_options(parser)
    parser.add_argument("--plot", metavar="FILE", help="draw sigma over steps, one line a schedule")


def execute(options: argparse.Namespace) -> int:
    from ..schedules import NoiseSchedule, compile_program
    from ..schedules.listing import format_program, program_table

    noise = NoiseSchedule.scaled_linear()
    if options.bundle:
        noise = NoiseSchedule.from_diffusers(open_bundle(options.bundle).noise_config)
    programs = [
        compile_program(
            options.sampler,
            schedule=s,
            steps=options.steps,
            noise=noise,
            prediction=options.prediction,
            start=options.start,
            compat=options.compat,
            **sampler_options(options),
        )
        for s in options.schedule or [None]
    ]
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

        plot_schedules(programs, options.plot, title=f"{programs[0].sampler}, {options.steps} steps")
        data["plot"] = options.plot
        text += f"\n{options.plot}"
    emit(options, data, text)
    return 0
