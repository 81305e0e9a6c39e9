"""Checkpoints as the tests make them: real diffusers folders with tiny random models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
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


def make_sd1(folder: Path, vae: dict[str, object] | None = None, **unet: object) -> Path:
    """SD 1.x: CLIP with quick GELU, epsilon prediction, PNDM under leading spacing as its real config has it."""
    vocab = tokenizer(folder.with_suffix(".tok"))
    scheduler = PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    _plain(vocab, _text(1, vocab), _unet(2, **unet), _vae(3, **(vae or {})), scheduler).save_pretrained(folder)
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


def make_sdxl(folder: Path, **unet_changes: object) -> Path:
    """SDXL: two encoders, pooled vector, time ids, transformer depth by level."""
    first = tokenizer(folder.with_suffix(".tok"))
    second = tokenizer(folder.with_suffix(".tok2"), pad="!")
    config = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2],
        "attention_head_dim": [2, 4],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 24,
        "cross_attention_dim": 64,
    }
    unet = _unet(9, **{**config, **unet_changes})
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


def make_tiny_vae(folder: Path) -> Path:
    """An AutoencoderTiny of two blocks, for the latents of the other tiny checkpoints."""
    widths, blocks = (8, 8), (1, 1)
    model = AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks,
    )
    randomise(model, 12).save_pretrained(folder)
    return folder


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal to noise of two uint8 pictures, in dB."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def copy(checkpoint: Path, target: Path) -> Path:
    return Path(shutil.copytree(checkpoint, target))


def write_original(folder: Path, target: Path) -> Path:
    """A diffusers folder's weights as one file in the original layout, written block by block as the models are built.

    A writer of its own: it walks the blocks in the order of construction, and shares nothing with the reader.
    """
    states = {p.parent.name: load_file(p) for p in folder.glob("*/*.safetensors")}
    configs = {n: json.loads((folder / n / "config.json").read_text()) for n in states}
    written = _prefixed("model.diffusion_model.", _original_unet(states["unet"], configs["unet"]))
    written |= _prefixed("first_stage_model.", _original_vae(states["vae"], configs["vae"]))
    clip = {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in states["text_encoder"].items()}
    if "text_encoder_2" in states:
        written |= _prefixed("conditioner.embedders.0.transformer.", clip)
        written |= _prefixed("conditioner.embedders.1.model.", _open_clip(states["text_encoder_2"]))
        written["conditioner.embedders.1.model.logit_scale"] = torch.ones(())
    elif configs["text_encoder"]["hidden_act"] == "gelu":
        written |= _prefixed("cond_stage_model.model.", _open_clip(clip))
    else:
        written |= _prefixed("cond_stage_model.transformer.", clip)
        written["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    written["alphas_cumprod"] = torch.linspace(1, 0, 10)
    save_file({k: v.contiguous().clone() for k, v in written.items()}, target, metadata={"format": "pt"})
    return target


def _prefixed(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + k: v for k, v in state.items()}


def _renamed(state: dict[str, torch.Tensor], blocks: dict[str, str], inner: dict[str, str]) -> dict[str, torch.Tensor]:
    """Blocks by their beginning; then, in residual blocks and attentions only, what `inner` says."""
    made = {}
    for key, value in state.items():
        block = next((b for b in blocks if key.startswith(f"{b}.")), "")
        rest = key[len(block) :]
        if "resnets" in block or "attentions" in block:
            for old, new in inner.items():
                rest = rest.replace(f".{old}.", f".{new}.") if "transformer" not in rest else rest
        made[blocks.get(block, "") + rest] = value
    return made


def _original_unet(state: dict[str, torch.Tensor], config: dict) -> dict[str, torch.Tensor]:
    blocks = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    n = 1
    for level in range(levels):
        for i in range(layers):
            blocks[f"down_blocks.{level}.resnets.{i}"] = f"input_blocks.{n}.0"
            blocks[f"down_blocks.{level}.attentions.{i}"] = f"input_blocks.{n}.1"
            n += 1
        blocks[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{n}.0.op"
        n += 1
    n = 0
    for level in range(levels):
        attends = any(k.startswith(f"up_blocks.{level}.attentions") for k in state)
        for i in range(layers + 1):
            blocks[f"up_blocks.{level}.resnets.{i}"] = f"output_blocks.{n}.0"
            blocks[f"up_blocks.{level}.attentions.{i}"] = f"output_blocks.{n}.1"
            n += 1
        blocks[f"up_blocks.{level}.upsamplers.0"] = f"output_blocks.{n - 1}.{1 + attends}"
    inner = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    return _renamed(state, blocks, inner)


def _original_vae(state: dict[str, torch.Tensor], config: dict) -> dict[str, torch.Tensor]:
    blocks = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    for half, side in (("encoder", "down"), ("decoder", "up")):
        blocks |= {f"{half}.conv_in": f"{half}.conv_in", f"{half}.conv_out": f"{half}.conv_out"}
        blocks[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        blocks |= {f"{half}.mid_block.resnets.{i}": f"{half}.mid.block_{i + 1}" for i in (0, 1)}
        blocks[f"{half}.mid_block.attentions.0"] = f"{half}.mid.attn_1"
        for level in range(levels):
            place = f"{half}.{side}.{level if side == 'down' else levels - 1 - level}"
            for i in range(layers + (side == "up")):
                blocks[f"{half}.{side}_blocks.{level}.resnets.{i}"] = f"{place}.block.{i}"
            blocks[f"{half}.{side}_blocks.{level}.{side}samplers.0"] = f"{place}.{side}sample"
    inner = {"conv_shortcut": "nin_shortcut", "group_norm": "norm", "to_out.0": "proj_out"}
    made = _renamed(state, blocks, inner | {"to_q": "q", "to_k": "k", "to_v": "v"})
    square = ("q.weight", "k.weight", "v.weight", "proj_out.weight")
    return {k: v[..., None, None] if ".attn_1." in k and k.endswith(square) else v for k, v in made.items()}


def _open_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    plain = {k.removeprefix("text_model."): v for k, v in state.items()}
    made = {
        "token_embedding.weight": plain["embeddings.token_embedding.weight"],
        "positional_embedding": plain["embeddings.position_embedding.weight"],
        "ln_final.weight": plain["final_layer_norm.weight"],
        "ln_final.bias": plain["final_layer_norm.bias"],
        "text_projection": plain.get("text_projection.weight", torch.eye(len(plain["final_layer_norm.bias"]))).T,
    }
    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    names["self_attn.out_proj"] = "attn.out_proj"
    layer = 0
    while f"encoder.layers.{layer}.layer_norm1.weight" in plain:
        ours, theirs = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for what in ("weight", "bias"):
            parts = [plain[f"{ours}.self_attn.{n}_proj.{what}"] for n in "qkv"]
            made[f"{theirs}.attn.in_proj_{what}"] = torch.cat(parts)
            made |= {f"{theirs}.{new}.{what}": plain[f"{ours}.{old}.{what}"] for old, new in names.items()}
        layer += 1
    return made


LORA_MODULES = ("to_q", "to_out.0", "ff.net.0.proj", "proj_in", "conv1", "conv_shortcut", "downsamplers.0.conv")
LORA_TEXT_MODULES = ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1")
RANK, ALPHA = 3, 1.5


def make_lora(
    folder: Path, *, text: bool = True, seed: int = 0
) -> dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Random pairs (down, up) by component and module, over linear layers and convolutions of a folder's models."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {}
    for file in sorted(folder.glob("*/*.safetensors")):
        part = file.parent.name
        wanted = LORA_MODULES if part == "unet" else LORA_TEXT_MODULES if text and part.startswith("text") else ()
        for key, value in sorted(load_file(file).items()):
            module = key.removesuffix(".weight")
            if key.endswith(".weight") and wanted and module.endswith(wanted):
                down = torch.randn((RANK, *value.shape[1:]), generator=generator) * 0.2
                up = torch.randn((value.shape[0], RANK, *[1] * (value.ndim - 2)), generator=generator) * 0.2
                made.setdefault(part, {})[module.removeprefix("text_model.")] = (down, up)
    return made


def write_lora(lora: dict, target: Path, style: str, *, folder: Path | None = None) -> Path:
    """A LoRA's file in a key style: `kohya`, `kohya original` (SDXL's block names), `diffusers`, `old`, `peft`."""
    xl = "text_encoder_2" in lora
    short = {"unet": "lora_unet_", "text_encoder": "lora_te1_" if xl else "lora_te_", "text_encoder_2": "lora_te2_"}
    written = {}
    for part, pairs in lora.items():
        names = {m: m if part == "unet" else f"text_model.{m}" for m in pairs}
        if style == "kohya original" and part == "unet":
            config = json.loads((folder / "unet" / "config.json").read_text())
            state = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
            renamed = _original_unet({k: k for k in state}, config)
            names = {k.removesuffix(".weight"): new.removesuffix(".weight") for new, k in renamed.items()}
        for module, (down, up) in pairs.items():
            name = names[module]
            if style.startswith("kohya"):
                flat = short[part] + name.replace(".", "_")
                written |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
                written[f"{flat}.alpha"] = torch.tensor(ALPHA)
            elif style == "peft":
                flat = f"base_model.model.{name}"
                written |= {f"{flat}.lora_A.weight": down, f"{flat}.lora_B.weight": up}
            else:
                old = "lora.{}" if part == "unet" else "lora_linear_layer.{}"
                a, b = ("lora_A", "lora_B") if style == "diffusers" else (old.format("down"), old.format("up"))
                written |= {f"{part}.{name}.{a}.weight": down, f"{part}.{name}.{b}.weight": up}
    save_file({k: v.contiguous().clone() for k, v in written.items()}, target, metadata={"format": "pt"})
    return target
