"""Edits of JSON by which nobody should be surprised: every place, and values that do not belong there."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

GONE = object()
VALUES: tuple[Any, ...] = (
    *(None, [], {}, "", "x", "no", "1", "\x1b[31m", "\u202e", "../x", "n" * 5000, True, False),
    *(-1, 0, 1, 2, 3, 5, 1.5, 2**31, 2**40, 2**63, 10**9, 10**400, -(10**400), 1e308, -1e308, 1e-320),
    *(float("inf"), float("-inf"), float("nan"), [1], ["x"], [None], [[1]], [0] * 3, {"x": 1}, {"": None}),
    *("height*x", "height*99999999", ["height", "width"], [[[]]], {"content": 1}, GONE),
)

Place = tuple[str | int, ...]


def places(data: Any, at: Place = ()) -> Iterator[Place]:
    """Every place in JSON data but the whole."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in inner:
        yield (*at, key)
        yield from places(value, (*at, key))


def edited(data: Any, place: Place, value: Any) -> Any:
    """A copy with another value at a place, or nothing there."""
    data = copy.deepcopy(data)
    at = data
    for key in place[:-1]:
        at = at[key]
    if value is GONE:
        del at[place[-1]]
    else:
        at[place[-1]] = value
    return data


def edits(data: Any, count: int, seed: int, among: list[Place] | None = None) -> Iterator[tuple[str, Any]]:
    """So many edited copies with what was done to each, the same for a seed."""
    draw = random.Random(seed)
    known = list(places(data)) if among is None else among
    for _ in range(count):
        place, value = draw.choice(known), draw.choice(VALUES)
        words = "gone" if value is GONE else repr(value)[:40] if not _is_long(value) else "10**400"
        yield f"{'.'.join(map(str, place))} = {words}", edited(data, place, value)


def _is_long(value: Any) -> bool:
    return isinstance(value, int) and value.bit_length() > 1000
