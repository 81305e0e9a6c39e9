"""Whether what a manifest states of a bundle agrees: its graphs' tensors with its latent, its family and each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from .families import Family
from .families.base import GUIDANCE_INPUT
from .families.decoders import DECODERS
from .families.image_prompt import IMAGE_ENCODER, IP_ADAPTER
from .tensors import TensorSpec
from .values import Reader

CLIP_SKIP, ATTENTION_MASK = "clip_skip", "attention_mask"
VARIANCE = "variance"
"""The output of a UNet that says its variance, float32 [R, C, h, w]: -1 is the least of a step, 1 the greatest."""


class Stated(Protocol):
    """A component as a manifest states it."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def config(self) -> Mapping[str, Any]: ...


def check_graphs(
    components: Mapping[str, Stated], model: Family, latent: tuple[int, int, int], guidance: int, reading: Reader
) -> None:
    """Raise the reading's error where a component's inputs and outputs are not what the runtime feeds and takes.

    latent: its channels, pixels per cell, and frames. guidance: the width of the guidance's embedding, 0 for none.
    """
    channels, factor, frames = latent
    cells, pixels = (channels, "height", "width"), (f"height*{factor}", f"width*{factor}")
    picture = (3, *pixels)
    encoders = [e.name for e in model.text_encoders if e.name in components]
    _check_unet(components["unet"], model, (*(("frames",) if frames else ()), *cells), guidance, reading)
    if frames != (stated := model.frames(components["unet"].config)):
        raise reading.wrong("the latent's frames", frames, f"{stated}, as the unet's configuration says")
    for name in encoders:
        encoder, ids = components[name], {"input_ids": ("prompts", None)}
        more = {CLIP_SKIP: (1,), ATTENTION_MASK: ("prompts", None)}
        _match(name, "inputs", encoder.inputs, ids, reading, more=more)
        hidden, pooled = {"hidden": ("prompts", None, None)}, {"pooled": ("prompts", None)}
        _match(name, "outputs", encoder.outputs, hidden, reading, more=pooled)
    rows = model.decoder_rows
    for name in DECODERS.values():
        if name in components:
            images = {"image": (rows, *pixels, 3), "finite": (rows,)}
            _match(name, "inputs", components[name].inputs, {"latent": (rows, *cells)}, reading)
            _match(name, "outputs", components[name].outputs, images, reading)
    if IMAGE_ENCODER in components:
        _check_image_encoder(components[IMAGE_ENCODER], components["unet"], model, reading)
    if "vae_encoder" in components:
        vae, moments = components["vae_encoder"], ("batch", *cells)
        _match("vae_encoder", "inputs", vae.inputs, {"image": ("batch", *picture)}, reading)
        _match("vae_encoder", "outputs", vae.outputs, {"mean": moments, "std": moments}, reading)


def _check_unet(unet: Stated, model: Family, cells: tuple[Any, ...], guidance: int, reading: Reader) -> None:
    if "cross_attention_dim" not in unet.config:
        raise reading.wrong("the unet's config", dict(unet.config), "a UNet's configuration with cross_attention_dim")
    conditions = {c.name: ("rows", *c.shape) for c in model.conditions(unet.config)}
    width = conditions[GUIDANCE_INPUT][-1] if GUIDANCE_INPUT in conditions else 0
    if guidance != width:
        raise reading.wrong("guidance_embedding", guidance, f"{width}, as the unet's configuration says")
    inputs = {"sample": ("rows", *cells), "timestep": ("rows",), **conditions}
    _match("unet", "inputs", unet.inputs, inputs, reading)
    said = {VARIANCE: ("rows", *cells)} if model.says_variance(unet.config) else {}
    _match("unet", "outputs", unet.outputs, {"out": ("rows", *cells), **said}, reading)


def _check_image_encoder(encoder: Stated, unet: Stated, model: Family, reading: Reader) -> None:
    """As a clip's picture is encoded, in families that have one; or a picture as prompt, for an IP-Adapter."""
    stated = unet.config.get(IP_ADAPTER)
    side = encoder.config.get("image_size")
    pixels = {"pixels": ("batch", 3, side, side)}
    _match(IMAGE_ENCODER, "inputs", encoder.inputs, pixels, reading)
    if model.image_encoder is not None:
        hidden = {"hidden": ("batch", *model.conditions(unet.config)[0].shape)}
        _match(IMAGE_ENCODER, "outputs", encoder.outputs, hidden, reading)
        return
    if not stated:
        raise reading.wrong(f"the {IMAGE_ENCODER}", "there", f"a unet whose config has {IP_ADAPTER}")
    tokens = ("batch", stated["tokens"], stated["width"])
    _match(IMAGE_ENCODER, "outputs", encoder.outputs, {"tokens": tokens, "negative": tokens}, reading)


def check_tokenizers(
    components: Mapping[str, Stated],
    encoders: Sequence[str],
    tokenizers: Sequence[tuple[int, Mapping[str, int]]],
    reading: Reader,
) -> None:
    """Raise the reading's error for lengths and ids that the text encoders do not take.

    tokenizers: of each its length, and ids by what they are for.
    """
    ids = {n: next((s for s in components[n].inputs if s.name == "input_ids"), None) for n in encoders}
    lengths = [s.shape[-1] if s is not None and s.shape else None for s in ids.values()]
    stated = [length for length, _ in tokenizers]
    if stated != lengths:
        raise reading.wrong("the tokenizers' lengths", stated, f"{lengths}, as the text encoders take")
    for name, (_, named) in zip(encoders, tokenizers, strict=True):
        known = components[name].config.get("vocab_size")
        for what, token in named.items():
            if known is not None and token >= known:
                raise reading.wrong(f"a tokenizer's {what}", token, f"a token of {name}, which has {known}")


def _match(
    component: str,
    side: str,
    specs: Sequence[TensorSpec],
    expected: Mapping[str, tuple[int | str | None, ...]],
    reading: Reader,
    more: Mapping[str, tuple[int | str | None, ...]] | None = None,
) -> None:
    """Names, and shapes in which `None` is any size; `more`: what may be there besides."""
    known = {**expected, **(more or {})}
    shapes = {s.name: s.shape for s in specs}
    if len(shapes) != len(specs) or not expected.keys() <= shapes.keys() <= known.keys():
        raise reading.wrong(f"the {component}'s {side}", [s.name for s in specs], ", ".join(expected))
    for name, found in shapes.items():
        shape = known[name]
        if len(found) != len(shape) or any(w not in (None, f) for f, w in zip(found, shape, strict=True)):
            raise reading.wrong(
                f"the {component}'s {name}", list(found), f"{['any' if w is None else w for w in shape]}"
            )
