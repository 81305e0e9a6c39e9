"""Textual inversion: words with vectors of their own, from the files that people train them into.

A word of several vectors is several tokens, `<toy>`, `<toy>_1`, `<toy>_2`, ..., as diffusers' `load_textual_inversion`
names them; a prompt has the first, and stands for all (`runtime/prompts/words.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ArgumentError, CorruptError, MissingError, PickledFileError, UnsupportedError
from .stored import PICKLES, Stored, convert, open_tensors

FOLDER_FILE = "learned_embeds.safetensors"
A1111 = "emb_params"
PAIRS = (("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1"))
"""Names of the vectors for two text encoders, in their order."""
TABLE = "token_embedding.weight"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Word:
    """A word of an embedding file: its tokens, the id of the first, vectors float32 [n, D], and the file's key."""

    tokens: tuple[str, ...]
    first: int
    vectors: np.ndarray
    path: Path
    key: str


def embedding_file(name: str | None, path: str | Path) -> tuple[str | None, Path]:
    """The name that is asked for, if one is, and the safetensors file; a folder stands for the file in it."""
    file = Path(path)
    if file.is_dir():
        file = file / FOLDER_FILE
    if file.suffix in PICKLES:
        raise PickledFileError(file.name)
    if not file.is_file():
        raise MissingError(f"no embedding {str(path)!r}", expected=f"a .safetensors file, or a folder of {FOLDER_FILE}")
    if name is not None and not name.strip():
        raise ArgumentError(f"the embedding in {file.name} has an empty name", expected="a word for prompts")
    return name, file


def read_words(
    given: Iterable[tuple[str | None, Path]], widths: Mapping[str, int], tokenizers: Sequence[Any]
) -> tuple[dict[str, tuple[Word, ...]], dict[str, int]]:
    """The words of embedding files by text encoder, and how many tokens each encoder then knows.

    widths: of the vectors that each encoder takes, in the order of `tokenizers`, of the library of that name, which
    learn the words. Raises `ArgumentError` for a word that a
    tokenizer knows already and for vectors of another width, `CorruptError` for a file that is no embedding.
    """
    words: dict[str, list[Word]] = {}
    known = dict(zip(widths, tokenizers, strict=True))
    for name, path in given:
        for encoder, (key, stored) in _encoders(path, widths).items():
            token = name or (path.stem if key in {A1111, *sum(PAIRS, ())} else key)
            vectors = _vectors(stored, path, key)
            tokens = (token, *(f"{token}_{i}" for i in range(1, len(vectors))))
            tokenizer = known[encoder]
            taken = next((t for t in (*tokens, f"{token}_1") if tokenizer.token_to_id(t) is not None), None)
            if taken is not None:
                raise ArgumentError(
                    f"{path.name} is to be the word {token!r}, and the tokenizer knows {taken!r}",
                    expected="a word that is new",
                    remedy=f"Name it yourself, like --embedding '<{token.strip('<>')}>={path.name}'.",
                )
            for new in tokens:
                tokenizer.add_tokens([new])
            first = tokenizer.get_vocab_size() - len(tokens)
            if [tokenizer.token_to_id(t) for t in tokens] != list(range(first, first + len(tokens))):
                raise CorruptError(f"the tokenizer of {encoder} has holes in its ids", remedy="Take another copy.")
            word = Word(tokens=tokens, first=first, vectors=vectors, path=path, key=key)
            words.setdefault(encoder, []).append(word)
    return {e: tuple(w) for e, w in words.items()}, {e: known[e].get_vocab_size() for e in words}


def _encoders(path: Path, widths: Mapping[str, int]) -> dict[str, tuple[str, Stored]]:
    """For which text encoders a file has vectors: key and tensor by encoder."""
    tensors = open_tensors([path])
    pair = next((p for p in PAIRS if tensors and set(tensors) <= set(p)), None)
    if pair is not None:
        if len(widths) == 1 and pair[1] in tensors:
            raise ArgumentError(f"{path.name} has vectors for two text encoders", expected="those of a model with one")
        found = {e: (k, tensors[k]) for e, k in zip(widths, pair, strict=False) if k in tensors}
    elif len(tensors) == 1:
        (key, stored) = next(iter(tensors.items()))
        fitting = [e for e, w in widths.items() if stored.shape[-1:] == (w,)] or list(widths)[:1]
        if len(fitting) > 1:
            raise UnsupportedError(
                f"{path.name} does not say for which of {' and '.join(fitting)} it is",
                expected=f"vectors named {' and '.join(PAIRS[0])}",
            )
        found = {fitting[0]: (key, stored)}
    else:
        shown = ", ".join(sorted(tensors)[:5]) or "nothing"
        raise CorruptError(
            f"{path.name} is no embedding: it holds {shown}",
            expected=f"one tensor, by its word (diffusers) or called {A1111} (A1111), or {' and '.join(PAIRS[0])}",
        )
    for encoder, (_, stored) in found.items():
        if stored.shape[-1:] != (widths[encoder],):
            raise ArgumentError(
                f"{path.name} has vectors {list(stored.shape)}",
                expected=f"[n, {widths[encoder]}], as the {encoder} takes",
                remedy="Take an embedding that was made for this family.",
            )
    return found


def _vectors(stored: Stored, path: Path, key: str) -> np.ndarray:
    if len(stored.shape) not in (1, 2) or 0 in stored.shape:
        raise CorruptError(f"{key!r} in {path.name} has shape {list(stored.shape)}", expected="[D] or [n, D]")
    return convert(stored, "float32", key).astype(np.float32).reshape(-1, stored.shape[-1])


def with_words(tensors: Mapping[str, Stored], words: Sequence[Word], rows: int) -> dict[str, Stored]:
    """A text encoder's tensors with the vectors of words in its table, which has `rows` of them then."""
    name = next((n for n in tensors if n.endswith(TABLE)), None)
    if name is None:
        return dict(tensors)
    table = tensors[name]
    known, width = table.shape
    if words[0].first > known:
        raise CorruptError(
            f"the tokenizer knows {words[0].first} tokens, and the text encoder {known}",
            expected="as many vectors as tokens",
            remedy="Take tokenizer and weights from the same checkpoint.",
        )
    values = np.empty((rows, width), np.float32)
    kept = min(rows, known)
    values[:kept] = convert(table, "float32", name).reshape(known, width)[:kept]
    table.release()
    for word in words:
        values[word.first : word.first + len(word.vectors)] = word.vectors
    return {**tensors, name: Stored(dtype="F32", shape=(rows, width), data=values.reshape(-1).view(np.uint8))}
