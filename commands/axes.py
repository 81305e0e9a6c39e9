"""What lies along the sides of a sheet of pictures: values of an argument, or the parts of a prompt matrix."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ArgumentError
from .common import opened_schedule, schedule, size

AXES: dict[str, Any] = {
    "sampler": str,
    "schedule": schedule,
    "steps": int,
    "seed": int,
    "guidance": float,
    "prompt": str,
    "negative": str,
    "size": size,
    "strength": float,
    "variation": float,
    "clip_skip": int,
}
OTHER_NAMES = {"cfg": "guidance", "cfg_scale": "guidance"}
MOST_VALUES = 256
"""Of an axis."""
_WRITTEN = {int: "integers, or ranges like 1-5", float: "numbers, or ranges like 0-1[5]"}
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
_RANGE = re.compile(
    rf"(?P<first>{_NUMBER})\s*-\s*(?P<last>{_NUMBER})"
    rf"\s*(?:\(\s*(?P<step>{_NUMBER})\s*\)|\[\s*(?P<count>\d{{1,3}})\s*\])?"
)
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
    """What stands beside the pictures: `steps 4`, but a prompt, a size, a sampler or a schedule by itself."""
    if axis == MATRIX:
        return [", ".join(v) for v in values]
    if axis == "size":
        return [f"{width}x{height}" for width, height in values]
    if axis in ("", "prompt", "sampler", "schedule"):
        return ["" if v is None else str(v) for v in values]
    return [f"{axis} {v}" for v in values]


def described(options: argparse.Namespace) -> dict[str, str]:
    """The axes as a sheet's parameters hold them: by our names, without the folders of files."""
    cell = {} if options.cell is None else {"cell": str(options.cell)}
    if options.prompt_matrix is not None:
        return {"matrix": options.prompt_matrix, **cell}
    given = {"columns": options.columns, "rows": options.rows}
    return {k: _plain(text) for k, text in given.items() if text} | cell


def _plain(text: str) -> str:
    name, values = parse_axis(text)
    if name != "schedule":
        return f"{name}={text.partition('=')[2]}"
    return f"{name}={'|'.join(v.name if isinstance(v, Path) else str(v) for v in values)}"


def parse_axis(text: str) -> Axis:
    """`steps=2,4,8` as the axis and its values; `prompt=a cat, asleep|a dog` where values hold commas.

    Numbers may be ranges, as the web UI's script writes them: `1-5`, `1-9(+2)` by a step, `0-1[5]` by a count.
    """
    given, _, values = text.partition("=")
    name = OTHER_NAMES.get(given, given)
    if name not in AXES or not values:
        raise ArgumentError(f"the axis is {text!r}", expected=f"AXIS=A,B,... with AXIS one of {', '.join(AXES)}")
    words = [v.strip() for v in values.split("|" if "|" in values else ",")]
    kind = AXES[name]
    try:
        read = [v for word in words for v in (_numbers(word, kind) if kind in (int, float) else [kind(word)])]
    except (ValueError, argparse.ArgumentTypeError) as error:
        expected = {int: "integers, or ranges like 1-5", float: "numbers, or ranges like 0-1[5]"}.get(
            kind, "512x768,..."
        )
        raise ArgumentError(f"the axis {text!r} has a value that is no {kind.__name__}", expected=expected) from error
    if len(read) > MOST_VALUES:
        raise ArgumentError(f"the axis {given!r} has {len(read)} values", expected=f"at most {MOST_VALUES}")
    return name, read


def _numbers(word: str, kind: type[int] | type[float]) -> list[Any]:
    """A number, or those of a range, both ends included where the steps meet the last."""
    found = _RANGE.fullmatch(word)
    if found is None:
        return [kind(word)]
    first, last = kind(found["first"]), kind(found["last"])
    if found["count"] is not None:
        count = int(found["count"])
        return [kind(first + (last - first) * i / max(count - 1, 1)) for i in range(count)]
    step = kind(found["step"]) if found["step"] is not None else kind(1 if last >= first else -1)
    if not step or (last - first) * step < 0:
        raise ArgumentError(f"the range {word!r} never ends", expected="a step that leads from its first to its last")
    count = int((last - first) / step + 1e-9) + 1
    return [first + i * step for i in range(min(count, MOST_VALUES + 1))]
