"""CLIP's tokenizers as one `tokenizer.json` each, whatever files a checkpoint carries them in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from ..bundle import Tokenizer as TokenizerRecord
from ..errors import CorruptError, MissingError

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def export_tokenizer(folder: Path, target: Path, longest: int) -> TokenizerRecord:
    """Write a checkpoint's tokenizer folder as `target` (a `tokenizer.json`) and say how prompts are padded.

    `longest` is the text encoder's number of positions, where the tokenizer states no length or a larger one.

    Special tokens are taken from `tokenizer_config.json` and `special_tokens_map.json`: OpenCLIP's
    tokenizers pad with "!", which makes every "!" of a prompt that very token.
    """
    config = _json(folder / "tokenizer_config.json")
    special = {**_json(folder / "special_tokens_map.json"), **{k: v for k, v in config.items() if k.endswith("_token")}}
    names = {k: v["content"] if isinstance(v, dict) else v for k, v in special.items() if isinstance(v, (str, dict))}
    ready = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(ready)) if ready.is_file() else _from_merges(folder)
    except Exception as error:
        if isinstance(error, MissingError):
            raise
        raise CorruptError(
            f"the tokenizer in {folder.name!r} cannot be read ({error})", remedy="Take the whole checkpoint."
        ) from error
    ids: dict[str, int] = {}
    for kind, fallback in (
        ("bos_token", "<|startoftext|>"),
        ("eos_token", "<|endoftext|>"),
        ("pad_token", "<|endoftext|>"),
    ):
        token = names.get(kind, fallback)
        if not ready.is_file():
            tokenizer.add_special_tokens([token])
        number = tokenizer.token_to_id(token)
        if number is None:
            raise CorruptError(f"the tokenizer in {folder.name!r} does not know its own {kind} {token!r}")
        ids[kind] = number
    tokenizer.no_padding()
    tokenizer.no_truncation()
    stated = config.get("model_max_length", longest)
    length = min(int(stated), longest) if isinstance(stated, (int, float)) else longest
    target.write_text(tokenizer.to_str(), encoding="utf-8")
    return TokenizerRecord(
        file=target.name,
        length=length,
        pad_id=ids["pad_token"],
        bos_id=ids["bos_token"],
        eos_id=ids["eos_token"],
    )


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptError(f"{path.name} is not JSON: {error}") from error
    return data if isinstance(data, dict) else {}


def _from_merges(folder: Path) -> Tokenizer:
    """CLIP's byte-level BPE from `vocab.json` and `merges.txt`: NFC, one space, lower case, words by CLIP's pattern."""
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    if not vocabulary.is_file() or not merges.is_file():
        raise MissingError(
            f"no tokenizer in {folder.name!r}",
            expected="tokenizer.json, or vocab.json and merges.txt",
            remedy="Take the whole checkpoint.",
        )
    ids = json.loads(vocabulary.read_text(encoding="utf-8"))
    lines = merges.read_text(encoding="utf-8").split("\n")
    split = [line.split() for line in lines if not line.startswith("#version")]
    pairs = [(p[0], p[1]) for p in split if len(p) == 2 and "".join(p) in ids]
    tokenizer = Tokenizer(
        BPE(
            vocab=ids,
            merges=pairs,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            fuse_unk=False,
            unk_token="<|endoftext|>",
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.post_processor = processors.RobertaProcessing(
        ("<|endoftext|>", ids["<|endoftext|>"]),
        ("<|startoftext|>", ids["<|startoftext|>"]),
        add_prefix_space=False,
        trim_offsets=False,
    )
    return tokenizer
