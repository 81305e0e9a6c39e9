"""Prompts to embeddings: the bundle's own tokenizers, its text encoders, and a cache of what was encoded before."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as FastTokenizer

from ..bundle import Bundle, Tokenizer
from ..engines.base import Binding, Engine
from ..errors import ArgumentError, CorruptError, NonFiniteError

Float32 = npt.NDArray[np.float32]
LONGEST_PROMPT = 20_000
log = logging.getLogger("fewstep.runtime")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Embedding:
    """A prompt as the UNet takes it: `hidden` float32 [T, D], and `pooled` float32 [P] where the family has one."""

    hidden: Float32
    pooled: Float32 | None
    truncated: bool = False

    def zeros(self) -> Embedding:
        """The embedding of no prompt at all, for families that take zeros there."""
        return Embedding(
            hidden=np.zeros_like(self.hidden), pooled=None if self.pooled is None else np.zeros_like(self.pooled)
        )


class PromptTokenizer:
    """One of a bundle's tokenizers: begins, ends, truncates and pads as the checkpoint's own does."""

    def __init__(self, bundle: Bundle, record: Tokenizer) -> None:
        path = bundle.path(record.file)
        try:
            self._fast = FastTokenizer.from_file(str(path))
        except Exception as error:
            raise CorruptError(
                f"{record.file} is not a tokenizer ({error})", remedy="Export the checkpoint again."
            ) from error
        self._fast.no_padding()
        self._fast.no_truncation()
        self.record = record

    def encode(self, prompt: str) -> tuple[list[int], bool]:
        """Token ids of the record's length, and whether the prompt was cut."""
        ids = self._fast.encode(prompt).ids
        length = self.record.length
        cut = len(ids) > length
        if cut:
            ids = [*ids[: length - 1], self.record.eos_id]
        return ids + [self.record.pad_id] * (length - len(ids)), cut


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


class TextEncoders:
    """Tokenises and encodes; keeps the last embeddings. Thread-safe: encoders run one prompt batch at a time."""

    def __init__(self, bundle: Bundle, engines: Mapping[str, Engine], *, keep: int = 64) -> None:
        names = [n for n in ("text_encoder", "text_encoder_2") if n in bundle.components]
        self._tokenizers = [PromptTokenizer(bundle, r) for r in bundle.tokenizers]
        self._engines = [engines[n] for n in names]
        self._bindings: dict[int, list[Binding]] = {}
        self._kept: OrderedDict[str, Embedding] = OrderedDict()
        self._keep = keep
        self._lock = threading.Lock()
        self.hits = self.misses = 0

    def encode(self, prompts: Sequence[str]) -> list[Embedding]:
        """The embedding of each prompt; a prompt that was seen lately is not encoded again."""
        with self._lock:
            wanted = [p for p in dict.fromkeys(prompts) if p not in self._kept]
            self.misses += len(wanted)
            self.hits += len(prompts) - len(wanted)
            made = dict(zip(wanted, self._run(wanted), strict=True)) if wanted else {}
            found = [made.get(p) or self._kept[p] for p in prompts]
            self._kept.update(made)
            for p in prompts:
                self._kept.move_to_end(p)
            while len(self._kept) > self._keep:
                self._kept.popitem(last=False)
        return found

    def forget(self) -> None:
        """Drop the kept embeddings."""
        with self._lock:
            self._kept.clear()

    def tokenize(self, prompts: Sequence[str]) -> tuple[list[npt.NDArray[np.int64]], list[bool]]:
        """Token ids int64 [P, L] by tokenizer, and whether each prompt was cut by any of them."""
        ids, cut = [], [False] * len(prompts)
        for tokenizer in self._tokenizers:
            rows = []
            for i, prompt in enumerate(prompts):
                row, was_cut = tokenizer.encode(prompt)
                rows.append(row)
                cut[i] |= was_cut
            ids.append(np.array(rows, np.int64))
        return ids, cut

    def _run(self, prompts: Sequence[str]) -> list[Embedding]:
        ids, cut = self.tokenize(prompts)
        if any(cut):
            log.warning("%d prompt(s) are longer than the text encoder takes and were cut", sum(cut))
        bindings = self._bindings.get(len(prompts))
        if bindings is None:
            bindings = [e.bind({"prompts": len(prompts)}) for e in self._engines]
            self._bindings = {**dict(list(self._bindings.items())[-3:]), len(prompts): bindings}
        for binding, tokens in zip(bindings, ids, strict=True):
            np.copyto(binding.inputs["input_ids"], tokens)
            if "clip_skip" in binding.inputs:  # bundles of older exports lack it
                np.copyto(binding.inputs["clip_skip"], 0)
            binding.enqueue()
        hidden = np.concatenate([b.outputs["hidden"] for b in bindings], axis=-1)
        pooled = bindings[-1].outputs.get("pooled")
        if not np.isfinite(hidden).all():
            raise NonFiniteError("a text encoder gave NaN or infinity", remedy="Export the text encoders in float32.")
        return [
            Embedding(
                hidden=hidden[i].copy() if len(bindings) == 1 else hidden[i],
                pooled=None if pooled is None else np.array(pooled[i], np.float32),
                truncated=cut[i],
            )
            for i in range(len(prompts))
        ]
