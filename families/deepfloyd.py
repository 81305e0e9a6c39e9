"""DeepFloyd-IF: a network that makes pictures in pixels of T5's text, and one that makes them large.

After Imagen, Saharia et al. 2022, arXiv 2205.11487. The UNets' attention reads the text beside their own pixels, so
that a text that is repeated is another text: it has the one length that their pipelines give it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .base import Condition, Config, Family, FamilyPart, Float32, TextEncoder, latent_multiple, register_family
from .t5 import T5, T5_KEYS, loaded_t5

TOKENS = 77
NOISE_LEVEL = 250
"""Of the picture that a network is told of, where a call says none: a timestep of its own noise schedule."""
_PICTURE, _LEVEL = "low_resolution", "class_labels"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepFloyd(Family):
    """See the module; both its stages say their variance."""

    def clean(self, text: str) -> str:
        """As `_text_preprocessing` of diffusers' pipelines does without bs4 and ftfy."""
        return text.lower().strip()

    def loaded_text(self, config: Config) -> dict[str, Any]:
        return loaded_t5(config, TOKENS)

    def part_refusal(self, name: str, config: Config) -> str | None:
        if name != "unet":
            return None
        if config.get("class_embed_type") not in (None, "timestep"):
            return f"takes classes of another kind (class_embed_type {config['class_embed_type']!r})"
        if config.get("encoder_hid_dim_type") not in (None, "text_proj"):
            return f"takes other states than a text's (encoder_hid_dim_type {config['encoder_hid_dim_type']!r})"
        return None

    def latent_channels(self, unet: Config) -> int:
        """Half of a UNet's channels are those of the picture that it is told of."""
        return int(unet["in_channels"]) // (2 if self.pictures == "told" else 1)

    def conditions(self, unet: Config) -> tuple[Condition, ...]:
        width = unet.get("encoder_hid_dim") or unet["cross_attention_dim"]
        hidden = Condition(
            name="encoder_hidden_states",
            shape=(TOKENS, width if isinstance(width, int) else width[0]),
            argument="prompt_embeds",
        )
        if self.pictures != "told":
            return (hidden,)
        picture = Condition(name=_PICTURE, shape=(self.latent_channels(unet), "height", "width"), joined=True)
        level = Condition(name=_LEVEL, shape=(), example=(float(NOISE_LEVEL),))
        return (hidden, picture, *((level,) if unet.get("class_embed_type") else ()))

    def tell_picture(
        self, unet: Config, picture: Float32, noise: Float32, level: int, alpha_bar: float
    ) -> dict[str, Float32]:
        """The picture with noise in it, and how much: sqrt(alpha_bar) z + sqrt(1 - alpha_bar) n, of that level."""
        signal, rest = np.float32(alpha_bar) ** np.float32(0.5), np.float32(1.0 - alpha_bar) ** np.float32(0.5)
        told = {_PICTURE: np.asarray(signal * picture + rest * noise, np.float32)}
        return {**told, **({_LEVEL: np.array(level, np.float32)} if unet.get("class_embed_type") else {})}

    def geometry(self, unet: Config, vae: Config) -> tuple[int, int, int]:
        return self.latent_channels(unet), 1, latent_multiple(unet)


_SHARED: dict[str, Any] = {
    "text_encoders": (
        TextEncoder(name="text_encoder", tokenizer="tokenizer", part=FamilyPart(classes={T5: T5_KEYS}), one_pass=True),
    ),
    "vae": None,
    "addition_types": ("text",),
    "learned_variance": True,
    "schedule": "ays_deepfloyd",
}
_OPTIONS = ("encoder_hid_dim", "encoder_hid_dim_type")

register_family(
    DeepFloyd(
        name="if",
        title="DeepFloyd-IF",
        pipelines=("IFPipeline",),
        unet_options=_OPTIONS,
        pictures="none",
        steps=100,
        guidance=7.0,
        **_SHARED,
    )
)
register_family(
    DeepFloyd(
        name="if-sr",
        title="DeepFloyd-IF's second stage",
        pipelines=("IFSuperResolutionPipeline",),
        unet_options=(*_OPTIONS, "class_embed_type"),
        pictures="told",
        noise_level=NOISE_LEVEL,
        steps=50,
        guidance=4.0,
        **_SHARED,
    )
)
