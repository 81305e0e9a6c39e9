"""Pictures as prompts: what an IP-Adapter adds to a UNet and to the image encoder in front of it.

A UNet's configuration then has `_ip_adapter`, which says how many tokens a picture becomes and how many attentions take
them; the image encoder's has `_projection`. Ye et al. 2023, arXiv 2308.06721.
"""

from __future__ import annotations

from collections.abc import Iterator

from .conditions import Condition, Config

IP_ADAPTER, PROJECTION = "_ip_adapter", "_projection"
IMAGE_ENCODER = "image_encoder"
"""The component that turns a picture into tokens."""
TOKENS_INPUT, SCALE_INPUT = "ip_tokens", "ip_scale"
ADAPTER_KEYS = ("tokens", "width", "layers")
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_DEVIATION = (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's training pictures, by channel (Radford et al. 2021)."""
VISION_KEYS = ("hidden_size", "image_size", "patch_size", "projection_dim")
PLAIN, PLUS, FULL = KINDS = ("plain", "plus", "full")
"""Kinds of projections: of the image's embedding; of the last hidden states but one, resampled, or each by itself."""


def image_prompt_conditions(unet: Config) -> Iterator[Condition]:
    """The inputs that an IP-Adapter adds: a picture's tokens, and a factor for each attention that takes them."""
    stated = unet.get(IP_ADAPTER)
    if stated:
        yield Condition(name=TOKENS_INPUT, shape=(stated["tokens"], stated["width"]), adapter=IP_ADAPTER)
        yield Condition(name=SCALE_INPUT, shape=(stated["layers"],), adapter=IP_ADAPTER)
