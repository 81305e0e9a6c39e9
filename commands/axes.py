"""What lies along the sides of a sheet of pictures: values of an argument, or the parts of a prompt matrix."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ArgumentError
from .common import opened_schedule, schedule

AXES: dict[str, Any] = {
    "sampler": str,
    "schedule": schedule,
    "steps": int,
    "seed": int,
    "guidance": float,
    "prompt": str,
    "strength": float,
    "variation": float,
    "clip_skip": int,
}
MATRIX = "prompt matrix"
"""The axis whose values are parts that join the prompt."""
MOST_PARTS = 10
"""Of a prompt matrix: 512 pictures."""

Axis = tuple[str, list[Any]]
NO_AXIS: Axis = ("", [None])


def read_axes(options: argparse.Namespace) -> tuple[Axis, Axis]:
    """Columns and rows of a command line; of a prompt matrix, whose first part becomes the prompt.

    Raises `ArgumentError` for no axes, the same twice, and a matrix beside axes or a prompt.
    """
    if options.prompt_matrix is not None:
        for name in ("prompt", "columns", "rows"):
            if getattr(options, name) is not None:
                raise ArgumentError(f"--{name} beside --prompt-matrix", expected="one of the two")
        options.prompt, columns, rows = matrix_axes(options.prompt_matrix)
        return columns, rows
    if options.columns is None:
        raise ArgumentError("no columns", expected="--columns AXIS=A,B,..., or --prompt-matrix")
    columns, rows = parse_axis(options.columns), parse_axis(options.rows) if options.rows else NO_AXIS
    if columns[0] == rows[0]:
        raise ArgumentError(f"both axes are {columns[0]!r}", expected="two different axes")
    return columns, rows


def matrix_axes(text: str) -> tuple[str, Axis, Axis]:
    """`a|b|c` as the prompt and two axes of parts: all combinations of b and c behind a, in the web UI's order.

    The first half of the parts is along the columns, the rest along the rows.
    """
    first, *parts = (p.strip().strip(",").strip() for p in text.split("|"))
    if not parts or not all((first, *parts)) or len(parts) > MOST_PARTS - 1:
        raise ArgumentError(f"the prompt matrix is {text[:80]!r}", expected=f"2 to {MOST_PARTS} parts like a|b|c")
    half = (len(parts) + 1) // 2
    across, down = _combinations(parts[:half]), _combinations(parts[half:])
    return first, (MATRIX, across), (MATRIX, down)


def _combinations(parts: list[str]) -> list[tuple[str, ...]]:
    """Every choice of parts, in their order: the n-th choice has those whose bits are in n."""
    return [tuple(p for i, p in enumerate(parts) if n >> i & 1) for n in range(2 ** len(parts))]


def cell_call(shared: Mapping[str, Any], columns: Axis, rows: Axis, across: Any, down: Any) -> dict[str, Any]:
    """The arguments of one cell's call."""
    if columns[0] == MATRIX:
        return {**shared, "prompt": ", ".join((shared["prompt"], *across, *down))}
    return {**shared, columns[0]: across} | ({rows[0]: down} if rows[0] else {})


def opened(axis: Axis, options: argparse.Namespace) -> Axis:
    """An axis of schedules with what is in their files; any other as it is."""
    name, values = axis
    if name != "schedule":
        return axis
    force, options.force_schedule = options.force_schedule, False
    return name, [opened_schedule(v, force=force) for v in values]


def labels(axis: str, values: list[Any]) -> list[str]:
    """What stands beside the pictures: `steps 4`, but a prompt, a sampler or a schedule by itself."""
    if axis == MATRIX:
        return [", ".join(v) for v in values]
    if axis in ("", "prompt", "sampler", "schedule"):
        return ["" if v is None else str(v) for v in values]
    return [f"{axis} {v}" for v in values]


def described(options: argparse.Namespace) -> dict[str, str]:
    """The axes as a sheet's parameters hold them: without the folders of files."""
    cell = {} if options.cell is None else {"cell": str(options.cell)}
    if options.prompt_matrix is not None:
        return {"matrix": options.prompt_matrix, **cell}
    given = {"columns": options.columns, "rows": options.rows}
    return {k: _plain(text) for k, text in given.items() if text} | cell


def _plain(text: str) -> str:
    name, values = parse_axis(text)
    if name != "schedule":
        return text
    return f"{name}={'|'.join(v.name if isinstance(v, Path) else str(v) for v in values)}"


def parse_axis(text: str) -> Axis:
    """`steps=2,4,8` as the axis and its values; `prompt=a cat, asleep|a dog` where values hold commas."""
    name, _, values = text.partition("=")
    if name not in AXES or not values:
        raise ArgumentError(f"the axis is {text!r}", expected=f"AXIS=A,B,... with AXIS one of {', '.join(AXES)}")
    try:
        return name, [AXES[name](v.strip()) for v in values.split("|" if "|" in values else ",")]
    except ValueError as error:
        raise ArgumentError(f"the axis {text!r} has a value that is no {AXES[name].__name__}") from error
