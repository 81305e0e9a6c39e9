"""Prompts as users write them: A1111's weights, and chunks of what one pass of a text encoder takes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...bundle import Bundle
from ...errors import ArgumentError, UnknownNameError, UnsupportedError
from .lora_tags import Uses

SYNTAXES = ("plain", "a1111")
LONG_PROMPTS = ("truncate", "chunk")
LONGEST_PROMPT = 20_000
MOST_CHUNKS = 8
MOST_WEIGHT = 1000
NEARBY_COMMA = 20
"""How many tokens of a chunk may move to the next one so that it ends at a comma: the web UI's default."""
_STRONGER, _WEAKER = 1.1, 1 / 1.1
_MARK = re.compile(r"\\(?P<escaped>[()\[\]\\]?)|(?P<open>[(\[])|:\s*(?P<weight>[+-]?[.\d]+)\s*\)|(?P<close>[)\]])")
_BREAK = re.compile(r"\s*\bBREAK\b\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt and how to read it.

    text_2: what a second text encoder reads instead. syntax: `"plain"` or `"a1111"`. long: what becomes of
    more tokens than one pass takes, `"truncate"` or `"chunk"`. clip_skip: layers left out, 0 for the family's own.
    loras: those that change the text encoders that read it.
    """

    text: str
    text_2: str | None = None
    syntax: str = "plain"
    long: str = "truncate"
    clip_skip: int = 0
    loras: Uses = ()

    def of_encoder(self, index: int) -> str:
        """What encoder `index` reads; an empty `text_2` reads the first, as in diffusers."""
        return self.text_2 or self.text if index else self.text


@dataclass(frozen=True, slots=True)
class TextSpan:
    """Words of one weight; `ends_chunk` is a BREAK, which has no words."""

    text: str
    weight: float = 1.0
    ends_chunk: bool = False


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one pass, without begin and end, with a weight each."""

    tokens: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def weighted(self) -> bool:
        return any(w != 1.0 for w in self.weights)


def check_prompt(prompt: object, what: str = "prompt") -> str:
    """The prompt, if it can be tokenised; `ArgumentError` otherwise."""
    if not isinstance(prompt, str):
        raise ArgumentError(f"the {what} is {type(prompt).__name__}", expected="a string")
    if len(prompt) > LONGEST_PROMPT:
        raise ArgumentError(f"the {what} has {len(prompt)} characters", expected=f"at most {LONGEST_PROMPT}")
    if any(0xD800 <= ord(c) < 0xE000 for c in prompt):
        raise ArgumentError(
            f"the {what} holds half of a surrogate pair", expected="valid Unicode", remedy="Decode it as UTF-8."
        )
    return prompt


def check_reading(syntax: str, long: str | None) -> tuple[str, str]:
    """Syntax and policy for long prompts by name; without a policy, plain prompts are cut and A1111's go on."""
    if syntax not in SYNTAXES:
        raise UnknownNameError("prompt syntax", str(syntax), SYNTAXES)
    long = ("chunk" if syntax == "a1111" else "truncate") if long is None else long
    if long not in LONG_PROMPTS:
        raise UnknownNameError("policy for long prompts", str(long), LONG_PROMPTS)
    return syntax, long


def check_clip_skip(bundle: Bundle, clip_skip: object) -> int:
    """Layers to leave out, if every text encoder of the bundle has so many and its graph admits the choice."""
    if isinstance(clip_skip, bool) or not isinstance(clip_skip, int):
        raise ArgumentError(f"clip_skip is {clip_skip!r}", expected="an integer")
    encoders = [bundle.components[n] for n in bundle.text_encoders]
    if not encoders and not clip_skip:
        return 0
    layers = [int(e.config["num_hidden_layers"]) + 1 - max(int(e.config.get("_layer", 0)), 1) for e in encoders]
    if not 0 <= clip_skip <= min(layers, default=0):
        raise ArgumentError(f"clip_skip is {clip_skip}", expected=f"an integer from 0 to {min(layers, default=0)}")
    if clip_skip and not all(any(s.name == "clip_skip" for s in e.inputs) for e in encoders):
        raise UnsupportedError(
            f"clip_skip={clip_skip}: the bundle's text encoders give one layer only",
            expected="a graph with an input clip_skip",
            remedy="Export the checkpoint again.",
        )
    return clip_skip


def parse_a1111(text: str) -> list[TextSpan]:
    """A prompt in the web UI's syntax as parts of one weight each.

    `(words)` weighs 1.1 times, `(words:1.3)` 1.3 times, `[words]` 1/1.1 times, nested brackets multiply, a bracket
    that is never closed reaches to the end, `\\(` is a bracket meant as such, and BREAK begins a new chunk.
    """
    parts: list[TextSpan] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}
    spans: list[tuple[int, int, float]] = []
    at = 0
    for mark in _MARK.finditer(text):
        parts += _plain_parts(text[at : mark.start()])
        at = mark.end()
        bracket, factor = _closing(mark)
        if mark["open"]:
            opened[mark["open"]].append(len(parts))
        elif mark["escaped"] is not None:
            parts.append(TextSpan(mark["escaped"]))
        elif factor is not None and opened[bracket]:
            spans.append((opened[bracket].pop(), len(parts), factor))
        else:
            parts.append(TextSpan(mark.group()))
    parts += _plain_parts(text[at:])
    spans += [(first, len(parts), _STRONGER) for first in opened["("]]
    spans += [(first, len(parts), _WEAKER) for first in opened["["]]
    return _joined(_weighted(parts, spans)) or [TextSpan("")]


def _weighted(parts: Sequence[TextSpan], spans: Sequence[tuple[int, int, float]]) -> list[TextSpan]:
    """Parts with the product of the factors of all spans (first, last + 1, factor) that they are in."""
    weights = np.ones(len(parts))
    with np.errstate(over="ignore", invalid="ignore"):
        for first, end, factor in spans:
            weights[first:end] *= factor
    if not (np.abs(weights) <= MOST_WEIGHT).all():
        raise ArgumentError("a prompt weighs words too much", expected=f"at most {MOST_WEIGHT} times")
    return [TextSpan(p.text, float(w), p.ends_chunk) for p, w in zip(parts, weights, strict=True)]


def _plain_parts(text: str) -> list[TextSpan]:
    """Words between two marks, at each BREAK a part of its own."""
    pieces = _BREAK.split(text)
    parts = [TextSpan(pieces[0])]
    for piece in pieces[1:]:
        parts += [TextSpan("", ends_chunk=True), TextSpan(piece)]
    return [p for p in parts if p.text or p.ends_chunk]


def _closing(mark: re.Match[str]) -> tuple[str, float | None]:
    """The bracket that a mark closes, and by what it weighs; `None` where it closes none or states no number."""
    if mark["close"]:
        return ("(", _STRONGER) if mark["close"] == ")" else ("[", _WEAKER)
    try:
        return "(", float(mark["weight"])
    except (TypeError, ValueError):
        return "(", None


def _joined(parts: Sequence[TextSpan]) -> list[TextSpan]:
    """Neighbours of one weight as one part: they are tokenised together."""
    joined: list[TextSpan] = []
    for part in parts:
        if joined and not part.ends_chunk and not joined[-1].ends_chunk and joined[-1].weight == part.weight:
            joined[-1] = TextSpan(joined[-1].text + part.text, part.weight)
        else:
            joined.append(part)
    return joined


def lay_out(parts: Sequence[tuple[Sequence[int], TextSpan]], room: int, comma: int | None) -> list[Chunk]:
    """Tokens of parts in chunks of at most `room`, at least one.

    comma: the token at which a full chunk would rather end, if it is among its last `NEARBY_COMMA`; `None` for none.
    """
    chunks: list[Chunk] = []
    tokens: list[int] = []
    weights: list[float] = []

    def end(at: int) -> None:
        chunks.append(Chunk(tuple(tokens[:at]), tuple(weights[:at])))
        del tokens[:at], weights[:at]

    for ids, part in parts:
        if part.ends_chunk:
            end(len(tokens))
        for token in ids:
            if len(tokens) == room:
                last = max((i for i, t in enumerate(tokens) if t == comma), default=-1)
                near = token != comma and last >= 0 and room - last <= NEARBY_COMMA
                end(last + 1 if near else room)
            tokens.append(token)
            weights.append(part.weight)
    if tokens or not chunks:
        end(len(tokens))
    return chunks


def common_length(lengths: Sequence[int], most: int) -> int:
    """The number of tokens to which prompts of these lengths are repeated whole, at most `most`."""
    length = math.lcm(*lengths)
    if length > most:
        raise ArgumentError(
            f"prompts of {', '.join(str(n) for n in sorted(set(lengths)))} tokens in one request",
            expected=f"lengths with a common multiple of at most {most}",
            remedy="Make one request a prompt, or shorten the longest.",
        )
    return length
