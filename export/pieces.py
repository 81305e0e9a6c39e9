"""T5's tokenizers as one `tokenizer.json` each, from that or from the SentencePiece model that checkpoints carry."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..bundle import Tokenizer as TokenizerRecord
from ..errors import CorruptError, MissingError, MissingExtraError
from ..values import panics_refused, shown
from .tokenizers import write_record

PIECES, SAVED = "spiece.model", "tokenizer.json"


def export_pieces(folder: Path, target: Path, length: int) -> TokenizerRecord:
    """Write a T5 tokenizer's folder as `target` and say how prompts are padded: `[tokens..., end, pad...]`.

    length: tokens of a prompt. transformers converts the pieces with its own rules of normalising and splitting. Raises
    `MissingError` without either file, `MissingExtraError` without what reads the pieces, `CorruptError` for a file
    that is no such tokenizer.
    """
    if not any((folder / name).is_file() for name in (PIECES, SAVED)):
        raise MissingError(
            f"no tokenizer in {folder.name!r}",
            expected=f"{SAVED}, or {PIECES}",
            remedy="Take the whole checkpoint.",
        )
    for module in ("transformers", *(() if (folder / SAVED).is_file() else ("sentencepiece",))):
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError(module, "export", purpose="Reading a T5 tokenizer")
    from transformers import T5TokenizerFast

    found, remedy = f"the tokenizer in {folder.name!r} cannot be read", "Take the whole checkpoint."
    try:
        with panics_refused(found, remedy=remedy):
            cls: Any = T5TokenizerFast
            opened = cls.from_pretrained(str(folder), local_files_only=True)
            tokenizer = Tokenizer.from_str(opened.backend_tokenizer.to_str())
        ids = {k: getattr(opened, f"{k}_id") for k in ("eos_token", "pad_token")}
    except CorruptError:
        raise
    except Exception as error:
        raise CorruptError(f"{found} ({type(error).__name__}: {shown(str(error))})", remedy=remedy) from error
    for kind, number in ids.items():
        if number is None:
            raise CorruptError(f"the tokenizer in {folder.name!r} has no {kind}", remedy=remedy)
    return write_record(tokenizer, target, length, {**ids, "bos_token": None})
