"""What a request needs before its first evaluation: prompts encoded, noise drawn, a picture turned into latents."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..bundle import Bundle
from ..families.base import GUIDANCE_INPUT, guidance_embedding
from .arrays import Float32, Shape
from .conditioning import Arrays, Conditioning, Retold
from .device.base import Sampling
from .loras import LoraLibrary
from .noise.seeds import make_generator, request_noise
from .noise.turned import turned
from .pictures.control import neutral_arrays, tell_controls
from .pictures.image_prompt import ImagePrompts
from .pictures.inpaint import Blend, make_blend
from .pictures.told import tell
from .pictures.vae import Vae
from .prompts.encoders import Embedding, TextEncoders
from .prompts.syntax import Prompt, common_length
from .request import Request

MOST_TOKENS = 24 * 77
Runs = Sequence[tuple[int, Embedding]]
"""What a prompt is told as, each from an evaluation on."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prepared:
    """A request that is ready for slots, one entry an image.

    gaussians: unit noise to start from, float32 [B, C, h, w], of clips [B, F, C, h, w]. latents: of the picture it
    starts from, float32 [B, C, h, w], or `None`. truncated: by image, whether tokens of its prompt or negative prompt
    were cut off.
    text_ms, encode_image_ms: what preparing took.
    """

    request: Request
    samplings: tuple[Sampling, ...]
    gaussians: Float32
    latents: Float32 | None
    truncated: tuple[bool, ...]
    text_ms: float
    encode_image_ms: float

    @property
    def shape(self) -> Shape:
        """(C, h, w) of a latent, or of clips (F, C, h, w)."""
        return self.gaussians.shape[1:]


def prepare(
    bundle: Bundle,
    text: TextEncoders,
    vae: Vae,
    prompts: ImagePrompts,
    request: Request,
    loras: LoraLibrary | None = None,
) -> Prepared:
    """Encode the prompts and the pictures, and draw the noise, in the order in which diffusers draws it."""
    began = time.perf_counter()
    conditionings, truncated = condition(bundle, text, prompts, request, loras)
    encoded = time.perf_counter()
    noise = request_noise(
        request.seeds,
        shared=request.shared_stream,
        device=request.seed_device,
        generators=request.generators,
        first_draws=request.first_draws,
    )
    shape = latent_shape(bundle, request)
    pictures = request.pictures
    latents = request.start_latents
    if latents is None and pictures is not None:
        latents = vae.encode(pictures.pixels, noise, shape)
    gaussians = request.gaussians
    if gaussians is None:
        gaussians = np.stack([member.randn(shape) for member in noise.members])
    if request.variation_seeds:
        others = [make_generator(s, request.seed_device).randn(shape) for s in request.variation_seeds]
        gaussians = turned(gaussians, np.stack(others), request.variation)
    if request.told is not None:
        told = tell(bundle, request.told, noise.members, request.width, request.height)
        conditionings = [c.told(arrays) for c, arrays in zip(conditionings, told, strict=True)]
    blends: list[Blend | None] = [None] * request.images
    if pictures is not None and pictures.masks is not None and latents is not None:
        if vae.samples:
            noise.draw_for_pictures(len(pictures.pixels), shape)  # diffusers encodes the masked picture too
        latents = bundle.model.latents_to_keep(latents, bundle.component("vae_encoder").config)
        masks = np.broadcast_to(pictures.masks, (request.images, *pictures.masks.shape[1:]))
        blends = [make_blend(request.program, *kept) for kept in zip(masks, latents, gaussians, strict=True)]
    return Prepared(
        request=request,
        samplings=tuple(
            Sampling(program=request.program, noise=n, conditioning=c, guidance=request.guidance, blend=b)
            for n, c, b in zip(noise.members, conditionings, blends, strict=True)
        ),
        gaussians=gaussians,
        latents=latents,
        truncated=truncated,
        text_ms=1e3 * (encoded - began),
        encode_image_ms=1e3 * (time.perf_counter() - encoded),
    )


def latent_shape(bundle: Bundle, request: Request) -> Shape:
    """(C, h, w) of the request's latents, or of clips (F, C, h, w)."""
    latent = bundle.latent
    frames = () if request.clip is None else (request.clip.frames,)
    return *frames, latent.channels, request.height // latent.factor, request.width // latent.factor


def condition(
    bundle: Bundle, text: TextEncoders, prompts: ImagePrompts, request: Request, loras: LoraLibrary | None = None
) -> tuple[list[Conditioning], tuple[bool, ...]]:
    """What the UNet is told of each image, and whether its prompts were cut.

    A negative prompt that was not given is the empty prompt; in families that say so (`force_zeros_for_empty_prompt`)
    it is zeros, as in diffusers. loras: where those that images ask for are; they change what reads either prompt.
    """
    wording, two_rows = request.wording, request.guided and not bundle.guidance_embedding
    positives, negatives = list(wording.positives), list(wording.negatives) if two_rows else []
    changes = [{} if not asked or loras is None else loras.changes(asked) for asked in wording.loras]
    texts = [*positives, *(n or _empty_like(p) for n, p in zip(negatives, positives, strict=False))]
    texts = [
        replace(p, loras=asked) if isinstance(p, Prompt) and change.keys() - {"unet"} else p
        for p, asked, change in zip(texts, [*wording.loras, *wording.loras], [*changes, *changes], strict=False)
    ]
    embeddings = _encoded(text, [request.runs(p) for p in texts])
    tokens = common_length([e.tokens for runs in embeddings for _, e in runs], MOST_TOKENS)
    of_negatives: Sequence[Runs | None] = embeddings[request.images :] or [None] * request.images
    guidance: Arrays = {}
    if bundle.guidance_embedding:
        guidance = {GUIDANCE_INPUT: guidance_embedding(request.guidance, bundle.guidance_embedding)}
    sizes, negative_sizes = request.sizes
    *_, height, width = latent_shape(bundle, request)
    neutral = neutral_arrays(bundle, {"height": height, "width": width})
    shown = prompts.tell(request.image_prompt) or [({}, {})] * request.images
    conditionings, truncated = [], []
    images = zip(embeddings, of_negatives, wording.negatives, changes, strict=False)
    for i, (positive, negative, asked, change) in enumerate(images):
        truncated.append(any(e.truncated for runs in (positive, negative or ()) for _, e in runs))
        if negative is not None and asked is None and bundle.force_zeros:
            negative = [(first, e.zeros()) for first, e in negative]
        told, told_negative, steps = tell_controls(request.controls, i)
        told, other = told | shown[i][0], {**neutral, **told_negative, **shown[i][1]}
        rest, other_rest = {**sizes, **guidance, **neutral, **told}, {**negative_sizes, **guidance, **other}
        first, *later = [
            Retold(
                first=at,
                positive={**_run_at(positive, at).arrays, **rest},
                negative=None if negative is None else {**_run_at(negative, at).arrays, **other_rest},
            )
            for at in sorted({at for runs in (positive, negative or ()) for at, _ in runs})
        ]
        conditionings.append(
            Conditioning(
                positive=first.positive,
                negative=first.negative,
                tokens=tokens,
                change=change.get("unet"),
                steps=steps,
                later=tuple(later),
            )
        )
    return conditionings, tuple(truncated)


def _encoded(text: TextEncoders, texts: Sequence[Sequence[tuple[int, Prompt | Embedding]]]) -> list[Runs]:
    """Prompts by first evaluation as embeddings, all of them encoded together."""
    encoded = iter(text.encode([p for runs in texts for _, p in runs if isinstance(p, Prompt)]))
    return [[(first, next(encoded) if isinstance(p, Prompt) else p) for first, p in runs] for runs in texts]


def _run_at(runs: Runs, position: int) -> Embedding:
    """The embedding that is told at an evaluation."""
    return next(e for first, e in reversed(runs) if first <= position)


def _empty_like(positive: Prompt | Embedding) -> Prompt:
    """The empty prompt, read as the prompt is."""
    if isinstance(positive, Embedding) or positive.syntax == "plain":
        return Prompt(text="")
    return Prompt(text="", syntax=positive.syntax, long=positive.long, clip_skip=positive.clip_skip)
