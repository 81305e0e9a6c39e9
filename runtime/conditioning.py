"""What the UNet is told besides latent and timestep: prompts, sizes and crops, guidance as an embedding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..bundle import Bundle
from ..errors import ArgumentError
from .arguments import check_pair
from .call import Call
from .prompts.encoders import Embedding, Float32, TextEncoders
from .prompts.syntax import Prompt, common_length

if TYPE_CHECKING:
    from .request import Request

MOST_TOKENS = 24 * 77
LARGEST_SIZE = 65_536
SIZE_ARGUMENTS = tuple(f"{n}{a}" for n in ("", "negative_") for a in ("original_size", "crop_top_left", "target_size"))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sizes:
    """SDXL's conditioning, float32 [6] each: original height, width, crop's top, left, target height, width."""

    positive: Float32
    negative: Float32


def condition(
    bundle: Bundle, text: TextEncoders, request: Request
) -> tuple[list[Embedding], Sequence[Embedding | None]]:
    """Embeddings of the prompts and, where guidance needs them, of the negative prompts, all of one length.

    A negative prompt that was not given is the empty prompt; in families that say so (SDXL's
    `force_zeros_for_empty_prompt`) it is zeros, as in diffusers. Prompts of fewer chunks are repeated whole.
    """
    wording = request.wording
    guided = request.guided and not bundle.guidance_embedding
    empty = [_empty_like(p) for p in wording.positives]
    told = [*wording.positives, *(n or e for n, e in zip(wording.negatives, empty, strict=True) if guided)]
    texts = [t for t in told if isinstance(t, Prompt)]
    encoded = iter(text.encode(texts) if texts else [])
    embeddings = [next(encoded) if isinstance(t, Prompt) else t for t in told]
    length = common_length([len(e.hidden) for e in embeddings], MOST_TOKENS)
    embeddings = [e.repeated(length) for e in embeddings]
    positives, negatives = embeddings[: request.images], embeddings[request.images :]
    if not guided:
        return positives, [None] * request.images
    if bundle.force_zeros:
        negatives = [e.zeros() if given is None else e for e, given in zip(negatives, wording.negatives, strict=True)]
    return positives, negatives


def _empty_like(positive: Prompt | Embedding) -> Prompt:
    """The empty prompt, read as the prompt is."""
    if isinstance(positive, Embedding) or positive.syntax == "plain":
        return Prompt(text="")
    return Prompt(text="", syntax=positive.syntax, long=positive.long, clip_skip=positive.clip_skip)


def size_and_crop(bundle: Bundle, call: Call, width: int, height: int) -> Sizes | None:
    """What a family with time ids is told of sizes and crops; `None` for the others, which take none of it."""
    if not any(s.name == "time_ids" for s in bundle.component("unet").inputs):
        given = [n for n in SIZE_ARGUMENTS if getattr(call, n) not in (None, (0, 0))]
        if given:
            raise ArgumentError(f"{given[0]} for a model that is told no sizes", remedy="Leave it out.")
        return None

    def size(name: str, otherwise: Sequence[float]) -> list[float]:
        given = getattr(call, name)
        return list(otherwise) if given is None else list(check_pair(name, given, 1, LARGEST_SIZE)[::-1])

    def crop(name: str, otherwise: Sequence[float]) -> list[float]:
        given = getattr(call, name)
        return list(otherwise) if given is None else list(check_pair(name, given, -LARGEST_SIZE, LARGEST_SIZE))

    own = [height, width]
    positive = [*size("original_size", own), *crop("crop_top_left", (0, 0)), *size("target_size", own)]
    negative = [
        *size("negative_original_size", positive[:2]),
        *crop("negative_crop_top_left", positive[2:4]),
        *size("negative_target_size", positive[4:]),
    ]
    return Sizes(positive=np.array(positive, np.float32), negative=np.array(negative, np.float32))


def guidance_vector(bundle: Bundle, request: Request) -> Float32 | None:
    """The sinusoidal embedding of `guidance - 1` that LCM's full UNets take instead of a second row, float32 [E]."""
    if not bundle.guidance_embedding:
        return None
    half = bundle.guidance_embedding // 2
    rates = np.exp(-math.log(10_000.0) / (half - 1) * np.arange(half))
    angles = (request.guidance - 1.0) * 1000.0 * rates
    vector = np.concatenate([np.sin(angles), np.cos(angles)]).astype(np.float32)
    return np.pad(vector, (0, bundle.guidance_embedding - len(vector)))
