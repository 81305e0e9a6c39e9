"""`fewstep grid BUNDLE --columns AXIS=A,B,...`: one labelled picture over two axes, for who would rather look."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import ArgumentError
from .asking import (
    add_load_options,
    add_picture_options,
    add_prompt_options,
    call_options,
    load_options,
    warnings_shown,
)
from .common import BUNDLE_HELP, add_image_options, bar, between, emit, open_bundle, register_torch

AXES = {
    "sampler": str,
    "schedule": str,
    "steps": int,
    "seed": int,
    "guidance": float,
    "prompt": str,
    "strength": float,
    "clip_skip": int,
}


def define(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help=BUNDLE_HELP)
    parser.add_argument("--prompt", help="may be left out where it is an axis")
    parser.add_argument(
        "--columns",
        required=True,
        metavar="AXIS=A,B,...",
        help=f"one of {', '.join(AXES)}, and its values, by | where they hold commas",
    )
    parser.add_argument("--rows", metavar="AXIS=A,B,...", help="the other axis")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--cell", type=between(16, 4096), help="pixels a picture is enlarged to (default: at least 128)"
    )
    parser.add_argument("--output", default="grid.png", help="the PNG to write (default: %(default)s)")
    add_image_options(parser)
    add_prompt_options(parser)
    add_picture_options(parser, many=False)
    add_load_options(parser)


def execute(options: argparse.Namespace) -> int:
    import numpy as np

    from ..runtime import load
    from ..runtime.pictures.images import check_output, save_png
    from .sheet import draw_sheet

    target = check_output(options.output)
    columns = parse_axis(options.columns)
    rows = parse_axis(options.rows) if options.rows else ("", [None])
    if columns[0] == rows[0]:
        raise ArgumentError(f"both axes are {columns[0]!r}", expected="two different axes")
    if options.prompt is None and "prompt" not in (columns[0], rows[0]):
        raise ArgumentError("no prompt was given", expected="--prompt, or an axis of prompts")
    register_torch(options.backend)
    bundle = open_bundle(options.bundle)
    pipe = load(bundle, **load_options(options, bundle))
    shared = call_options(options)
    cells: list[list[Any]] = []
    seconds = []
    with warnings_shown(), bar(len(columns[1]) * len(rows[1]), "image", "grid") as progress:
        for down in rows[1]:
            cells.append([])
            for across in columns[1]:
                given = {**shared, columns[0]: across} | ({rows[0]: down} if rows[0] else {})
                result = pipe(**given)
                cells[-1].append(result.images[0])
                seconds.append(result.timings["total"] / 1e3)
                progress.update(1)
    heads, sides = labels(*columns), labels(*rows)
    title = "" if "prompt" in (columns[0], rows[0]) else options.prompt
    save_png(target, np.asarray(draw_sheet(cells, heads, sides, title=title, cell=options.cell)))
    data = {"file": str(target), "columns": heads, "rows": sides, "seconds": [round(s, 4) for s in seconds]}
    emit(options, data, f"{target}: {len(heads)} x {len(sides)} pictures")
    return 0


def labels(axis: str, values: list[Any]) -> list[str]:
    """What stands beside the pictures: `steps 4`, but a prompt, a sampler or a schedule by itself."""
    if axis in ("", "prompt", "sampler", "schedule"):
        return ["" if v is None else str(v) for v in values]
    return [f"{axis} {v}" for v in values]


def parse_axis(text: str) -> tuple[str, list[Any]]:
    """`steps=2,4,8` as the axis and its values; `prompt=a cat, asleep|a dog` where values hold commas."""
    name, _, values = text.partition("=")
    if name not in AXES or not values:
        raise ArgumentError(f"the axis is {text!r}", expected=f"AXIS=A,B,... with AXIS one of {', '.join(AXES)}")
    try:
        return name, [AXES[name](v.strip()) for v in values.split("|" if "|" in values else ",")]
    except ValueError as error:
        raise ArgumentError(f"the axis {text!r} has a value that is no {AXES[name].__name__}") from error
