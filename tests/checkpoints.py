"""Checkpoints as the tests make them: real diffusers folders with tiny random models."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

DEMO = Path(__file__).parents[1] / "export" / "demo" / "base"
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def tokenizer(folder: Path, *, pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """The embedded model's byte-level vocabulary as a CLIP tokenizer; `pad` as SD 2.x and SDXL set it."""
    source = DEMO / "tokenizer"
    made = CLIPTokenizer(
        vocab=str(source / "vocab.json"),
        merges=str(source / "merges.txt"),
        model_max_length=77,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token=pad,
        unk_token="<|endoftext|>",
    )
    made.save_pretrained(folder)
    return made


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Random values in every parameter, norms and biases included, so that a swapped or shared weight shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(noise * (0.7 / p[0].numel() ** 0.5))
            else:
                p.copy_(1 + 0.1 * noise if name.endswith("weight") else 0.1 * noise)
    return model.eval()


def _vae(seed: int, **config: object) -> AutoencoderKL:
    plain = {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": 32,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 16),
    }
    return randomise(AutoencoderKL(**{**plain, **config}), seed)


def _text(seed: int, vocab: CLIPTokenizer, *, projected: bool = False, **config: object) -> CLIPTextModel:
    plain = {
        "vocab_size": len(vocab),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "projection_dim": 24,
        "bos_token_id": vocab.bos_token_id,
        "eos_token_id": vocab.eos_token_id,
        "pad_token_id": vocab.eos_token_id,
    }
    cls = CLIPTextModelWithProjection if projected else CLIPTextModel
    return randomise(cls(CLIPTextConfig(**{**plain, **config})), seed)


def _unet(seed: int, **config: object) -> UNet2DConditionModel:
    plain = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "block_out_channels": (8, 16),
        "attention_head_dim": 2,
        "cross_attention_dim": 32,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return randomise(UNet2DConditionModel(**{**plain, **config}), seed)


def _plain(
    vocab: CLIPTokenizer, text: CLIPTextModel, unet: UNet2DConditionModel, vae: AutoencoderKL, scheduler: object
) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=vocab,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def make_sd1(folder: Path, **unet: object) -> Path:
    """SD 1.x: CLIP with quick GELU, epsilon prediction, PNDM under leading spacing as its real config has it."""
    vocab = tokenizer(folder.with_suffix(".tok"))
    scheduler = PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    _plain(vocab, _text(1, vocab), _unet(2, **unet), _vae(3), scheduler).save_pretrained(folder)
    return folder


def make_sd2(folder: Path) -> Path:
    """SD 2.x-v: OpenCLIP's GELU, "!" as padding, linear projections, v-prediction, an attention width a level."""
    vocab = tokenizer(folder.with_suffix(".tok"), pad="!")
    scheduler = DDIMScheduler(
        **BETAS, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    unet = _unet(5, attention_head_dim=[2, 4], use_linear_projection=True, upcast_attention=True)
    _plain(vocab, _text(4, vocab, hidden_act="gelu"), unet, _vae(6), scheduler).save_pretrained(folder)
    return folder


def make_sdxl(folder: Path) -> Path:
    """SDXL: two encoders, pooled vector, time ids, transformer depth by level."""
    first = tokenizer(folder.with_suffix(".tok"))
    second = tokenizer(folder.with_suffix(".tok2"), pad="!")
    unet = _unet(
        9,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 2],
        attention_head_dim=[2, 4],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
        cross_attention_dim=64,
    )
    StableDiffusionXLPipeline(
        vae=_vae(10, scaling_factor=0.13025, force_upcast=True),
        tokenizer=first,
        tokenizer_2=second,
        text_encoder=_text(7, first),
        text_encoder_2=_text(8, second, projected=True, hidden_act="gelu"),
        unet=unet,
        scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


def copy(checkpoint: Path, target: Path) -> Path:
    return Path(shutil.copytree(checkpoint, target))
