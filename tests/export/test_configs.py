"""Configurations in one form: the libraries' defaults, stated again, and what must not change a graph's key."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    AutoencoderTiny,
    UNet2DConditionModel,
    UNetSpatioTemporalConditionModel,
)
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from fewstep.export.checkpoint.configs import (
    CLIP_UNET_DEFAULTS,
    CLIP_VAE_DEFAULTS,
    IGNORED,
    T5_DEFAULTS,
    TEXT_DEFAULTS,
    TINY_DEFAULTS,
    UNET_DEFAULTS,
    VAE_DEFAULTS,
    canonical_config,
)
from fewstep.export.trace.graphs import graph_key
from fewstep.export.trace.modules import UpcastAttention
from transformers import CLIPTextConfig, T5Config


@pytest.mark.parametrize(
    ("cls", "stated"),
    [
        *[(UNet2DConditionModel, UNET_DEFAULTS), (AutoencoderKL, VAE_DEFAULTS), (AutoencoderTiny, TINY_DEFAULTS)],
        (UNetSpatioTemporalConditionModel, CLIP_UNET_DEFAULTS),
        (AutoencoderKLTemporalDecoder, CLIP_VAE_DEFAULTS),
    ],
    ids=["unet", "vae", "tiny", "clips-unet", "clips-vae"],
)
def test_defaults_are_diffusers_own(cls: Any, stated: dict[str, Any]) -> None:
    theirs = {k: p.default for k, p in inspect.signature(cls.__init__).parameters.items() if k != "self"}
    assert set(theirs) - IGNORED == set(stated)
    for name, value in stated.items():
        assert (list(theirs[name]) if isinstance(theirs[name], tuple) else theirs[name]) == value, name


def test_defaults_are_transformers_own() -> None:
    theirs = CLIPTextConfig().to_dict()
    assert {k: theirs[k] for k in TEXT_DEFAULTS} == TEXT_DEFAULTS


def test_t5s_defaults_are_transformers_own() -> None:
    theirs = T5Config().to_dict()
    assert {k: theirs[k] for k in T5_DEFAULTS} == T5_DEFAULTS


def test_a_key_does_not_depend_on_the_writer() -> None:
    """SD 1.5's configuration as the first checkpoints state it, and as diffusers writes it today."""
    old = {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.6.0",
        "act_fn": "silu",
        "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280],
        "center_input_sample": False,
        "cross_attention_dim": 768,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "in_channels": 4,
        "layers_per_block": 2,
        "norm_eps": 1e-05,
        "sample_size": 64,
    }
    new = {**UNET_DEFAULTS, **old, "_name_or_path": "somewhere", "dropout": 0.0, "_diffusers_version": "0.42.1"}
    assert graph_key("unet", old, "float16") == graph_key("unet", new, "float16")
    for key, value in (("time_cond_proj_dim", 256), ("attention_head_dim", [5, 10, 20, 20]), ("surprise", 1)):
        assert graph_key("unet", {**old, key: value}, "float16") != graph_key("unet", old, "float16")


def test_classes_whose_defaults_are_others_have_keys_of_their_own() -> None:
    clips = {"_class_name": "UNetSpatioTemporalConditionModel", "num_frames": 14, "sample_size": 96}
    stated = {**clips, **CLIP_UNET_DEFAULTS, "num_frames": 25}
    assert graph_key("unet", clips, "float16") != graph_key("unet", {}, "float16")
    assert graph_key("unet", stated, "float16") == graph_key("unet", clips, "float16"), "a graph takes any frames"
    decoder = {"_class_name": "AutoencoderKLTemporalDecoder"}
    assert graph_key("vae_decoder", decoder, "float32") != graph_key("vae_decoder", {}, "float32")


def test_a_text_encoders_key_keeps_what_matters() -> None:
    config = {**TEXT_DEFAULTS, "_class": "CLIPTextModel", "_layer": 0}
    key = graph_key("text_encoder", config, "float32")
    noise = {"torch_dtype": "float16", "transformers_version": "4.2", "eos_token_id": 2, "projection_dim": 7}
    assert graph_key("text_encoder", {**config, **noise}, "float32") == key
    assert graph_key("text_encoder", {**config, "hidden_act": "gelu"}, "float32") != key
    projected = {**config, "_class": "CLIPTextModelWithProjection"}
    assert canonical_config("text_encoder_2", {**projected, "eos_token_id": 2}, "float32")["eos_token_id"] == 2


def test_upcasting_is_part_of_lower_precisions_only() -> None:
    plain, upcast = UNET_DEFAULTS, {**UNET_DEFAULTS, "upcast_attention": True}
    assert graph_key("unet", plain, "float32") == graph_key("unet", upcast, "float32")
    assert graph_key("unet", plain, "float16") != graph_key("unet", upcast, "float16")


def test_upcast_attention_is_the_same_function_without_the_overflow() -> None:
    torch.manual_seed(0)
    attention = Attention(32, cross_attention_dim=24, heads=4, dim_head=8).eval()
    x, context = torch.randn(2, 20, 32), torch.randn(2, 7, 24)
    with torch.no_grad():
        expected = AttnProcessor2_0()(attention, x, context)
        torch.testing.assert_close(UpcastAttention()(attention, x, context), expected)
        for linear in (attention.to_q, attention.to_k):
            linear.weight *= 400.0  # products of thousands: beyond float16's largest number
        exact = AttnProcessor2_0()(attention, x, context)
        low = UpcastAttention()(attention.half(), x.half(), context.half())
    assert low.dtype == torch.float16
    torch.testing.assert_close(low.float(), exact, atol=0.02, rtol=0.02)
