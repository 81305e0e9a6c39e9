"""`fewstep grid BUNDLE --columns AXIS=A,B,...`: one labelled picture, or clip, over two axes."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..errors import (
    ArgumentError,
    BlackImageError,
    FewstepError,
    NonFiniteError,
    OutOfMemoryError,
    UnknownNameError,
)
from .asking import (
    add_clip_options,
    add_load_options,
    add_picture_options,
    add_prompt_options,
    call_options,
    load_options,
    warnings_shown,
)
from .axes import AXES, Axis, cell_call, described, labels, opened, read_axes
from .carrying import plain_name
from .common import (
    BUNDLE_HELP,
    add_image_options,
    bar,
    between,
    emit,
    open_bundle,
    register_torch,
    say,
)
from .sampling import add_sampler_options

if TYPE_CHECKING:
    from ..runtime.arrays import UInt8

OF_A_CELL = (ArgumentError, OutOfMemoryError, NonFiniteError, BlackImageError)
"""Errors that one picture may have and the next not."""


def define(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help=BUNDLE_HELP)
    parser.add_argument("--prompt", help="may be left out where it is an axis")
    parser.add_argument(
        "--columns",
        metavar="AXIS=A,B,...",
        help=f"one of {', '.join(AXES)}, and its values, by | where they hold commas; numbers may be ranges: 1-5",
    )
    parser.add_argument("--rows", metavar="AXIS=A,B,...", help="the other axis")
    parser.add_argument(
        "--prompt-matrix",
        metavar="A|B|C",
        help="instead of axes: A with every combination of the other parts, as A1111's script",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--cell", type=between(16, 4096), help="pixels a picture is enlarged to (default: at least 128)"
    )
    parser.add_argument(
        "--output",
        help="the .png, .jpg, .webp or .avif to write (default: grid.png); of clips an .mp4, "
        ".webp or .gif, or a folder (default: grid.mp4)",
    )
    add_image_options(parser)
    add_prompt_options(parser)
    add_picture_options(parser, many=False)
    add_clip_options(parser)
    add_load_options(parser)
    add_sampler_options(parser)


def execute(options: argparse.Namespace) -> int:
    from ..runtime import load
    from ..runtime.pictures.images import check_output, save_picture
    from ..runtime.pictures.video import check_clip_output, save_clips

    columns, rows = read_axes(options)
    bundle = open_bundle(options.bundle, options.budget)
    clips = bundle.model.clips
    output = options.output if options.output is not None else "grid.mp4" if clips else "grid.png"
    target = (check_clip_output if clips else check_output)(output)
    if options.prompt is None and "prompt" not in (columns[0], rows[0]) and not clips:
        raise ArgumentError("no prompt was given", expected="--prompt, or an axis of prompts")
    heads, sides = labels(*columns), labels(*rows)
    columns, rows = opened(columns, options), opened(rows, options)
    register_torch(options.backend)
    pipe = load(bundle, **load_options(options, bundle))
    cells = _cells(pipe, columns, rows, call_options(options))
    title = "" if "prompt" in (columns[0], rows[0]) else options.prompt or ""
    drawn = [[str(c) if isinstance(c, FewstepError) else c.images[0] for c in row] for row in cells]
    results = [None if isinstance(c, FewstepError) else c for row in cells for c in row]
    made = [c for c in results if c is not None]
    sheets = _sheets(drawn, heads, sides, title=title, cell=options.cell)
    if clips:
        save_clips(target, sheets[None], made[0].fps, [{}])
    else:
        told = {**made[0].parameters[0], "bundle": plain_name(options.bundle), "grid": described(options)}
        save_picture(target, sheets[0], told)
    seconds = [
        None if isinstance(c, FewstepError) else round(c.timings["total"] / 1e3, 4) for row in cells for c in row
    ]
    data = {"file": str(target), "columns": heads, "rows": sides, "seconds": seconds}
    emit(options, data, f"{target}: {len(heads)} x {len(sides)} {'clips' if clips else 'pictures'}")
    return 0


def _cells(pipe: Any, columns: Axis, rows: Axis, shared: dict[str, Any]) -> list[list[Any]]:
    """The results by row and column; where one cannot be, the error that says so, as long as another can.

    A name that no table holds is raised at once: it is a slip, and no picture.
    """
    cells: list[list[Any]] = []
    with warnings_shown(), bar(len(columns[1]) * len(rows[1]), "image", "grid") as progress:
        for down in rows[1]:
            cells.append([])
            for across in columns[1]:
                try:
                    cells[-1].append(pipe(**cell_call(shared, columns, rows, across, down)))
                except UnknownNameError:
                    raise
                except OF_A_CELL as error:
                    cells[-1].append(error)
                progress.update(1)
    errors = [c for row in cells for c in row if isinstance(c, FewstepError)]
    if len(errors) == len(columns[1]) * len(rows[1]):
        raise errors[0]
    for text in dict.fromkeys(map(str, errors)):
        say(f"warning: not every picture can be: {text}")
    return cells


def _sheets(
    cells: list[list[UInt8 | str]], heads: list[str], sides: list[str], *, title: str, cell: int | None
) -> UInt8:
    """Sheets uint8 [F, H, W, 3], as many as the cells have frames: one of pictures. Texts stand where none is."""
    import numpy as np

    from .sheet import draw_sheet

    counts = {len(c) for row in cells for c in row if not isinstance(c, str) and c.ndim == 4}
    frames = [
        [[c if isinstance(c, str) or not counts else c[f] for c in row] for row in cells]
        for f in range(max(counts, default=1))
    ]
    return np.stack([np.asarray(draw_sheet(f, heads, sides, title=title, cell=cell)) for f in frames])
