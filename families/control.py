"""Networks that look at a picture beside a UNet and are traced with it as one graph: ControlNets and T2I adapters.

A UNet's configuration then has `_controls`, an object with each one's own configuration by name. Row by row the graph
is given a picture and the factors of what comes of it, so that rows with and without control share an evaluation.
Zhang et al. 2023, arXiv 2302.05543; Mou et al. 2023, arXiv 2302.08453.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from .conditions import Condition, Config

CONTROLS = "_controls"
NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
MOST_CONTROLS = 8
CONTROLNET_KEYS = ("block_out_channels", "in_channels", "cross_attention_dim", "conditioning_embedding_out_channels")
T2I = "T2IAdapter"
XL_ADAPTER = "full_adapter_xl"
"""A T2I adapter of SDXL: two latent cells a step, one level fewer that halves, and a tensor for the middle."""
CONTROL_CLASSES = {"ControlNetModel": CONTROLNET_KEYS, T2I: ("channels", "downscale_factor")}
"""diffusers' classes, each with the keys that its configuration must state."""
FITTING = ("in_channels", "cross_attention_dim", "block_out_channels", "addition_embed_type")
"""Keys in which a ControlNet's configuration is its UNet's."""


def controls_of(unet: Config) -> Mapping[str, Config]:
    """The configurations of the networks beside a UNet, by name, in the order of the names."""
    return dict(sorted((unet.get(CONTROLS) or {}).items()))


def is_control_name(name: str) -> bool:
    """Whether inputs can be named so, none of them like another's."""
    return NAME.fullmatch(name) is not None and not name.endswith("_scale")


def picture_input(name: str) -> str:
    """The input that takes a control's picture, float32 [rows, channels, H, W] from 0 to 1."""
    return f"control_{name}"


def scale_input(name: str) -> str:
    """The input that takes the factors of what a control adds, float32 [rows, residuals]; zeros are no control."""
    return f"control_{name}_scale"


def control_factor(config: Config) -> int:
    """Pixels of a picture per latent cell: each convolution of a ControlNet's embedding but the first halves."""
    if is_t2i(config):
        return int(config["downscale_factor"]) // (2 if is_xl(config) else 1)
    return 1 << (len(config["conditioning_embedding_out_channels"]) - 1)


def is_t2i(config: Config) -> bool:
    return config.get("_class_name") == T2I


def is_xl(config: Config) -> bool:
    """Whether it is an adapter that looks at two cells a step, as SDXL's UNet has them after its first level."""
    return is_t2i(config) and config.get("adapter_type") == XL_ADAPTER


def control_channels(config: Config) -> int:
    if is_t2i(config):
        return int(config.get("in_channels") or 3)
    return int(config.get("conditioning_channels") or 3)


def residuals(config: Config) -> int:
    """How many tensors a ControlNet adds, one a skip connection of its UNet and the middle's; or a T2I adapter."""
    if is_t2i(config):
        return len(config["channels"])
    levels = len(config["block_out_channels"])
    layers = config.get("layers_per_block") or 2
    resnets = levels * layers if isinstance(layers, int) else sum(layers)
    return 1 + resnets + (levels - 1) + 1


def control_conditions(unet: Config) -> Iterator[Condition]:
    """The inputs of a UNet's graph that its controls add, a picture and factors each."""
    for name, config in controls_of(unet).items():
        factor = control_factor(config)
        picture = (control_channels(config), f"height*{factor}", f"width*{factor}")
        yield Condition(name=picture_input(name), shape=picture, adapter=name)
        yield Condition(name=scale_input(name), shape=(residuals(config),), adapter=name)


def misfit(config: Config, unet: Mapping[str, Any], factor: int) -> tuple[str, str] | None:
    """What of a ControlNet is not its UNet's, and what would be; `None` where they belong together.

    factor: pixels per latent cell of the VAE.
    """
    if is_t2i(config):
        own, levels = list(config["channels"]), list(unet["block_out_channels"])
        fitting = [*levels, levels[-1]] if is_xl(config) else levels
        if own != fitting:
            return f"channels {own}", f"{fitting}, as the base's levels"
    for key in () if is_t2i(config) else FITTING:
        theirs, ours = config.get(key), unet.get(key)
        if theirs != ours:
            return f"{key} {theirs}", f"{ours}, the base's"
    if control_factor(config) != factor:
        return f"pictures of {control_factor(config)} pixels a cell", f"{factor}, as the VAE's"
    return None
