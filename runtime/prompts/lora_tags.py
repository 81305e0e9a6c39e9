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

Uses = tuple[tuple[str, str, float], ...]
"""LoRAs by name or path, each with the component that it changes (empty: all that it can) and the factor of that."""


def take_tags(text: str) -> tuple[str, Uses]:
    """A prompt without its `<lora:name:scale>` tags, and what they ask for; 1 where a tag states no scale.

    Raises `ArgumentError` for a scale that is no number, `UnsupportedError` for tags of other kinds (`<hypernet:...>`).
    """
    asked: list[tuple[str, str, float]] = []

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
        asked.append((name, "", _scale(name, scale)))
        return ""

    kept = _TAG.sub(taken, text)
    return (re.sub(r"[ \t]{2,}", " ", kept).strip() if asked else text), tuple(asked)


def read_loras(given: Any, prompts: int) -> list[Uses]:
    """The argument `loras`, one entry a prompt: a mapping of names or paths to scales, or one a prompt.

    A scale is a number, or by component: `{"unet": 0.8}`. Raises `ArgumentError`.
    """
    if given is None:
        return [()] * prompts
    if isinstance(given, Mapping):
        return [_read(given)] * prompts
    if isinstance(given, (str, os.PathLike)):
        return [_read({given: 1.0})] * prompts
    if not isinstance(given, Sequence) or len(given) != prompts:
        found = f"{len(given)} entries" if isinstance(given, Sequence) else type(given).__name__
        raise ArgumentError(f"loras is {found}", expected='like {"style": 0.8}, or a list of such, one a prompt')
    return [_read(one or {}) for one in given]


def _read(given: Any) -> Uses:
    if not isinstance(given, Mapping) or len(given) > MOST_LORAS:
        raise ArgumentError(f"loras is {str(given)[:60]!r}", expected=f"at most {MOST_LORAS} names with their scales")
    asked: list[tuple[str, str, float]] = []
    for name, scale in given.items():
        if not isinstance(name, (str, os.PathLike)) or not str(name):
            raise ArgumentError(f"loras names {name!r}", expected="a name or a path")
        by_component = scale if isinstance(scale, Mapping) else {"": scale}
        asked += [(str(name), str(c), _scale(str(name), s)) for c, s in by_component.items()]
    return tuple(asked)


def _scale(name: str, value: object) -> float:
    return check_real(f"the scale of {name[:60]!r}", value, -MOST_SCALE, MOST_SCALE)


def together(*asked: Uses) -> Uses:
    """What several places ask for: factors of the same change add up, and what comes to nothing is left out."""
    total: dict[tuple[str, str], float] = {}
    for name, component, scale in (use for one in asked for use in one):
        total[name, component] = total.get((name, component), 0.0) + scale
    return tuple((*key, scale) for key, scale in total.items() if scale)


def described(asked: Uses) -> dict[str, float | dict[str, float]]:
    """What a picture says of them, without folders: as `read_loras` takes it."""
    words: dict[str, float | dict[str, float]] = {}
    for name, component, scale in asked:
        key = re.split(r"[\\/]", name)[-1]
        if not component:
            words[key] = scale
        elif isinstance(by_component := words.setdefault(key, {}), dict):
            by_component[component] = scale
    return words
