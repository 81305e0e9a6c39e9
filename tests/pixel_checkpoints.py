"""DeepFloyd-IF's checkpoints as the tests make them: tiny random models, and a SentencePiece model trained here."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from checkpoints import randomise
from diffusers import DDPMScheduler, IFPipeline, IFSuperResolutionPipeline, UNet2DConditionModel
from transformers import T5Config, T5EncoderModel, T5Tokenizer

TEXT = [
    "a red circle, hello! 7 stars",
    "a photograph of two blue squares above a green triangle",
    "the quick brown fox jumps over the lazy dog",
    "rings, spheres and cubes of glass in the evening sun",
    "a watercolour of a small house by the river, very detailed",
]
PUNCTUATED = [
    *TEXT,
    "",
    "  A  RED\tcircle\n",
    "Łódź, 東京 №7 x",
    "a <extra_id_3> b </s> c <pad>",
    "word " * 60,
]
"""What a tokenizer is compared on: spaces, capitals, letters that it does not know, its own tokens, too much."""
SHIPPED = {
    "beta_schedule": "squaredcos_cap_v2",
    "variance_type": "learned_range",
    "thresholding": True,
    "dynamic_thresholding_ratio": 0.95,
    "sample_max_value": 1.5,
}
"""What IF's scheduler says."""
WIDTH = 32
FIRST: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 6,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "block_out_channels": (8, 16),
    "attention_head_dim": 4,
    "cross_attention_dim": 64,
    "encoder_hid_dim": WIDTH,
    "encoder_hid_dim_type": "text_proj",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 4,
    "cross_attention_norm": "group_norm",
    "act_fn": "gelu",
    "time_embedding_act_fn": "gelu",
    "resnet_time_scale_shift": "scale_shift",
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
}
"""As IF-I's, of two levels."""
SECOND: dict[str, Any] = {
    **FIRST,
    "sample_size": 32,
    "in_channels": 6,
    "class_embed_type": "timestep",
    "only_cross_attention": True,
    "mid_block_only_cross_attention": False,
    "resnet_skip_time_act": True,
    "resnet_out_scale_factor": 1.414,
    "mid_block_scale_factor": 1.414,
    "addition_embed_type": "text",
}
"""As IF-II's."""


def pieces(folder: Path) -> Path:
    """A folder with a SentencePiece model alone, as the published checkpoints have it."""
    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 4),
        model_writer=model,
        vocab_size=90,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc",
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    return folder


def t5(seed: int, vocabulary: int, **config: object) -> T5EncoderModel:
    plain: dict[str, Any] = {
        "vocab_size": vocabulary,
        "d_model": WIDTH,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "relative_attention_num_buckets": 16,
        "relative_attention_max_distance": 32,
    }
    return randomise(T5EncoderModel(T5Config(**{**plain, **config})), seed)


def pixel_unet(seed: int, plain: dict[str, Any], **config: object) -> UNet2DConditionModel:
    return randomise(UNet2DConditionModel(**{**plain, **config}), seed)


def make_first(folder: Path, scheduler: object = None, **unet: object) -> Path:
    """Stage I, with the tokenizer as a SentencePiece model alone."""
    source = pieces(folder.with_suffix(".tok"))
    vocab = T5Tokenizer.from_pretrained(source)
    pipe = IFPipeline(
        tokenizer=vocab,
        text_encoder=t5(71, len(vocab)),
        unet=pixel_unet(72, FIRST, **unet),
        scheduler=scheduler or DDPMScheduler(**SHIPPED),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    for file in (folder / "tokenizer").iterdir():
        file.unlink()
    (folder / "tokenizer" / "spiece.model").write_bytes((source / "spiece.model").read_bytes())
    return folder


def make_second(folder: Path, scheduler: object = None, **unet: object) -> Path:
    """Stage II, with the tokenizer as transformers saves it."""
    vocab = T5Tokenizer.from_pretrained(pieces(folder.with_suffix(".tok")))
    pipe = IFSuperResolutionPipeline(
        tokenizer=vocab,
        text_encoder=t5(71, len(vocab)),
        unet=pixel_unet(82, SECOND, **unet),
        scheduler=scheduler or DDPMScheduler(**SHIPPED),
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return folder


def generators(seeds: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(s) for s in seeds]
