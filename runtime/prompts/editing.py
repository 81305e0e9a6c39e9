"""Prompts that change on the way, in A1111's syntax: `[from:to:when]` and `[one|other]`.

`[from:to:0.5]` is `from` for half of the steps and `to` after that; `[to:0.5]` and `[from::0.5]` have nothing before or
after; a `when` without a point is a number of steps. `[one|other]` is each in turn. So a prompt is a text for each
evaluation. The rule is the web UI's: it numbers evaluations from 0 and a text lasts until the one of its number, that
one included, which makes the first text an evaluation longer than it says. Samplers of two stages count twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

from ...errors import ArgumentError
from .syntax import Prompt

MOST_TEXTS = 64
"""Of one prompt, each of which is encoded."""
DEEPEST = 32
_WHEN = re.compile(r"\s*[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?\s*")
_CLOSED_BY = {"(": ")", "[": "]"}


@dataclass(frozen=True, slots=True)
class Edit:
    """`before` until evaluation `when` (a share of all where `is_share`), then `after`."""

    before: Parts
    after: Parts
    when: float
    is_share: bool
    depth: int

    def end(self, total: int) -> int:
        return int(min(total, self.when * total if self.is_share else self.when))


@dataclass(frozen=True, slots=True)
class Alternation:
    """Each choice in turn, for one evaluation each."""

    choices: tuple[Parts, ...]
    depth: int


Part = str | Edit | Alternation
Parts = tuple[Part, ...]


@dataclass(slots=True)
class _Bracket:
    """An open bracket: what was read of it, in fields. broken: it cannot be an edit, whatever comes."""

    opener: str
    separators: str = ""
    fields: list[list[Part]] = field(default_factory=lambda: [[]])
    broken: bool = False
    last: int = 0


def prompt_runs(prompt: Prompt, total: int, evaluations: int) -> list[tuple[int, Prompt]]:
    """The prompt at each of `evaluations`, as (first evaluation, prompt) wherever it is another one than before.

    total: evaluations that its numbers and shares count, more than are made where a picture's strength leaves steps
    out. Raises `ArgumentError` for more than `MOST_TEXTS` texts, and for brackets nested too deep.
    """
    if prompt.syntax != "a1111":
        return [(0, prompt)]
    firsts = texts_by_evaluation(prompt.text, total, evaluations)
    seconds = [None] * evaluations if prompt.text_2 is None else texts_by_evaluation(prompt.text_2, total, evaluations)
    texts = list(zip(firsts, seconds, strict=True))
    if len(set(texts)) > MOST_TEXTS:
        raise ArgumentError(f"a prompt becomes {len(set(texts))} texts on the way", expected=f"at most {MOST_TEXTS}")
    runs = groupby(range(evaluations), key=lambda i: texts[i])
    return [(next(of), replace(prompt, text=text, text_2=other)) for (text, other), of in runs]


def texts_by_evaluation(text: str, total: int, evaluations: int) -> list[str]:
    """What a prompt says at each of the first `evaluations` of `total`."""
    parts = parse_edits(text)
    if all(isinstance(p, str) for p in parts):
        return [text] * evaluations
    ends = sorted({total, *(end for end in _ends(parts, total) if end >= 1)})
    until = [next((end for end in ends if i <= end), total) for i in range(evaluations)]
    texts = {end: _text_at(parts, end, total) for end in set(until)}
    return [texts[end] for end in until]


def parse_edits(text: str) -> Parts:
    """A prompt as texts and what changes in it; brackets with another meaning, or none, stay texts."""
    closed, stack = _closed(text), [_Bracket("")]
    at = 0
    while at < len(text):
        char, top = text[at], stack[-1]
        if char == "\\":
            top.fields[-1].append(text[at : at + 2])
            at += 1
        elif at in closed and char in _CLOSED_BY:
            stack.append(_Bracket(char, last=at + 1))
        elif at in closed:
            stack.pop()
            parts, broken = _read(top, text[top.last : at])
            stack[-1].fields[-1] += parts
            stack[-1].broken |= broken
        elif char in ":|" and top.opener == "[":
            top.separators += char
            top.fields.append([])
            top.last = at + 1
        else:
            top.fields[-1].append(char)
        at += 1
    return _joined(stack[0].fields[0])


def _closed(text: str) -> set[int]:
    """Where brackets are that close each other; one of the other kind in between undoes all around it."""
    opened: list[int] = []
    closed: set[int] = set()
    for mark in re.finditer(r"\\.|[()\[\]]", text, re.DOTALL):
        if mark[0] in _CLOSED_BY:
            opened.append(mark.start())
        elif mark[0] in ")]":
            if opened and _CLOSED_BY[text[opened[-1]]] == mark[0]:
                closed |= {opened.pop(), mark.start()}
            else:
                opened.clear()
    return closed


def _read(bracket: _Bracket, last: str) -> tuple[list[Part], bool]:
    """What a closed bracket stands for, and whether it breaks those around it. last: its last field, as written."""
    fields = [_joined(f) for f in bracket.fields]
    kinds, depth = set(bracket.separators), 1 + max((_depth(p) for f in fields for p in f), default=0)
    if depth > DEEPEST:
        raise ArgumentError(f"a prompt nests its changes {depth} deep", expected=f"at most {DEEPEST}")
    if not bracket.broken and kinds == {"|"}:
        return [Alternation(tuple(fields), depth)], False
    if not bracket.broken and kinds == {":"} and len(fields) <= 3 and _WHEN.fullmatch(last):
        before = fields[0] if len(fields) == 3 else ()
        return [Edit(before, fields[-2], float(last), "." in last, depth)], False
    parts: list[Part] = [bracket.opener, *fields[0]]
    for separator, other in zip(bracket.separators, fields[1:], strict=True):
        parts += [separator, *other]
    return [*parts, _CLOSED_BY[bracket.opener]], bracket.broken or bool(kinds)


def _depth(part: Part) -> int:
    return 0 if isinstance(part, str) else part.depth


def _ends(parts: Parts, total: int) -> Iterator[int]:
    """The numbers of evaluations at which a text may end."""
    for part in parts:
        if isinstance(part, Edit):
            yield part.end(total)
            yield from _ends(part.before, total)
            yield from _ends(part.after, total)
        elif isinstance(part, Alternation):
            yield from range(1, total + 1)


def _text_at(parts: Parts, number: int, total: int) -> str:
    texts = []
    for part in parts:
        if isinstance(part, Edit):
            texts.append(_text_at(part.before if number <= part.end(total) else part.after, number, total))
        elif isinstance(part, Alternation):
            texts.append(_text_at(part.choices[(number - 1) % len(part.choices)], number, total))
        else:
            texts.append(part)
    return "".join(texts)


def _joined(parts: Sequence[Part]) -> Parts:
    """Neighbouring texts as one."""
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if isinstance(part, str) and isinstance(last, str):
            joined[-1] = last + part
        else:
            joined.append(part)
    return tuple(joined)
