"""Configurations of diffusers' and transformers' networks: what each key may hold, wherever it is read.

The bounds are far above any published network; what lies beyond would be built until memory or patience ends. Keys
that are not listed decide nothing here and may hold anything.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from ..values import Reader
from .control import CONTROL_CLASSES, CONTROLS, MOST_CONTROLS, is_control_name
from .decoders import TINY_DECODER
from .image_prompt import ADAPTER_KEYS, IMAGE_ENCODER, IP_ADAPTER, KINDS, PROJECTION

MOST_LEVELS = 16
MOST_WIDTH = 65_536
MOST_LAYERS = 256
MOST_CELLS = 16_384
"""Of a latent's side: no request takes more pixels."""

Check = Callable[[Reader, str, Any], object]


def _integer(low: int, high: int, *, null: bool = False) -> Check:
    return lambda r, k, v: None if null and v is None else r.integer(k, v, low, high)


def _number(low: float, high: float, *, null: bool = False) -> Check:
    return lambda r, k, v: None if null and v is None else r.number(k, v, low, high)


def _word(*, null: bool = False) -> Check:
    return lambda r, k, v: None if null and v is None else r.text(k, v, _WORD, most=64)


def _flag(reading: Reader, key: str, value: Any) -> None:
    if value is not None:  # as diffusers writes flags that were never set
        reading.flag(key, value)


def _some(low: int, high: int, *, null: bool = False) -> Check:
    """An integer, or a list of them, one a level, which may be lists themselves."""

    def check(reading: Reader, key: str, value: Any) -> None:
        if value is None and null:
            return
        if not isinstance(value, (list, tuple)):
            reading.integer(key, value, low, high)
            return
        for inner in reading.array(key, value, 1, MOST_LEVELS):
            for entry in reading.array(key, inner, 1, MOST_LEVELS) if isinstance(inner, (list, tuple)) else [inner]:
                reading.integer(key, entry, low, high)

    return check


def _integers(low: int, high: int) -> Check:
    return lambda r, k, v: [r.integer(k, i, low, high) for i in r.array(k, v, 1, MOST_LEVELS)]


def _words(reading: Reader, key: str, value: Any) -> None:
    for entry in reading.array(key, value, 1, MOST_LEVELS):
        reading.text(key, entry, _WORD, most=64)


def _side(reading: Reader, key: str, value: Any) -> None:
    if value is None:
        return
    sides = reading.array(key, value, 2, 2) if isinstance(value, (list, tuple)) else [value]
    for side in sides:
        reading.integer(key, side, 1, MOST_CELLS)


def _statistics(reading: Reader, key: str, value: Any) -> None:
    if value is not None:
        for entry in reading.array(key, value, 1, MOST_WIDTH):
            reading.number(key, entry)


def _factor(reading: Reader, key: str, value: Any) -> None:
    if not 1e-6 <= abs(reading.number(key, value)) <= 1e6:
        raise reading.wrong(key, value, "a finite number but 0")


def _projection(reading: Reader, key: str, value: Any) -> None:
    for name, number in reading.mapping(key, value).items():
        if name == "kind":
            reading.choice(f"kind of {key}", number, KINDS)
        else:
            reading.integer(f"{name} of {key}", number, 1, 2**20)


_WORD = re.compile(r"[A-Za-z0-9_.-]+")
_WIDTH, _MAYBE_WIDTH = _integer(1, MOST_WIDTH), _integer(1, MOST_WIDTH, null=True)
_SHARED: dict[str, Check] = {
    "_class_name": _word(),
    "act_fn": _word(),
    "in_channels": _WIDTH,
    "out_channels": _WIDTH,
    "norm_num_groups": _MAYBE_WIDTH,
    "block_out_channels": _integers(1, MOST_WIDTH),
    "down_block_types": _words,
    "up_block_types": _words,
    "layers_per_block": _some(1, MOST_LAYERS),
    "sample_size": _side,
    "dropout": _number(0.0, 1.0),
}
UNET: dict[str, Check] = {
    **_SHARED,
    "cross_attention_dim": _some(1, MOST_WIDTH),
    "attention_head_dim": _some(1, MOST_WIDTH, null=True),
    "num_attention_heads": _some(1, MOST_WIDTH, null=True),
    "transformer_layers_per_block": _some(0, MOST_LAYERS),
    "reverse_transformer_layers_per_block": _some(0, MOST_LAYERS, null=True),
    "mid_block_type": _word(null=True),
    "time_embedding_type": _word(),
    "resnet_time_scale_shift": _word(),
    "addition_embed_type": _word(null=True),
    "addition_embed_type_num_heads": _WIDTH,
    "class_embed_type": _word(null=True),
    "cross_attention_norm": _word(null=True),
    "encoder_hid_dim": _MAYBE_WIDTH,
    "encoder_hid_dim_type": _word(null=True),
    "time_embedding_act_fn": _word(null=True),
    "time_cond_proj_dim": _integer(4, MOST_WIDTH, null=True),
    "time_embedding_dim": _MAYBE_WIDTH,
    "addition_time_embed_dim": _MAYBE_WIDTH,
    "projection_class_embeddings_input_dim": _integer(1, 2**20, null=True),
    "conv_in_kernel": _integer(1, 31),
    "conv_out_kernel": _integer(1, 31),
    "downsample_padding": _integer(0, 31),
    "freq_shift": _integer(0, 1),
    "norm_eps": _number(0.0, 1.0),
    "num_frames": _integer(1, 1024),
    "mid_block_scale_factor": _number(0.0, 1e6),
    "resnet_out_scale_factor": _number(0.0, 1e6),
    "use_linear_projection": _flag,
    "upcast_attention": _flag,
    "flip_sin_to_cos": _flag,
    "center_input_sample": _flag,
    "dual_cross_attention": _flag,
    "resnet_skip_time_act": _flag,
}
CONTROLNET: dict[str, Check] = {
    **UNET,
    "conditioning_channels": _integer(1, 64),
    "conditioning_embedding_out_channels": _integers(1, MOST_WIDTH),
    "controlnet_conditioning_channel_order": _word(),
    "global_pool_conditions": _flag,
    "adapter_type": _word(),
    "channels": _integers(1, MOST_WIDTH),
    "num_res_blocks": _integer(1, MOST_LAYERS),
    "downscale_factor": _integer(1, 256),
}
VAE: dict[str, Check] = {
    **_SHARED,
    "latent_channels": _WIDTH,
    "scaling_factor": _factor,
    "shift_factor": _number(-1e6, 1e6, null=True),
    "latents_mean": _statistics,
    "latents_std": _statistics,
    "force_upcast": _flag,
    "mid_block_add_attention": _flag,
    "use_quant_conv": _flag,
    "use_post_quant_conv": _flag,
    "encoder_block_out_channels": _integers(1, MOST_WIDTH),
    "decoder_block_out_channels": _integers(1, MOST_WIDTH),
    "num_encoder_blocks": _integers(1, MOST_LAYERS),
    "num_decoder_blocks": _integers(1, MOST_LAYERS),
    "latent_magnitude": _number(-1e6, 1e6),
    "latent_shift": _number(-1e6, 1e6),
    "upsample_fn": _word(),
    "upsampling_scaling_factor": _integer(1, 16),
}
TEXT: dict[str, Check] = {
    "hidden_act": _word(),
    "hidden_size": _WIDTH,
    "intermediate_size": _integer(1, 2**20),
    "num_hidden_layers": _integer(1, MOST_LAYERS),
    "num_attention_heads": _WIDTH,
    "max_position_embeddings": _integer(3, 2**16),
    "vocab_size": _integer(1, 2**24),
    "projection_dim": _WIDTH,
    "layer_norm_eps": _number(0.0, 1.0),
    "d_model": _WIDTH,
    "d_kv": _WIDTH,
    "d_ff": _integer(1, 2**20),
    "num_layers": _integer(1, MOST_LAYERS),
    "num_heads": _WIDTH,
    "relative_attention_num_buckets": _integer(4, 2**12),
    "relative_attention_max_distance": _integer(4, 2**16),
    "feed_forward_proj": _word(),
    "layer_norm_epsilon": _number(0.0, 1.0),
    "eos_token_id": _integer(0, 2**24, null=True),
    "use_attention_mask": _flag,
    "_class": _word(),
    "_layer": _integer(0, MOST_LAYERS),
}
VISION: dict[str, Check] = {
    **{k: TEXT[k] for k in ("hidden_act", "hidden_size", "intermediate_size", "num_hidden_layers", "layer_norm_eps")},
    **{k: TEXT[k] for k in ("num_attention_heads", "projection_dim")},
    "num_channels": _integer(1, 64),
    "image_size": _integer(1, MOST_CELLS),
    "patch_size": _integer(1, MOST_CELLS),
    PROJECTION: _projection,
}


def check_config(kind: str, config: Mapping[str, Any], reading: Reader) -> None:
    """Raise the reading's error for a value that a part's or component's configuration cannot have.

    kind: the part's or component's name; what has no table here and is of no VAE is a text encoder.
    """
    table = _TABLES.get(kind) or (VAE if kind.startswith("vae") or kind == TINY_DECODER else TEXT)
    for key, value in config.items():
        if key in table:
            table[key](reading, key, value)
    if kind == "unet" and config.get(CONTROLS) is not None:
        _check_controls(reading, config[CONTROLS])
    if kind == "unet" and config.get(IP_ADAPTER) is not None:
        stated = reading.mapping(IP_ADAPTER, config[IP_ADAPTER])
        for key in ADAPTER_KEYS:
            reading.integer(f"{key} of {IP_ADAPTER}", stated.get(key), 1, MOST_WIDTH)


_TABLES = {"unet": UNET, "controlnet": CONTROLNET, IMAGE_ENCODER: VISION}


def _check_controls(reading: Reader, controls: Any) -> None:
    """The networks beside a UNet, by names that its inputs can have."""
    for name, config in reading.mapping(CONTROLS, controls).items():
        if not is_control_name(name) or len(controls) > MOST_CONTROLS:
            raise reading.wrong(CONTROLS, sorted(controls), f"at most {MOST_CONTROLS} names like canny")
        own = reading.mapping(f"the control {name}", config)
        class_name = reading.choice(f"the control {name}'s _class_name", own.get("_class_name"), tuple(CONTROL_CLASSES))
        missing = [k for k in CONTROL_CLASSES[class_name] if not own.get(k)]
        if missing:
            raise reading.wrong(f"the control {name}", f"nothing of {', '.join(missing)}", "what its checkpoint states")
        check_config("controlnet", own, reading)
