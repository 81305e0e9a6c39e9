"""Marks of other programs in prompts: those that nothing here does are refused by name, and plain prompts warn."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ...errors import UnsupportedError

_TAG = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>", re.IGNORECASE)
_EMBEDDING = re.compile(r"\bembedding:(?P<name>[\w.-]+)")
_AND = re.compile(r"\bAND\b")
_NUMBER = r"(?:\d+\.?\d*|\.\d+)"
_A1111 = {
    "(word:1.3)": re.compile(rf"\([^()\[\]]*:\s*[+-]?{_NUMBER}\s*\)"),
    "[from:to:0.5]": re.compile(rf"\[[^()\[\]|]*:\s*{_NUMBER}\s*\]"),
    "[one|other]": re.compile(r"\[[^()\[\]:]*\|[^()\[\]:]*\]"),
    "BREAK": re.compile(r"\bBREAK\b"),
}
SHOWN = 40


def refuse_marks(text: str, *, tags: bool, joins: bool) -> None:
    """Raise `UnsupportedError` for what would be taken for words and is not meant as such.

    tags: whether tags of LoRAs are taken out of this prompt. joins: whether the web UI would join several prompts by
    AND here.
    """
    if found := _EMBEDDING.search(text):
        name = found["name"]
        raise UnsupportedError(
            f"{found.group()!r} in a prompt",
            expected=f"the word alone, {name!r}, once it is known",
            remedy=f"Teach it with load_embedding(path, {name!r}), or --embedding {name}=FILE.",
        )
    if joins and _AND.search(text):
        raise UnsupportedError(
            "AND in a prompt, which joins several prompts' guidance in the web UI",
            expected="one prompt an image",
            remedy="Put a comma in its place, and weigh the parts: (one:1.1), (other:0.9).",
        )
    if not tags and (tag := _TAG.search(text)):
        raise UnsupportedError(
            f"{tag.group()[:SHOWN]!r} in a plain prompt, or a negative or second one",
            expected="tags in a prompt that is read with prompt_syntax='a1111'",
            remedy="Pass loras={path: scale}, or --lora FILE:SCALE; <lora:...> is read by --prompt-syntax a1111, and "
            "found with --lora-folder DIR.",
        )


def plain_warnings(texts: Iterable[str | None]) -> list[str]:
    """Warnings where plain prompts hold what A1111 would read as something else; they do not quote them."""
    given = [t for t in texts if t]
    warnings = []
    held = [kind for kind, mark in _A1111.items() if any(mark.search(text) for text in given)]
    if held:
        warnings.append(
            f"A prompt holds {' and '.join(held)}, read here as words: "
            "prompt_syntax='a1111' (--prompt-syntax a1111) reads such marks."
        )
    if any(_AND.search(text) and text != text.upper() for text in given):  # in capitals throughout it is but a word
        warnings.append("A prompt holds AND, read here as a word: an image has one prompt.")
    return warnings
