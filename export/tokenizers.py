"""CLIP's tokenizers as one `tokenizer.json` each, whatever files a checkpoint carries them in.

The vocabulary and its merges come from `tokenizer.json`, or from `vocab.json` and `merges.txt`. Rules of normalising
and splitting are CLIP's own, as transformers 5 sets them whatever a file says, and the tokens that were added come in
the order in which it adds them (`PreTrainedTokenizerBase._from_pretrained`, `TokenizersBackend.__init__`): those of
`added_tokens_decoder` in `tokenizer_config.json`, or else those of `added_tokens.json` and of `tokenizer.json`; then
the special tokens that are named, which without `added_tokens_decoder` `special_tokens_map.json` overrules.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from ..bundle import Tokenizer as TokenizerRecord
from ..errors import ArgumentError, CorruptError, MissingError, UnsupportedError
from ..values import Reader, panics_refused, read_json, shown

NAMED = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "sep_token": None,
    "pad_token": "<|endoftext|>",
    "cls_token": None,
    "mask_token": None,
}
"""The special tokens of any tokenizer, in transformers' order, and what CLIP's are where nothing names them."""
MOST_IDS = 2**20
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def export_tokenizer(folder: Path, target: Path, longest: int, words: Sequence[str] = ()) -> TokenizerRecord:
    """Write a checkpoint's tokenizer folder as `target` (a `tokenizer.json`) and say how prompts are padded.

    longest: the text encoder's number of positions, where the tokenizer states no length or a larger one. words: tokens
    that are added behind its own.
    """
    tokenizer, settings = read_tokenizer(folder)
    for word in words:
        tokenizer.add_tokens([word])
    ids: dict[str, int] = {}
    for kind in ("bos_token", "eos_token", "pad_token"):
        token = str(settings[kind])
        number = tokenizer.token_to_id(token)
        if number is None:
            raise CorruptError(f"the tokenizer in {folder.name!r} does not know its own {kind} {token!r}")
        ids[kind] = number
    stated = settings.get("model_max_length")
    reading = Reader(place=f"the tokenizer in {folder.name!r}", remedy="Take the whole checkpoint.")
    length = longest if stated is None else int(min(reading.number("model_max_length", stated, 3), longest))
    return write_record(tokenizer, target, length, ids)


def write_tokenizer(opened: Any, target: Path, longest: int) -> TokenizerRecord:
    """Write a CLIP tokenizer of transformers as it is in memory, where a special token need not be an added one."""
    ids = {k: getattr(opened, f"{k}_id") for k in ("bos_token", "eos_token", "pad_token")}
    for kind, number in ids.items():
        if number is None:
            raise ArgumentError(f"a tokenizer without {kind}", expected="one as CLIP's", remedy=f"Set its {kind}.")
    if opened.padding_side != "right":
        raise UnsupportedError("a tokenizer that pads on the left", expected="one that pads on the right, as CLIP's do")
    inner = Tokenizer.from_str(opened.backend_tokenizer.to_str())
    return write_record(inner, target, int(min(opened.model_max_length, longest)), ids)


def write_record(tokenizer: Tokenizer, target: Path, length: int, ids: Mapping[str, Any]) -> TokenizerRecord:
    """Write a `tokenizer.json`, and say how prompts are padded; ids by kind, `None` for a beginning that it has not."""
    data = tokenizer.to_str().encode()
    target.write_bytes(data)
    return TokenizerRecord(
        file=target.name,
        length=length,
        pad_id=ids["pad_token"],
        bos_id=ids["bos_token"],
        eos_id=ids["eos_token"],
        sha256=hashlib.sha256(data).hexdigest(),
    )


def read_tokenizer(folder: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """A checkpoint's tokenizer and its settings, special tokens by kind among them.

    Special tokens may be of the vocabulary: OpenCLIP's tokenizers pad with "!", which makes every "!" of a prompt that
    very token. Raises `MissingError` without a vocabulary, and `CorruptError` for files that cannot be read.
    """
    saved = _json(folder / "tokenizer.json")
    config = _json(folder / "tokenizer_config.json")
    if config.get("split_special_tokens") or config.get("padding_side", "right") != "right":
        raise UnsupportedError(
            f"the tokenizer in {folder.name!r} splits special tokens, or pads on the left",
            expected="one that pads on the right, as CLIP's do",
        )
    found, remedy = f"the tokenizer in {folder.name!r} cannot be read", "Take the whole checkpoint."
    try:
        settings, added = _settings(folder, config, saved)
        vocabulary, merges = _vocabulary(folder, saved)
        with panics_refused(found, remedy=remedy):
            tokenizer = _byte_pairs(vocabulary, merges, str(settings["unk_token"]))
            tokenizer.add_tokens(_tokens(settings, added))
        begin, end = (str(settings[k]) for k in ("bos_token", "eos_token"))
        first, last = (tokenizer.token_to_id(t) or 0 for t in (begin, end))
        tokenizer.post_processor = processors.RobertaProcessing(
            (end, last), (begin, first), add_prefix_space=False, trim_offsets=False
        )
    except (MissingError, CorruptError):
        raise
    except Exception as error:
        raise CorruptError(f"{found} ({type(error).__name__}: {shown(str(error))})", remedy=remedy) from error
    return tokenizer, settings


def _settings(
    folder: Path, config: Mapping[str, Any], saved: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[int, AddedToken]]:
    """What the files set, with named tokens as transformers has them, and the tokens that were added, by stated id.

    `named` holds all special tokens by kind, `extra` those without one.
    """
    values = dict(config)
    if "additional_special_tokens" in values and not values.get("extra_special_tokens"):
        values["extra_special_tokens"] = values.pop("additional_special_tokens")
    others = {k: v for k, v in values.items() if k.endswith("_token") and k not in NAMED}
    own = {k: _token(v) for k, v in others.items() if isinstance(v, dict) and "__type" in v}
    own |= {k: v for k, v in others.items() if isinstance(v, str)}
    if isinstance(values.get("extra_special_tokens"), dict):
        own |= values.pop("extra_special_tokens")
    added: dict[int, AddedToken] = {}
    if "added_tokens_decoder" in config:
        added = {int(i): _token(t) for i, t in config["added_tokens_decoder"].items()}
    else:
        for kind, value in _json(folder / "special_tokens_map.json").items():
            if kind == "extra_special_tokens" and isinstance(value, list):
                value = [*(values.get(kind) or []), *value]
            values[kind] = _token(value, special=True) if isinstance(value, dict) else value
        special = {_text(values[k]) for k in NAMED if values.get(k)}
        special |= {_text(t) for t in values.get("extra_special_tokens") or []}
        for text, number in _json(folder / "added_tokens.json").items():
            added[number] = AddedToken(text, normalized=text not in special, special=text in special)
        for entry in saved.get("added_tokens", []):
            added[entry["id"]] = _token({k: v for k, v in entry.items() if k != "id"})
    by_text = {_text(t): t for t in added.values()}
    named = {k: values[k] if values.get(k) is not None else v for k, v in NAMED.items()}
    named = {k: by_text.get(_text(v), _token(v)) for k, v in named.items() if v is not None}
    extra = values.get("extra_special_tokens", values.get("additional_special_tokens")) or []
    return {**values, **named, "named": {**named, **own}, "extra": [_token(t) for t in extra]}, added


def _tokens(settings: Mapping[str, Any], added: Mapping[int, AddedToken]) -> list[AddedToken]:
    """The tokens to add, in transformers' order: those that were added by their ids, then special ones."""
    tokens: list[AddedToken | str] = [t for _, t in sorted(added.items())]
    known = {_text(t) for t in tokens}
    for token in (*settings["named"].values(), *settings["extra"]):
        if _text(token) not in known and token not in tokens:
            tokens.append(token)
    special = {_text(t) for t in settings["named"].values()}
    ready = [AddedToken(t, special=True) if isinstance(t, str) else t for t in tokens]
    for token in ready:
        token.special = token.special or _text(token) in special
    return ready


def _text(token: AddedToken | str | Mapping[str, Any]) -> str:
    if isinstance(token, Mapping):
        return str(token["content"])
    return token.content if isinstance(token, AddedToken) else str(token)


def _token(value: Any, **more: bool) -> Any:
    """A token as a file describes it; a bare text stays one."""
    if not isinstance(value, dict):
        return value
    return AddedToken(**{k: v for k, v in value.items() if k != "__type"} | more)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    data = read_json(path, path.name, remedy="Take the whole checkpoint.")
    if not isinstance(data, dict):
        raise CorruptError(
            f"{path.name} holds a {type(data).__name__}", expected="a JSON object", remedy="Take the whole checkpoint."
        )
    return data


def _vocabulary(folder: Path, saved: Mapping[str, Any]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Ids by token, and the pairs that are merged, in their order."""
    if saved:
        model = saved["model"]
        halves = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        return _ids(folder, model["vocab"]), [(first, second) for first, second in halves]
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    if not vocabulary.is_file() or not merges.is_file():
        raise MissingError(
            f"no tokenizer in {folder.name!r}",
            expected="tokenizer.json, or vocab.json and merges.txt",
            remedy="Take the whole checkpoint.",
        )
    ids = _ids(folder, _json(vocabulary))
    lines = merges.read_text(encoding="utf-8").split("\n")
    split = [line.split() for line in lines if not line.startswith("#version")]
    return ids, [(p[0], p[1]) for p in split if len(p) == 2 and "".join(p) in ids]


def _ids(folder: Path, vocabulary: object) -> dict[str, int]:
    """A vocabulary whose ids the library can lay out: it counts to the highest."""
    reading = Reader(place=f"the tokenizer in {folder.name!r}", remedy="Take the whole checkpoint.")
    ids = reading.mapping("its vocabulary", vocabulary)
    return {token: reading.integer("a token's id", number, 0, MOST_IDS) for token, number in ids.items()}


def _byte_pairs(vocabulary: dict[str, int], merges: list[tuple[str, str]], unknown: str) -> Tokenizer:
    """CLIP's byte-level BPE: NFC, one space, lower case, words by CLIP's pattern."""
    tokenizer = Tokenizer(
        BPE(
            vocab=vocabulary,
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            fuse_unk=False,
            unk_token=unknown,
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
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
