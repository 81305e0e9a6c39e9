"""Configurations in one form: what changes a component's graph, and nothing else.

Libraries of different ages write a configuration with more or fewer of its defaults. A graph's key must not depend on
that, and must be found without loading them; so their defaults are stated here, and a test compares them with the
installed libraries'.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...families.base import VAE_SCALING
from ...families.control import CONTROLS
from ...families.image_prompt import IMAGE_ENCODER, PROJECTION
from ...families.pixels import PIXELS
from ...families.t5 import T5

UNET_DEFAULTS: dict[str, Any] = {
    "act_fn": "silu",
    "addition_embed_type": None,
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": None,
    "attention_head_dim": 8,
    "attention_type": "default",
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_dim": 1280,
    "cross_attention_norm": None,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": None,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": 1,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "upcast_attention": False,
    "use_linear_projection": False,
}
VAE_DEFAULTS: dict[str, Any] = {
    "act_fn": "silu",
    "block_out_channels": [64],
    "down_block_types": ["DownEncoderBlock2D"],
    "in_channels": 3,
    "latent_channels": 4,
    "latents_mean": None,
    "latents_std": None,
    "layers_per_block": 1,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "out_channels": 3,
    "scaling_factor": VAE_SCALING,
    "shift_factor": None,
    "up_block_types": ["UpDecoderBlock2D"],
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
SPATIO_TEMPORAL, TEMPORAL_DECODER = "UNetSpatioTemporalConditionModel", "AutoencoderKLTemporalDecoder"
CLIP_UNET_DEFAULTS: dict[str, Any] = {
    "addition_time_embed_dim": 256,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 1024,
    "down_block_types": [*["CrossAttnDownBlockSpatioTemporal"] * 3, "DownBlockSpatioTemporal"],
    "in_channels": 8,
    "layers_per_block": 2,
    "num_attention_heads": [5, 10, 20, 20],
    "out_channels": 4,
    "projection_class_embeddings_input_dim": 768,
    "transformer_layers_per_block": 1,
    "up_block_types": ["UpBlockSpatioTemporal", *["CrossAttnUpBlockSpatioTemporal"] * 3],
}
CLIP_VAE_DEFAULTS: dict[str, Any] = {
    "block_out_channels": [64],
    "down_block_types": ["DownEncoderBlock2D"],
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "out_channels": 3,
    "scaling_factor": VAE_SCALING,
}
TINY_DEFAULTS: dict[str, Any] = {
    "act_fn": "relu",
    "decoder_block_out_channels": [64, 64, 64, 64],
    "encoder_block_out_channels": [64, 64, 64, 64],
    "in_channels": 3,
    "latent_channels": 4,
    "latent_magnitude": 3,
    "latent_shift": 0.5,
    "num_decoder_blocks": [3, 3, 3, 1],
    "num_encoder_blocks": [1, 3, 3, 3],
    "out_channels": 3,
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
    "upsample_fn": "nearest",
    "upsampling_scaling_factor": 2,
}
"""`AutoencoderTiny`, whose defaults are the published tiny autoencoders' own configuration."""
TEXT_DEFAULTS: dict[str, Any] = {
    "eos_token_id": 49407,
    "hidden_act": "quick_gelu",
    "hidden_size": 512,
    "intermediate_size": 2048,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 77,
    "num_attention_heads": 8,
    "num_hidden_layers": 12,
    "projection_dim": 512,
    "vocab_size": 49408,
}
T5_DEFAULTS: dict[str, Any] = {
    "d_ff": 2048,
    "d_kv": 64,
    "d_model": 512,
    "feed_forward_proj": "relu",
    "layer_norm_epsilon": 1e-6,
    "num_heads": 8,
    "num_layers": 6,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "vocab_size": 32128,
}
VISION_DEFAULTS: dict[str, Any] = {
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "image_size": 224,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-5,
    "num_attention_heads": 12,
    "num_channels": 3,
    "num_hidden_layers": 12,
    "patch_size": 32,
    "projection_dim": 512,
}
IGNORED = {
    "_class_name",
    "_commit_hash",
    "_diffusers_version",
    "_name_or_path",
    "_use_default_values",
    "dropout",
    "force_upcast",
    "num_frames",
    "sample_size",
}
"""Keys of diffusers' configurations that leave a graph as it is."""
_OF_CLASSES = {
    "AutoencoderTiny": TINY_DEFAULTS,
    SPATIO_TEMPORAL: CLIP_UNET_DEFAULTS,
    TEMPORAL_DECODER: CLIP_VAE_DEFAULTS,
}
"""Classes whose defaults are not those of UNets and VAEs of pictures; they are named in a graph's key."""
_POOLED_ONLY = {"eos_token_id", "projection_dim"}


def canonical_config(kind: str, config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """What of a configuration decides the graph of a component in a precision: no defaults, no remarks.

    A text encoder's configuration is cut down to the keys of `TEXT_DEFAULTS` or `T5_DEFAULTS`, because transformers
    writes many that have no meaning for it, and to `_class` and `_layer` of ours. Unknown keys of the other kinds are
    kept.
    """
    if kind.startswith("text_encoder") and config.get("_class") == T5:
        stated = {k: config.get(k, v) for k, v in T5_DEFAULTS.items()}
        return {**stated, "_class": T5, "_length": config["max_position_embeddings"]}
    if kind.startswith("text_encoder"):
        named = {k: config.get(k, v) for k, v in TEXT_DEFAULTS.items()}
        if config.get("_class") != "CLIPTextModelWithProjection":
            named = {k: v for k, v in named.items() if k not in _POOLED_ONLY}
        return named | {k: config[k] for k in ("_class", "_layer") if k in config}
    if kind == IMAGE_ENCODER:
        stated = {k: config.get(k, v) for k, v in VISION_DEFAULTS.items()}
        return stated | ({PROJECTION: config[PROJECTION]} if PROJECTION in config else {})
    named_class = str(config.get("_class_name"))
    defaults = _OF_CLASSES.get(named_class, UNET_DEFAULTS if kind == "unet" else VAE_DEFAULTS)
    kept: dict[str, Any] = {
        k: list(v) if isinstance(v, tuple) else v
        for k, v in config.items()
        if k not in IGNORED and (v is not None or defaults.get(k) is not None)
    }
    if dtype == "float32":
        kept.pop("upcast_attention", None)  # there is nothing above float32
    if CONTROLS in kept:
        kept[CONTROLS] = {name: _canonical_control(own, dtype) for name, own in kept[CONTROLS].items()}
    named = {k: v for k, v in kept.items() if k not in defaults or v != defaults[k]}
    return named | ({"_class": named_class} if named_class in {*_OF_CLASSES, PIXELS} else {})


def _canonical_control(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The same of a network beside a UNet, with its class."""
    dropped = IGNORED - {"_class_name"} | ({"upcast_attention"} if dtype == "float32" else set())
    kept = {k: v for k, v in config.items() if k not in dropped and v is not None}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()}


def is_tiny(config: Mapping[str, Any]) -> bool:
    """Whether a VAE's configuration is that of a tiny autoencoder."""
    return config.get("_class_name") == "AutoencoderTiny"


def vae_factor(config: Mapping[str, Any]) -> int:
    """Pixels per latent cell: each block but the last halves."""
    blocks = config["encoder_block_out_channels" if is_tiny(config) else "block_out_channels"]
    return 2 ** (len(blocks) - 1)
