"""The tokenizer (CLIP's byte-level BPE with merges learnt from the captions) and the text encoder's configuration."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections import Counter
from pathlib import Path

from scenes import TEMPLATES, random_scene, triples
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

MOST_MERGES = 160
LENGTH = 77


def _byte_symbols() -> list[str]:
    """The 256 printable stand-ins for bytes that GPT-2 introduced and CLIP kept, in CLIP's order."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in kept]
    return [chr(b) for b in kept] + [chr(256 + i) for i in range(len(others))]


def learn_merges(count: int) -> list[tuple[str, str]]:
    """Plain byte-pair encoding on ten thousand captions; the end of a word is part of its last symbol."""
    rng = random.Random(7)
    kinds = triples(held_out=None)
    captions = (random_scene(rng, kinds).caption(rng.choice(TEMPLATES)) for _ in range(10_000))
    words = Counter(word for caption in captions for word in re.findall(r"[a-z]+|[^\sa-z]+", caption))
    splits = {w: [*w[:-1], w[-1] + "</w>"] for w in words}
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in splits.items():
            for pair in itertools.pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda p: (-pairs[p], p))
        merges.append(best)
        for parts in splits.values():
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == best:
                    parts[i : i + 2] = ["".join(best)]
                i += 1
    return merges


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write the tokenizer's files and return it as transformers loads it."""
    folder.mkdir(parents=True, exist_ok=True)
    symbols = _byte_symbols()
    merges = learn_merges(MOST_MERGES)
    vocabulary = [
        *symbols,
        *(s + "</w>" for s in symbols),
        *("".join(m) for m in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    ids = {token: i for i, token in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    tokenizer = CLIPTokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        model_max_length=LENGTH,
        bos_token="<|startoftext|>",  # noqa: S106 a word of the vocabulary
        eos_token="<|endoftext|>",  # noqa: S106 a word of the vocabulary
        pad_token="<|endoftext|>",  # noqa: S106 a word of the vocabulary
        unk_token="<|endoftext|>",  # noqa: S106 a word of the vocabulary
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            hidden_act="quick_gelu",
            projection_dim=96,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
