"""A bundle's tokenizer: texts to token ids, in chunks of what one pass of a text encoder takes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from tokenizers import Encoding
from tokenizers import Tokenizer as FastTokenizer

from ...bundle import Bundle, Tokenizer
from ...errors import ArgumentError, CorruptError
from ...values import panics_refused
from .syntax import MOST_CHUNKS, Chunk, Prompt, TextSpan, lay_out, parse_a1111


class PromptTokenizer:
    """One of a bundle's tokenizers: begins, ends, truncates and pads as the checkpoint's own does.

    known: how many tokens its text encoder has vectors for. one_pass: whether longer texts are always cut. Raises
    `CorruptError` for a file that is no tokenizer, or another one than was exported.
    """

    def __init__(self, bundle: Bundle, record: Tokenizer, known: int = 2**31, *, one_pass: bool = False) -> None:
        data = bundle.path(record.file).read_bytes()
        if record.sha256 not in (None, hashlib.sha256(data).hexdigest()):
            raise CorruptError(
                f"{record.file} was changed since the export",
                expected=f"SHA-256 {record.sha256}",
                remedy="Export the checkpoint again.",
            )
        self.record, self._clean, self._one_pass = record, bundle.model.clean, one_pass
        self._begin = [] if record.bos_id is None else [record.bos_id]
        try:
            with panics_refused(f"{record.file} is not a tokenizer", remedy="Export the checkpoint again."):
                self.fast = FastTokenizer.from_buffer(data)
        except CorruptError:
            raise
        except Exception as error:
            raise CorruptError(
                f"{record.file} is not a tokenizer ({error})", remedy="Export the checkpoint again."
            ) from error
        self.fast.no_padding()
        self.fast.no_truncation()
        self._known = known
        self._several = _several({t.content for t in self.fast.get_added_tokens_decoder().values()})
        self._comma: int | None = self.fast.token_to_id(",</w>")

    def learn(self, tokens: Sequence[str]) -> None:
        """Read tokens that were added to `fast` from now on; the text encoder has vectors for them."""
        self._known += len(tokens)
        self._several = _several({t.content for t in self.fast.get_added_tokens_decoder().values()})

    @property
    def room(self) -> int:
        """Tokens of a prompt that one pass takes, beside begin and end."""
        return self.record.length - 1 - self.first

    @property
    def first(self) -> int:
        """Where a prompt's own tokens begin."""
        return len(self._begin)

    def words(self, text: str) -> list[int]:
        """Token ids of a text, without begin and end; a word of several vectors is all of its tokens.

        Raises `ArgumentError` for a token that the text encoder has no vector for, `CorruptError` where the tokenizer's
        rules give up.
        """
        text = self._clean(text)
        encoded = self._encode(text)
        found = [t for t in dict.fromkeys(encoded.tokens) if t in self._several] if self._several else []
        for token in found:
            text = text.replace(token, self._several[token])
        if found:
            encoded = self._encode(text)
        ids: list[int] = encoded.ids
        if max(ids, default=0) >= self._known:
            token = next(t for t, i in zip(encoded.tokens, ids, strict=True) if i >= self._known)
            raise ArgumentError(
                f"the prompt has {token!r}, and the text encoder has no vector for it",
                remedy="Leave it out, or export the checkpoint again with the embedding that it stands for.",
            )
        return ids

    def _encode(self, text: str) -> Encoding:
        found, remedy = f"{self.record.file} cannot read the prompt", "Export the checkpoint again."
        try:
            with panics_refused(found, remedy=remedy):
                return self.fast.encode(text, add_special_tokens=False)
        except CorruptError:
            raise
        except Exception as error:
            raise CorruptError(f"{found} ({type(error).__name__})", remedy=remedy) from error

    def wrap(self, tokens: Sequence[int]) -> list[int]:
        """Tokens of one pass with begin, end and padding: as many as the encoder takes."""
        ids = [*self._begin, *tokens, self.record.eos_id]
        return ids + [self.record.pad_id] * (self.record.length - len(ids))

    def mask(self, tokens: Sequence[int]) -> list[int]:
        """1 for each of these tokens, begin and end, and 0 for the padding."""
        own = len(tokens) + 1 + self.first
        return [1] * own + [0] * (self.record.length - own)

    def chunks(self, prompt: Prompt, text: str) -> tuple[list[Chunk], bool]:
        """A text in chunks of one pass each, as `prompt` wants it read, and whether it was cut."""
        weighted = prompt.syntax == "a1111"
        parts = parse_a1111(text) if weighted else [TextSpan(text)]
        laid = lay_out([(self.words(p.text), p) for p in parts], self.room, self._comma if weighted else None)
        if prompt.long == "truncate" or self._one_pass:
            return laid[:1], len(laid) > 1
        if len(laid) > MOST_CHUNKS:
            raise ArgumentError(
                f"the prompt has {len(laid)} chunks of {self.room} tokens", expected=f"at most {MOST_CHUNKS}"
            )
        return laid, False


def _several(added: set[str]) -> dict[str, str]:
    """What stands for words of several vectors, by the word: `<toy> <toy>_1 <toy>_2` for `<toy>`, as in diffusers."""
    several = {}
    for token in added:
        tokens = [token]
        while f"{token}_{len(tokens)}" in added:
            tokens.append(f"{token}_{len(tokens)}")
        if len(tokens) > 1:
            several[token] = " ".join(tokens)
    return several
