"""What each image of a request is told: its prompt and negative prompt, as texts or as embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...bundle import Bundle
from ...errors import ArgumentError
from ..arrays import Float32
from ..call import Call
from .encoders import Embedding
from .lora_tags import Uses, described, read_loras, take_tags, together
from .marks import refuse_marks
from .syntax import Prompt, check_clip_skip, check_prompt, check_reading


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Wording:
    """One entry an image; a negative `None` was not given. loras: what changes the weights of both rows."""

    positives: tuple[Prompt | Embedding, ...]
    negatives: tuple[Prompt | Embedding | None, ...]
    loras: tuple[Uses, ...]

    @property
    def images(self) -> int:
        return len(self.positives)

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(p.text if isinstance(p, Prompt) else "" for p in self.positives)

    @property
    def negative_texts(self) -> tuple[str | None, ...]:
        return tuple(n.text if isinstance(n, Prompt) else None for n in self.negatives)

    def described(self) -> list[dict[str, Any]]:
        """What a picture's parameters say of it, by image: `prompt`, `negative`, and where given a second encoder's."""
        descriptions = []
        for positive, negative, text, other, loras in zip(
            self.positives, self.negatives, self.texts, self.negative_texts, self.loras, strict=True
        ):
            words: dict[str, Any] = {"prompt": text, "negative": other}
            for name, one in (("prompt_2", positive), ("negative_2", negative)):
                if isinstance(one, Prompt) and one.text_2 is not None:
                    words[name] = one.text_2
            if loras:
                words["loras"] = described(loras)
            if isinstance(positive, Embedding) or isinstance(negative, Embedding):
                words["embeddings"] = True
            descriptions.append(words)
        return descriptions

    def repeated(self, times: int) -> Wording:
        return Wording(positives=self.positives * times, negatives=self.negatives * times, loras=self.loras * times)


def read_wording(bundle: Bundle, call: Call, each: int) -> Wording:
    """What the call's images are told, `each` images a prompt."""
    syntax, long = check_reading(call.prompt_syntax, call.long_prompts)
    skip = check_clip_skip(bundle, call.clip_skip)
    if long == "chunk" and call.long_prompts is not None and any(e.one_pass for e in bundle.model.text_encoders):
        raise ArgumentError(f"long_prompts='chunk' for {bundle.model.title}", expected="'truncate', as it reads a text")
    second = len(bundle.text_encoders) > 1
    pooled_too = any(c.argument == "pooled_prompt_embeds" for c in bundle.conditions)
    for name in ("prompt_2", "negative_2"):
        if getattr(call, name) is not None and not second:
            raise ArgumentError(f"{name} for a model with one text encoder", remedy="Leave it out.")
    for embeds in ("prompt_embeds", "negative_prompt_embeds"):
        pooled = embeds.replace("prompt_embeds", "pooled_prompt_embeds")
        if getattr(call, pooled) is not None and (not pooled_too or getattr(call, embeds) is None):
            why = f"without {embeds}" if pooled_too else "for a model with one text encoder"
            raise ArgumentError(f"{pooled} {why}", remedy="Leave it out.")
    if (call.prompt is None) == (call.prompt_embeds is None):
        raise ArgumentError(
            "neither a prompt nor prompt_embeds" if call.prompt is None else "a prompt and prompt_embeds",
            expected="one of the two",
            remedy="Pass a prompt (--prompt)." if call.prompt is None else "",
        )
    if call.negative is not None and call.negative_prompt_embeds is not None:
        raise ArgumentError("a negative prompt and negative_prompt_embeds", expected="at most one of the two")
    tagged: list[Uses] = []
    if call.prompt_embeds is not None:
        _refuse_beside_embeddings(call, ("prompt_2", "clip_skip"))
        positives: list[Prompt | Embedding] = list(_embeddings(bundle, call, ""))
    else:
        texts = _texts("prompt", call.prompt)
        others = _matched("prompt_2", call.prompt_2, len(texts))
        for main, second_one in zip(texts, others, strict=True):
            refuse_marks(main, tags=syntax == "a1111", joins=syntax == "a1111")
            refuse_marks(second_one or "", tags=False, joins=syntax == "a1111")
        if syntax == "a1111":
            texts, tagged = map(list, zip(*(take_tags(t) for t in texts), strict=True)) if texts else ([], [])
        positives = [
            Prompt(text=t, text_2=o, syntax=syntax, long=long, clip_skip=skip)
            for t, o in zip(texts, others, strict=True)
        ]
    asked = read_loras(call.loras, len(positives))
    loras = [together(a, t) for a, t in zip(asked, tagged or [()] * len(asked), strict=True) for _ in range(each)]
    positives = [p for p in positives for _ in range(each)]
    # diffusers' clip_skip leaves the negative prompt alone; the web UI's setting is for both
    skip = 0 if syntax == "plain" else skip
    negatives = _negatives(bundle, call, Prompt(text="", syntax=syntax, long=long, clip_skip=skip))
    if len(negatives) == 1:
        negatives = negatives * len(positives)
    elif len(negatives) * each == len(positives):
        negatives = [n for n in negatives for _ in range(each)]
    if len(negatives) != len(positives):
        raise ArgumentError(
            f"{len(negatives)} negative prompts for {len(positives)} images", expected="one an image, or a single one"
        )
    return Wording(positives=tuple(positives), negatives=tuple(negatives), loras=tuple(loras))


def _negatives(bundle: Bundle, call: Call, like: Prompt) -> list[Prompt | Embedding | None]:
    if call.negative_prompt_embeds is not None:
        _refuse_beside_embeddings(call, ("negative_2",))
        return list(_embeddings(bundle, call, "negative_"))
    if call.negative is None and call.negative_2 is None:
        return [None]
    texts = _texts("negative prompt", "" if call.negative is None else call.negative)
    others = _matched("negative_2", call.negative_2, len(texts))
    negatives = []
    for one in (*texts, *(o for o in others if o)):
        refuse_marks(one, tags=False, joins=False)
    for text, other in zip(texts, others, strict=True):
        negatives.append(Prompt(text=text, text_2=other, syntax=like.syntax, long=like.long, clip_skip=like.clip_skip))
    return list(negatives)


def _texts(what: str, given: Any) -> list[str]:
    """One prompt or several as a list."""
    if not isinstance(given, (str, list, tuple)):
        check_prompt(given, what)
    return [check_prompt(p, what) for p in ([given] if isinstance(given, str) else given)]


def _matched(name: str, given: Any, count: int) -> Sequence[str | None]:
    """Texts for the second encoder, as many as for the first."""
    if given is None:
        return [None] * count
    texts = _texts(name, given)
    if len(texts) not in (1, count):
        raise ArgumentError(f"{len(texts)} {name} beside {count} prompts", expected="one a prompt, or a single one")
    return texts * (count // len(texts))


def _refuse_beside_embeddings(call: Call, names: Sequence[str]) -> None:
    for name in names:
        if getattr(call, name):
            raise ArgumentError(f"{name} beside embeddings", expected="it is for prompts", remedy="Leave it out.")


def _embeddings(bundle: Bundle, call: Call, prefix: str) -> list[Embedding]:
    """The embeddings that a call gives in place of prompts, one an entry, by the arguments of the family's inputs."""
    stacked: dict[str, Float32] = {}
    entries = None
    for condition in bundle.conditions:
        if condition.argument is None:
            continue
        name = prefix + condition.argument
        given = getattr(call, name)
        if given is None:
            raise ArgumentError(f"{prefix}prompt_embeds without {name}", remedy=f"Pass {name} [N, P] too.")
        shape = (entries, *(None if d == "tokens" else int(d) for d in condition.shape))
        stacked[condition.name] = as_float32(name, given, shape)
        entries = len(stacked[condition.name])
    return [Embedding(arrays={n: a[i] for n, a in stacked.items()}) for i in range(entries or 0)]


def as_float32(name: str, given: Any, shape: tuple[int | None, ...]) -> Float32:
    """An array (or a torch tensor) as finite float32 of a shape, in which `None` is any number from 1."""
    if hasattr(given, "detach"):
        given = given.detach().cpu()
        given = given.resolve_conj().numpy() if given.is_complex() else given.float().numpy()
    try:
        array = np.asarray(given)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"{name} is {type(given).__name__}", expected="an array of floats") from error
    if array.dtype.kind not in "fiu":
        raise ArgumentError(f"{name} is an array of {array.dtype}", expected="an array of floats")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32, copy=False)
    fits = array.ndim == len(shape) and all(n and w in (None, n) for n, w in zip(array.shape, shape, strict=True))
    if not fits:
        words = ", ".join("*" if w is None else str(w) for w in shape)
        raise ArgumentError(f"{name} has shape {list(array.shape)}", expected=f"[{words}]")
    if not np.isfinite(array).all():
        raise ArgumentError(f"{name} holds NaN or infinity", expected="finite numbers")
    return array
