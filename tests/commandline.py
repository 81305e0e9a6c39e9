"""The command line as tests call it, and as they judge commands that are written in texts."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from fewstep.cli import VERBS, UsageError, main, make_parser

ROOT = Path(__file__).parents[1]
HOLE = "\N{WHITE SQUARE}"
"""Stands in a text for what the program fills in."""
PLACEHOLDER = re.compile(rf".*{HOLE}.*|[A-Z][A-Z_]*|WxH|<\w+>|\.\.\.")
PLAUSIBLE = ("512x512", "2", "name", "ort-cpu", "height=32:64:128")


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


@functools.cache
def verb_parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of each verb, all arguments defined."""
    verbs = next(a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(verbs.choices)


def flag_action(flag: str, verb: str) -> argparse.Action | None:
    """What defines a flag for a verb, or for an action of it."""
    return flags_of(verb_parsers()[verb]).get(flag)


def flags_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """The flags of a parser and of the actions that it has."""
    own = dict(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                own |= flags_of(inner)
    return own


def make_targets() -> set[str]:
    """The targets of the Makefile that have a name."""
    return set(re.findall(r"^([a-z][a-z0-9-]*):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def usage_error(words: Sequence[str]) -> str:
    """Why `fewstep WORDS` does not parse, or "" where it does.

    Placeholders (BUNDLE, WxH, <digest>, ... and `HOLE`) stand for any plausible value: one that parses is enough.
    """
    reasons = []
    for candidate in _filled([w for word in words for w in _expanded(word)]):
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                verb = next((w for w in candidate if w in VERBS), None)
                make_parser(verb).parse_args(candidate)
            return ""
        except SystemExit:  # --help and --version
            return ""
        except UsageError as error:
            reasons.append(error.found)
    return min(reasons, key=_of_a_value)


def _of_a_value(reason: str) -> bool:
    """Whether argparse complains of an argument's value, which may be the plausible one's fault."""
    return reason.startswith("argument -")


def _expanded(word: str) -> list[str]:
    """`[--size` and `WxH]` are optional words: they are there."""
    stripped = word.removeprefix("[").removesuffix("]")
    return [stripped] if stripped else []


def _filled(words: list[str]) -> Iterator[list[str]]:
    """The words with every choice of plausible values; an ellipsis may also stand for nothing."""
    places = [i for i, w in enumerate(words) if PLACEHOLDER.fullmatch(w)]
    yield [w for w in words if w != "..."]
    for values in itertools.product(PLAUSIBLE, repeat=len(places)):
        filled = list(words)
        for place, value in zip(places, values, strict=True):
            word = words[place]
            filled[place] = word.replace(HOLE, value) if HOLE in word else value
        yield filled
