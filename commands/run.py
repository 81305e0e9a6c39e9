"""`fewstep run BUNDLE --prompt ...`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from .asking import (
    add_load_options,
    add_picture_options,
    add_prompt_options,
    call_options,
    load_options,
    warnings_shown,
)
from .common import (
    BUNDLE_HELP,
    add_image_options,
    bar,
    defaults_line,
    emit,
    open_bundle,
    register_torch,
    say,
    stage_lines,
)


def define(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help=BUNDLE_HELP)
    parser.add_argument(
        "--prompt", required=True, action="append", help="what the image shows; repeatable, one image each"
    )
    parser.add_argument(
        "--seed", type=int, action="append", help="repeatable, one image each (default: a random one, printed)"
    )
    parser.add_argument("--images", type=int, dest="images_per_prompt", help="images a prompt, with successive seeds")
    parser.add_argument(
        "--shared-stream",
        action="store_true",
        help="draw the whole batch from the first seed, as one torch generator does",
    )
    parser.add_argument("--output", default="image.png", help="the PNG to write (default: %(default)s)")
    add_image_options(parser)
    add_prompt_options(parser)
    add_picture_options(parser, many=True)
    add_load_options(parser)


def execute(options: argparse.Namespace) -> int:
    from ..runtime import load
    from ..runtime.pictures.images import check_output

    check_output(options.output)
    register_torch(options.backend)
    bundle = open_bundle(options.bundle)
    if bundle.defaults.preset:
        say(f"preset {bundle.defaults.preset}: {defaults_line(bundle.defaults)}")
    pipe = load(bundle, **load_options(options, bundle))
    with warnings_shown(), bar(None, "it", "denoise") as progress:

        def on_step(step: Any) -> None:
            progress.total = step.total
            progress.update(1)

        result = pipe(on_step=on_step, **call_options(options))
    named = tuple({**p, "bundle": options.bundle} for p in result.parameters)
    files = replace(result, parameters=named).save(options.output)
    data = {
        "files": files,
        "seeds": list(result.seeds),
        "truncated": list(result.truncated),
        "timings_ms": dict(result.timings),
        "parameters": [dict(p) for p in named],
    }
    lines = [f"{f}  seed {s}" for f, s in zip(files, result.seeds, strict=True)]
    emit(options, data, "\n".join([*lines, stage_lines(dict(result.timings))]))
    return 0
