"""Options of a request's sampler as clients write them in JSON: by name, plain values within bounds."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from ..errors import ArgumentError

NAME = Annotated[str, Meta(max_length=64)]
NUMBER = Meta(ge=-1e6, le=1e6)
OPTION = (
    Annotated[int, Meta(ge=-1_000_000, le=1_000_000)]
    | Annotated[float, NUMBER]
    | bool
    | Annotated[str, Meta(max_length=64)]
    | Annotated[list[Annotated[int, Meta(ge=0, le=1000)]], Meta(max_length=64)]
)
OPTIONS = Annotated[
    dict[NAME, OPTION], Meta(max_length=32, description='of sampler and schedule, by name, like {"rho": 5}')
]


def read_options(data: Any) -> dict[str, Any]:
    """Options from JSON data, 2.0 as 2; `None` for none. `ArgumentError` says what is wrong and where."""
    try:
        return msgspec.convert(whole(data), OPTIONS | None) or {}
    except (msgspec.MsgspecError, RecursionError) as error:
        text, _, path = str(error).partition(" - at `$")
        raise ArgumentError(f"sampler_options{path.removesuffix('`')}: {text}"[:300]) from error


def whole(data: Any) -> Any:
    """JSON with 2.0 as 2, since JSON Schema's integers include it; other floats stay floats, bools bools."""
    if isinstance(data, dict):
        return {k: whole(v) for k, v in data.items()}
    if isinstance(data, list):
        return [whole(v) for v in data]
    return int(data) if isinstance(data, float) and data.is_integer() else data
