"""Prompts encoded beforehand: embeddings in a safetensors file, by the names of the call's arguments."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...bundle import Bundle
from ...errors import ArgumentError, CorruptError
from ...places import writing
from .encoders import Embedding

PROMPTS = "prompts"


def save_embeddings(
    path: str | os.PathLike[str],
    bundle: Bundle,
    positives: Sequence[Embedding],
    negatives: Sequence[Embedding],
    prompts: Sequence[str],
) -> Path:
    """Write embeddings, one an entry, as float32 tensors `prompt_embeds`, `negative_prompt_embeds` and the pooled ones.

    prompts: the texts, kept in the file for people. Raises `ArgumentError` for another suffix, `WriteError`.
    """
    from safetensors.numpy import save_file

    target = Path(path)
    if target.suffix != ".safetensors":
        raise ArgumentError(f"the output is {target.name!r}", expected="a name that ends in .safetensors")
    tensors = {}
    for prefix, embeddings in (("", positives), ("negative_", negatives)):
        for condition in bundle.conditions:
            if condition.argument is not None:
                arrays = [e.arrays[condition.name] for e in embeddings]
                tensors[prefix + condition.argument] = np.ascontiguousarray(np.stack(arrays), np.float32)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with writing("the embeddings", target.parent):
            save_file(tensors, part, metadata={PROMPTS: json.dumps(list(prompts)), "family": bundle.family})
            part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return target


def read_embeddings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The arguments of a call that a file of embeddings gives; what their shapes must be is checked with the call.

    Raises `MissingError` and `CorruptError`.
    """
    from ...weights.stored import convert, open_tensors

    known = [f"{n}{p}prompt_embeds" for n in ("", "negative_") for p in ("", "pooled_")]
    tensors = open_tensors([Path(path)])
    unknown = sorted(tensors.keys() - set(known))
    if unknown or "prompt_embeds" not in tensors:
        raise CorruptError(
            f"{Path(path).name} holds {', '.join(unknown or sorted(tensors)) or 'nothing'}",
            expected=f"prompt_embeds, and of {', '.join(known[1:])} what the model takes",
            remedy="Make one with: fewstep encode BUNDLE --prompt TEXT --output FILE",
        )
    return {n: convert(t, "float32", n).reshape(t.shape) for n, t in tensors.items()}
