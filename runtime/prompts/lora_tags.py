"""Which LoRAs an image asks for: by the argument `loras`, and in A1111's syntax by `<lora:name:0.8>` in its prompt."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import ArgumentError, UnsupportedError
from ..arguments import check_real

MOST_SCALE = 100.0
MOST_LORAS = 32
_TAG = re.compile(r"<(?P<kind>\w+):(?P<name>[^<>:]+)(?::(?P<rest>[^<>]*))?>")
_KINDS = {"lora", "lyco"}

Uses = tuple[tuple[str, float], ...]
"""LoRAs by name or path, each with the factor of its change."""


def take_tags(text: str) -> tuple[str, dict[str, float]]:
    """A prompt without its `<lora:name:scale>` tags, and what they ask for; 1 where a tag states no scale.

    Raises `ArgumentError` for a scale that is no number, `UnsupportedError` for tags of other kinds (`<hypernet:...>`).
    """
    asked: dict[str, float] = {}

    def taken(tag: re.Match[str]) -> str:
        if tag["kind"].lower() not in _KINDS:
            raise UnsupportedError(f"{tag.group()} in a prompt", expected="<lora:name:scale>", remedy="Leave it out.")
        name, stated = tag["name"].strip(), tag["rest"]
        if not name or name.startswith(".") or "/" in name or "\\" in name:
            raise ArgumentError(f"{tag.group()} in a prompt", expected="<lora:name:scale>, a name and no path")
        try:
            scale = 1.0 if stated is None else float(stated.split(":")[0])
        except ValueError as error:
            raise ArgumentError(f"{tag.group()} in a prompt", expected="<lora:name:scale>, scale a number") from error
        asked[name] = asked.get(name, 0.0) + check_real(f"the scale of {name}", scale, -MOST_SCALE, MOST_SCALE)
        return ""

    kept = _TAG.sub(taken, text)
    return (re.sub(r"[ \t]{2,}", " ", kept).strip() if asked else text), asked


def read_loras(given: Any, prompts: int) -> list[dict[str, float]]:
    """The argument `loras`, one entry a prompt: a mapping of names or paths to scales, or one a prompt.

    Raises `ArgumentError`.
    """
    if given is None:
        return [{} for _ in range(prompts)]
    if isinstance(given, Mapping):
        return [_read(given) for _ in range(prompts)]
    if isinstance(given, (str, os.PathLike)):
        return [_read({given: 1.0}) for _ in range(prompts)]
    if not isinstance(given, Sequence) or len(given) != prompts:
        found = f"{len(given)} entries" if isinstance(given, Sequence) else type(given).__name__
        raise ArgumentError(f"loras is {found}", expected='like {"style": 0.8}, or a list of such, one a prompt')
    return [_read(one or {}) for one in given]


def _read(given: Any) -> dict[str, float]:
    if not isinstance(given, Mapping) or len(given) > MOST_LORAS:
        raise ArgumentError(f"loras is {str(given)[:60]!r}", expected=f"at most {MOST_LORAS} names with their scales")
    asked = {}
    for name, scale in given.items():
        if not isinstance(name, (str, os.PathLike)) or not str(name):
            raise ArgumentError(f"loras names {name!r}", expected="a name or a path")
        asked[str(name)] = check_real(f"the scale of {str(name)[:60]!r}", scale, -MOST_SCALE, MOST_SCALE)
    return asked


def uses(*asked: Mapping[str, float]) -> Uses:
    """What several places ask for together: scales of one name add up, and what comes to nothing is left out."""
    total: dict[str, float] = {}
    for one in asked:
        for name, scale in one.items():
            total[name] = total.get(name, 0.0) + scale
    return tuple((n, s) for n, s in total.items() if s)
