"""Prompts to embeddings: the bundle's own tokenizers, its text encoders, and a cache of what was encoded before."""

from __future__ import annotations

import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...agreement import ATTENTION_MASK
from ...bundle import Bundle
from ...engines.base import Binding, Engine
from ...engines.graph.low_rank import EXTRA_WORDS, RANK, WORDS
from ...engines.low_rank import RANKS, Adapted, bucket, no_change
from ...errors import ArgumentError, NonFiniteError
from ...weights.embeddings import read_words
from ..arrays import Float32
from ..conditioning import Arrays, Change
from .lora_tags import Uses
from .syntax import Chunk, Prompt
from .tokenizer import PromptTokenizer

log = logging.getLogger("fewstep.runtime")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class Embedding:
    """A prompt as the UNet takes it: float32 arrays by the names of its inputs.

    Those of two dimensions, [T, D], lie along tokens: T is the encoders' length times the number of chunks. truncated:
    whether tokens were cut off.
    """

    arrays: Arrays
    truncated: bool = False

    @property
    def tokens(self) -> int:
        return next(len(a) for a in self.arrays.values() if a.ndim == 2)

    def zeros(self) -> Embedding:
        """The embedding of no prompt at all, for families that take zeros there: the same one each time."""
        zeros = _zeros.get(self)
        if zeros is None:
            zeros = _zeros[self] = Embedding(arrays={n: np.zeros_like(a) for n, a in self.arrays.items()})
        return zeros


_zeros: weakref.WeakKeyDictionary[Embedding, Embedding] = weakref.WeakKeyDictionary()


class TextEncoders:
    """Tokenises and encodes; keeps the last embeddings. Thread-safe: encoders run one prompt batch at a time.

    engines: the text encoders by name, or what opens them. With `keep_engines` off they are opened for prompts that
    are not known and let go of once these are encoded. changes: what LoRAs change, by component. adapt: opens the
    engine of an encoder that takes changes.
    """

    def __init__(
        self,
        bundle: Bundle,
        engines: Mapping[str, Engine] | Callable[[], Mapping[str, Engine]],
        *,
        keep: int = 64,
        keep_engines: bool = True,
        changes: Callable[[Uses], Mapping[str, Change]] = lambda loras: {},
        adapt: Callable[[str, bool], Adapted] | None = None,
    ) -> None:
        self._names, self._join = bundle.text_encoders, bundle.model.join
        self._bundle = bundle
        self._tokenizers = self._made_tokenizers()
        self._words: dict[str, tuple[int, Float32]] = {}
        self._changes, self._adapt = changes, adapt
        self._adapted: OrderedDict[tuple[int, ...], Binding] = OrderedDict()
        self._open = engines if callable(engines) else lambda: engines
        self._keep_engines = keep_engines
        self._engines: list[Engine] = []
        self._bindings: dict[int, list[Binding]] = {}
        self._kept: OrderedDict[Prompt, Embedding] = OrderedDict()
        self._keep = keep
        self._lock = threading.Lock()
        self.hits = self.misses = 0

    @property
    def length(self) -> int:
        """Tokens of one chunk, with begin, end and padding."""
        return self._bundle.tokens

    def encode(self, prompts: Sequence[str | Prompt]) -> list[Embedding]:
        """The embedding of each prompt; a prompt that was seen lately is not encoded again.

        A string is a plain prompt of one chunk.
        """
        asked = [Prompt(text=p) if isinstance(p, str) else p for p in prompts]
        if asked and not self._names:
            raise ArgumentError(
                "a text, the empty one of no negative prompt included, for a bundle without text encoders",
                expected="embeddings in its place",
                remedy="Pass prompt_embeds and negative_prompt_embeds, or on the command line the file that "
                "`fewstep encode` made of them: --prompt-embeds FILE",
            )
        with self._lock:
            missing = [p for p in dict.fromkeys(asked) if p not in self._kept]
            self.misses += len(missing)
            self.hits += len(asked) - len(missing)
            fresh: dict[Prompt, Embedding] = {}
            try:
                for skip, loras in dict.fromkeys((p.clip_skip, p.loras) for p in missing):
                    together = [p for p in missing if p.clip_skip == skip and p.loras == loras]
                    fresh.update(zip(together, self._run(together, skip, loras), strict=True))
            finally:
                if not self._keep_engines:
                    self._engines, self._bindings = [], {}
            embeddings = [fresh.get(p) or self._kept[p] for p in asked]
            self._kept.update(fresh)
            for p in asked:
                self._kept.move_to_end(p)
            while len(self._kept) > self._keep:
                self._kept.popitem(last=False)
        return embeddings

    def learn(self, files: Sequence[tuple[str | None, Path]]) -> tuple[str, ...]:
        """Read these embedding files' words from now on, and no others; returns the words.

        files: each with the word it is to be, or `None` for its own. Raises `ArgumentError` and `CorruptError`, and
        then knows what it knew.
        """
        tokenizers = self._made_tokenizers()
        first = {n: t.fast.get_vocab_size() for n, t in zip(self._names, tokenizers, strict=True)}
        widths = {n: int(self._bundle.component(n).config["hidden_size"]) for n in self._names}
        words, _ = read_words(files, widths, [t.fast for t in tokenizers])
        for name, tokenizer in zip(self._names, tokenizers, strict=True):
            tokenizer.learn([t for w in words.get(name, ()) for t in w.tokens])
        tables = {n: (first[n], np.concatenate([w.vectors for w in of])) for n, of in words.items()}
        with self._lock:
            self._tokenizers, self._words = tokenizers, tables
            self._kept.clear()
        return tuple(dict.fromkeys(w.tokens[0] for of in words.values() for w in of))

    def _made_tokenizers(self) -> list[PromptTokenizer]:
        known = [int(self._bundle.component(n).config.get("vocab_size", 2**31)) for n in self._names]
        records, encoders = self._bundle.tokenizers, [self._bundle.model.encoder(n) for n in self._names]
        return [
            PromptTokenizer(self._bundle, r, k, one_pass=e.one_pass)
            for r, k, e in zip(records, known, encoders, strict=True)
        ]

    def forget(self) -> None:
        """Drop the kept embeddings."""
        with self._lock:
            self._kept.clear()

    def _run(self, prompts: Sequence[Prompt], clip_skip: int, loras: Uses) -> list[Embedding]:
        """Encode every chunk of every prompt in one pass, then put them together again."""
        laid, cut = self._lay_out(prompts)
        if any(cut):
            log.warning(
                "%d prompt(s) are longer than the text encoder takes and were cut; "
                "long_prompts='chunk' (--long-prompts chunk) keeps them",
                sum(cut),
            )
        counts = [len(chunks) for chunks in laid[0]]
        total = sum(counts)
        bindings = self._encode_chunks([[c for chunks in of for c in chunks] for of in laid], clip_skip, loras)
        outputs: list[dict[str, Float32]] = []
        for binding, of, tokenizer in zip(bindings, laid, self._tokenizers, strict=True):
            made = {n: a[:total] for n, a in binding.outputs.items()}
            hidden = _weigh(made["hidden"], [c for chunks in of for c in chunks], tokenizer.first)
            if not np.isfinite(hidden).all():
                raise NonFiniteError(
                    "a text encoder gave NaN or infinity", remedy="Export the text encoders in float32."
                )
            outputs.append({**made, "hidden": hidden})
        joined, embeddings, chunk = self._join(outputs), [], 0
        for count, was_cut in zip(counts, cut, strict=True):
            arrays = {n: _of_prompt(a[chunk : chunk + count]) for n, a in joined.items()}
            embeddings.append(Embedding(arrays=arrays, truncated=was_cut))
            chunk += count
        return embeddings

    def _lay_out(self, prompts: Sequence[Prompt]) -> tuple[list[list[list[Chunk]]], list[bool]]:
        """Chunks by encoder and prompt, as many for each encoder, and whether each prompt was cut.

        Where the encoders read texts of different length, the shorter goes on with empty chunks.
        """
        laid: list[list[list[Chunk]]] = []
        cut = [False] * len(prompts)
        for index, tokenizer in enumerate(self._tokenizers):
            laid.append([])
            for i, prompt in enumerate(prompts):
                chunks, was_cut = tokenizer.chunks(prompt, prompt.of_encoder(index))
                laid[-1].append(chunks)
                cut[i] |= was_cut
        for i in range(len(prompts)):
            most = max(len(of[i]) for of in laid)
            for of in laid:
                of[i] += [Chunk((), ())] * (most - len(of[i]))
        return laid, cut

    def _encode_chunks(self, chunks: Sequence[Sequence[Chunk]], clip_skip: int, loras: Uses) -> list[Binding]:
        """Bindings of the encoders, run on their chunks, with their weights changed where LoRAs do.

        Engines that were built for other numbers of chunks have empty ones behind these.
        """
        if not self._engines:
            opened = self._open()
            self._engines = [opened[n] for n in self._names]
        given = len(chunks[0])
        count = _room(self._engines, given)
        bindings = self._bindings.get(count)
        if bindings is None:
            bindings = [e.bind({"prompts": count}) for e in self._engines]
            self._bindings = {**dict(list(self._bindings.items())[-3:]), count: bindings}
        changes, told = self._changes(loras), []
        for name, plain, tokenizer, of in zip(self._names, bindings, self._tokenizers, chunks, strict=True):
            filled = (*of, *[Chunk((), ())] * (count - given))
            ids = np.array([tokenizer.wrap(c.tokens) for c in filled], np.int64)
            first, table = self._words.get(name, (0, None))
            words = table if table is not None and ids.max() >= first else None
            binding = plain
            if name in changes or words is not None:
                binding, vocabulary = self._changed(name, changes.get(name), count, words)
                if words is not None:
                    ids = np.where(ids >= first, ids - first + vocabulary, ids)
            np.copyto(binding.inputs["input_ids"], ids)
            if ATTENTION_MASK in binding.inputs:
                np.copyto(binding.inputs[ATTENTION_MASK], [tokenizer.mask(c.tokens) for c in filled])
            if "clip_skip" in binding.inputs:  # bundles of older exports lack it
                np.copyto(binding.inputs["clip_skip"], clip_skip)
            binding.enqueue()
            told.append(binding)
        return told

    def _changed(self, name: str, change: Change | None, count: int, words: Float32 | None) -> tuple[Binding, int]:
        """A binding of an encoder that takes changes and words, told of these, and the size of its own vocabulary."""
        if self._adapt is None:
            raise ArgumentError("a LoRA or a word is given", expected="the text encoders of a pipeline")
        adapted = self._adapt(name, change is not None and change.kernels)
        rank = RANKS[0] if change is None else bucket(change.rank)
        none = adapted.engine.inputs[EXTRA_WORDS].resolve({WORDS: 1})
        rows = np.zeros(none, np.float32) if words is None else words
        key = (id(adapted.engine), count, rank, len(rows))
        binding = self._adapted.get(key)
        if binding is None:
            dims = {"prompts": count, RANK: rank, WORDS: len(rows)}
            binding = self._adapted[key] = adapted.engine.bind(dims)
            if len(self._adapted) > 8:
                self._adapted.popitem(last=False)
        arrays = no_change(adapted.extent, rank) if change is None else change.packed(adapted.layers, rank)
        for input_name, array in {**arrays, EXTRA_WORDS: rows}.items():
            binding.inputs[input_name][...] = array
        return binding, adapted.vocabulary or 0


def _room(engines: Sequence[Engine], count: int) -> int:
    """This number of chunks, or the next larger one that the engines' profiles admit; this one where none does."""
    for engine in engines:
        spans = [p.spans["prompts"] for p in getattr(engine, "profiles", ())]
        if spans and not any(s.minimum <= count <= s.maximum for s in spans):
            count = min((s.minimum for s in spans if s.minimum > count), default=count)
    return count


def _of_prompt(chunks: Float32) -> Float32:
    """What a prompt's chunks gave as one array: states [N, L, D] one after the other, of vectors [N, D] the first."""
    return np.array(chunks.reshape(-1, chunks.shape[-1]) if chunks.ndim == 3 else chunks[0], np.float32)


def _weigh(hidden: Float32, chunks: Sequence[Chunk], first: int) -> Float32:
    """Hidden states [N, L, D] times their tokens' weights, each chunk's mean restored, as the web UI does it.

    first: where a chunk's own tokens begin.
    """
    states_out = np.array(hidden, np.float32)
    for states, chunk in zip(states_out, chunks, strict=True):
        if chunk.weighted:
            weights = np.ones(len(states), np.float32)
            weights[first : first + len(chunk.weights)] = chunk.weights
            mean = states.mean()
            states *= weights[:, None]
            states *= mean / states.mean()
    return states_out
