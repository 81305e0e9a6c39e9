"""Checkpoints of many makers, ages and quirks: what is done to a tiny checkpoint's folder, and what must come of it.

Every entry is exported and must give the picture of diffusers' own pipeline, or must be refused by name. None needs a
graph that the plain tiny checkpoints do not, but for those marked `traced`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from checkpoints import write_original
from safetensors.torch import load_file, save_file

Edit = Callable[[Path], Any]
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
V = {"prediction_type": "v_prediction"}
ZERO_SNR = "zero SNR: float32 keeps three digits of x0 at the sigma of 4096 that stands for no signal"


@dataclass(frozen=True)
class Entry:
    """One checkpoint: the tiny one it is made of, what is done to that, and how it is exported and asked.

    edits: done to a copy of the folder, in order. export: arguments of `export_bundle`. loads: of `from_pretrained`.
    call: further arguments of the request, by diffusers' names. refused: words of the error, where it must be one.
    least: the bar in dB, with `why` where it is not the common one.
    """

    name: str
    base: str
    edits: tuple[Edit, ...] = ()
    export: dict[str, Any] = field(default_factory=dict)
    loads: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    refused: str | None = None
    least: float = 75.0
    why: str = ""
    image: bool = False
    traced: bool = False


def edit_json(
    place: str, /, *, without: tuple[str, ...] = (), only: dict[str, Any] | None = None, **changes: Any
) -> Edit:
    """Changes to a JSON file of a folder; `only` is what it holds instead."""

    def edit(folder: Path) -> None:
        file = folder / place
        data = json.loads(file.read_text(encoding="utf-8")) if only is None else dict(only)
        data = {k: v for k, v in {**data, **changes}.items() if k not in without}
        file.write_text(json.dumps(data), encoding="utf-8")

    return edit


def index(**changes: Any) -> Edit:
    return edit_json("model_index.json", **changes)


def scheduler(name: str, **config: Any) -> tuple[Edit, ...]:
    """Another scheduler, whose file states this and no more."""
    only = {"_class_name": name, "_diffusers_version": "0.6.0", **BETAS, **config}
    return (
        index(scheduler=["diffusers", name]),
        edit_json("scheduler/scheduler_config.json", only=only),
    )


def unet(**changes: Any) -> Edit:
    return edit_json("unet/config.json", **changes)


def vae(**changes: Any) -> Edit:
    return edit_json("vae/config.json", **changes)


def weights(part: str) -> str:
    return "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"


def stored(part: str, dtype: torch.dtype) -> Edit:
    """A part's weights in another precision, under the same name."""

    def edit(folder: Path) -> None:
        file = folder / part / f"{weights(part)}.safetensors"
        save_file({k: v.to(dtype) for k, v in load_file(file).items()}, file, metadata={"format": "pt"})

    return edit


def as_variant(part: str, variant: str = "fp16", *, scramble: bool = False) -> Edit:
    """A part's weights under a variant's name in float16; with `scramble` other, plain ones stay beside them."""

    def edit(folder: Path) -> None:
        plain = folder / part / f"{weights(part)}.safetensors"
        state = load_file(plain)
        target = plain.with_name(f"{weights(part)}.{variant}.safetensors")
        save_file({k: v.half() for k, v in state.items()}, target, metadata={"format": "pt"})
        plain.unlink()
        if scramble:
            save_file({k: v.flip(0).contiguous() for k, v in state.items()}, plain, metadata={"format": "pt"})

    return edit


def sharded(part: str, *, variant: str = "", leave: bool = False) -> Edit:
    """A part's weights in two shards with an index; with `leave` another single file stays beside them."""

    def edit(folder: Path) -> None:
        stem, plain = weights(part), folder / part / f"{weights(part)}.safetensors"
        state = load_file(plain)
        middle = f".{variant}" if variant else ""
        names = sorted(state)
        where = {}
        for number, half in enumerate((names[::2], names[1::2]), 1):
            shard = f"{stem}{middle}-{number:05}-of-00002.safetensors"
            save_file({n: state[n] for n in half}, folder / part / shard, metadata={"format": "pt"})
            where |= dict.fromkeys(half, shard)
        size = sum(v.nbytes for v in state.values())
        listing = {"metadata": {"total_size": size}, "weight_map": where}
        (folder / part / f"{stem}.safetensors.index{middle}.json").write_text(json.dumps(listing), encoding="utf-8")
        plain.unlink()
        if leave:
            save_file({k: v.flip(0).contiguous() for k, v in state.items()}, plain, metadata={"format": "pt"})

    return edit


def renamed(part: str, change: Callable[[str], str], **extra: torch.Tensor) -> Edit:
    """A part's tensors under other names, and more beside them."""

    def edit(folder: Path) -> None:
        file = folder / part / f"{weights(part)}.safetensors"
        state = {change(k): v for k, v in load_file(file).items()} | extra
        save_file(state, file, metadata={"format": "pt"})

    return edit


def old_attention(key: str) -> str:
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        key = key.replace(f".attentions.0.{new}.", f".attentions.0.{old}.")
    return key


def with_prefix(key: str) -> str:
    return key if key.startswith("text_model.") else f"text_model.{key}"


def pickled(part: str) -> Edit:
    def edit(folder: Path) -> None:
        file = folder / part / f"{weights(part)}.safetensors"
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()

    return edit


def removed(place: str) -> Edit:
    def edit(folder: Path) -> None:
        target = folder / place
        shutil.rmtree(target) if target.is_dir() else target.unlink()

    return edit


def single_file(half: bool = False, **marks: torch.Tensor) -> Edit:
    """One file in the original layout beside the folder, which stays its base; marks: further tensors in it."""

    def edit(folder: Path) -> None:
        file = write_original(folder, folder.parent / f"{folder.name}.safetensors")
        state = load_file(file) | marks
        if half:
            state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
        save_file(state, file, metadata={"format": "pt"})

    return edit


PNDM = {"skip_prk_steps": True, "set_alpha_to_one": False}
EULER, DDIM, DDPM = "EulerDiscreteScheduler", "DDIMScheduler", "DDPMScheduler"
MULTI, SINGLE = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
MEAN, STD = [0.4, -0.3, 0.2, -0.1], [1.6, 0.7, 1.2, 0.5]


def entries() -> Iterator[Entry]:
    """All of them; names are unique."""
    for base in ("sd1", "sd2", "sdxl"):
        yield Entry(f"{base} as saved today", base, image=True)
    yield from old_folders()
    yield from schedulers_by_family()
    yield from parts_and_files()
    yield from refused()


def old_folders() -> Iterator[Entry]:
    first = (unet(_diffusers_version="0.2.2", sample_size=32), *scheduler("PNDMScheduler", **PNDM))
    yield Entry("2022: sample_size 32 means 64, no steps_offset", "sd1", first)
    yield Entry("2022: version of a development tree", "sd1", (unet(_diffusers_version="0.8.1.dev0", sample_size=24),))
    yield Entry("0.9 and later keep a small sample_size", "sd1", (unet(_diffusers_version="0.9.0.dev0"),))
    yield Entry("no version keeps a small sample_size", "sd1", (unet(without=("_diffusers_version",)),))
    yield Entry("a small sample_size of that age elsewhere", "sdxl", (unet(_diffusers_version="0.6.0"),))
    yield Entry("height and width in sample_size", "sd1", (unet(sample_size=[16, 24]),))
    yield Entry("steps_offset 0, stated", "sd1", scheduler("PNDMScheduler", **PNDM, steps_offset=0), image=True)
    yield Entry("steps_offset null", "sd1", scheduler("PNDMScheduler", **PNDM, steps_offset=None))
    yield Entry("DDIM that says nothing", "sd1", scheduler(DDIM), image=True)
    yield Entry("DDIM that clips", "sd1", scheduler(DDIM, clip_sample=True, set_alpha_to_one=False))
    yield Entry("DDIM that clips, v", "sd2", scheduler(DDIM, clip_sample=True, **V))
    yield Entry("DDPM as a trainer leaves it", "sd1", scheduler(DDPM, clip_sample=True, variance_type="fixed_small"))
    bounds = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5}
    yield Entry("DDIM that thresholds", "sd1", scheduler(DDIM, **bounds), image=True)
    yield Entry("DPM++ that thresholds", "sdxl", scheduler(MULTI, **bounds))
    yield Entry("Euler under leading, no offset", "sd1", scheduler(EULER, timestep_spacing="leading"), image=True)
    yield Entry("Heun that clips, corrected", "sd1", scheduler("HeunDiscreteScheduler", clip_sample=True))
    yield Entry(
        "unknown keys of another version",
        "sd1",
        (unet(note=None), edit_json("scheduler/scheduler_config.json", future=[1])),
    )
    nulls = {"class_embed_type": None, "num_class_embeds": None, "time_cond_proj_dim": None, "_name_or_path": "/x/y"}
    yield Entry("nulls that later versions write", "sd1", (unet(**nulls), vae(latents_mean=None, shift_factor=None)))
    yield Entry("keys of few words", "sd1", (vae(without=("scaling_factor", "force_upcast", "sample_size")),))
    yield Entry("VAE attention of 2022", "sd1", (renamed("vae", old_attention),))
    ids = torch.arange(77)[None]
    named = renamed("text_encoder", with_prefix, **{"text_model.embeddings.position_ids": ids})
    yield Entry("text encoder of transformers 4", "sd1", (named,))
    yield Entry(
        "text encoder without the prefix", "sd1", (renamed("text_encoder", lambda k: k.removeprefix("text_model.")),)
    )
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    asked = {"safety_checker": None, "feature_extractor": None}
    yield Entry("a safety checker in the index", "sd1", (index(safety_checker=checker),), loads=asked)
    yield Entry("no word of a safety checker", "sd1", (index(without=("safety_checker", "image_encoder")),))


def schedulers_by_family() -> Iterator[Entry]:
    ancestral, tcd = "EulerAncestralDiscreteScheduler", "TCDScheduler"
    for name, config in (
        (ancestral, {}),
        ("LMSDiscreteScheduler", {"use_karras_sigmas": True}),
        ("HeunDiscreteScheduler", {}),
        ("KDPM2DiscreteScheduler", {}),
        ("KDPM2AncestralDiscreteScheduler", {}),
        (MULTI, {"use_karras_sigmas": True}),
        (MULTI, {"algorithm_type": "deis", "solver_type": "logrho", "final_sigmas_type": "sigma_min"}),
        (MULTI, {"algorithm_type": "sde-dpmsolver++"}),
        (SINGLE, {}),
        ("DEISMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_type": "midpoint"}),
        ("UniPCMultistepScheduler", {"solver_type": "heun"}),
        ("LCMScheduler", {}),
        (tcd, {"clip_sample": True}),
    ):
        yield Entry(f"{name} {config}", "sd1", scheduler(name, **config))
    yield Entry("PNDMScheduler {}", "sd1", scheduler("PNDMScheduler"), image=True)
    yield Entry("PNDMScheduler of v", "sd2", scheduler("PNDMScheduler", **V, steps_offset=1))
    yield Entry("cosine betas", "sd1", scheduler(DDIM, beta_schedule="squaredcos_cap_v2", clip_sample=False))
    betas = [0.0001 + 0.00002 * i for i in range(600)]
    yield Entry("trained betas", "sd1", scheduler(EULER, trained_betas=betas, num_train_timesteps=600))
    yield Entry("zero SNR", "sd2", scheduler(DDIM, **V, rescale_betas_zero_snr=True, timestep_spacing="trailing"))
    zero = scheduler(EULER, **V, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    yield Entry("zero SNR under Euler", "sd2", zero, least=50.0, why=ZERO_SNR)
    for name, config in (
        (DDIM, {}),
        (DDPM, {}),
        (DDIM, {"clip_sample_range": 2.0, "steps_offset": 1}),
        ("HeunDiscreteScheduler", {"clip_sample": True}),
        ("LCMScheduler", {"clip_sample": True}),
        (EULER, {"timestep_spacing": "leading"}),
        (ancestral, {"timestep_spacing": "trailing"}),
        (MULTI, {"solver_order": 3}),
        ("PNDMScheduler", {"skip_prk_steps": False}),
        ("EDMEulerScheduler", {}),
        ("EDMDPMSolverMultistepScheduler", {"sigma_max": 30.0}),
        ("EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}),
    ):
        yield Entry(f"SDXL {name} {config}", "sdxl", scheduler(name, **config), image=name != "EDMEulerScheduler")
    other = index(scheduler=["diffusers", MULTI])
    yield Entry("the index names another scheduler", "sd1", (other,), image=True)
    euler = index(scheduler=["diffusers", EULER])
    yield Entry("the index names another scheduler, SDXL", "sdxl", (*scheduler(DDIM, clip_sample=True), euler))


def parts_and_files() -> Iterator[Entry]:
    fp16 = {"variant": "fp16"}
    everything = ("unet", "vae", "text_encoder")
    yield Entry("fp16 for the UNet alone", "sd1", (as_variant("unet", scramble=True),), fp16, fp16)
    yield Entry("fp16 for the VAE alone", "sdxl", (as_variant("vae"),), fp16, fp16)
    yield Entry("fp16 for all", "sd2", tuple(as_variant(p) for p in everything), fp16, fp16)
    yield Entry(
        "ema for the UNet",
        "sd1",
        (as_variant("unet", "non_ema", scramble=True),),
        {"variant": "non_ema"},
        {"variant": "non_ema"},
    )
    yield Entry("stored in float16", "sd1", tuple(stored(p, torch.float16) for p in everything))
    yield Entry("stored in bfloat16", "sd2", tuple(stored(p, torch.bfloat16) for p in everything))
    yield Entry("shards", "sd1", (sharded("unet"), sharded("text_encoder")))
    yield Entry("shards of a variant", "sd1", (sharded("unet", variant="fp16"),), fp16, fp16)
    yield Entry("shards beside one file: the UNet's shards", "sd1", (sharded("unet", leave=True),))
    yield Entry("shards beside one file: the encoder's file", "sd1", (sharded("text_encoder", leave=True),))
    yield Entry("shift_factor, which no pipeline here reads", "sd1", (vae(shift_factor=0.3),), image=True)
    yield Entry("statistics that SD 1.x's pipelines do not read", "sd1", (vae(latents_mean=MEAN, latents_std=STD),))
    yield Entry("a mean alone", "sdxl", (vae(latents_mean=MEAN),))
    statistics = vae(latents_mean=MEAN, latents_std=STD, shift_factor=0.2)
    yield Entry("mean and deviation", "sdxl", (statistics,), image=True, traced=True)
    yield Entry("another scaling_factor with statistics", "sd1", (vae(scaling_factor=0.18215, latents_std=STD),))
    yield Entry("negative zeros not forced", "sdxl", (index(force_zeros_for_empty_prompt=False),))
    yield Entry("no word of zeros", "sdxl", (index(without=("force_zeros_for_empty_prompt",)),))
    yield Entry("zeros null", "sdxl", (index(force_zeros_for_empty_prompt=None),))
    yield Entry("a watermark asked for", "sdxl", (index(add_watermarker=None),), loads={"add_watermarker": False})
    yield Entry("index of image to image", "sd1", (index(_class_name="StableDiffusionImg2ImgPipeline"),), image=True)
    inpainting = (*scheduler("PNDMScheduler", skip_prk_steps=True), index(_class_name="StableDiffusionInpaintPipeline"))
    yield Entry("index of inpainting", "sd1", inpainting)
    yield Entry("index of image to image, SDXL", "sdxl", (index(_class_name="StableDiffusionXLImg2ImgPipeline"),))
    for base in ("sd1", "sd2", "sdxl"):
        yield Entry(f"one file of {base} over its base", base, (single_file(),), {"base": True})
    yield Entry("one file in float16", "sd1", (single_file(half=True),), {"base": True})
    trained = {"model_ema.decay": torch.tensor(0.9999), "optimizer.step": torch.arange(3), "betas": torch.ones(4)}
    yield Entry("one file with a trainer's rest", "sd1", (single_file(**trained),), {"base": True})
    old = (*scheduler(DDIM, steps_offset=0), unet(_diffusers_version="0.6.0"), single_file())
    yield Entry("one file over an old base", "sd1", old, {"base": True})


def refused() -> Iterator[Entry]:
    for base, name, config, words in (
        ("sd1", MULTI, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, "dpmsolver"),
        ("sd1", DDPM, {"variance_type": "learned_range"}, "learned_range"),
        ("sd1", "UniPCMultistepScheduler", {"predict_x0": False}, "predict_x0"),
        ("sdxl", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, "flow matching"),
        ("sd1", "DDIMParallelScheduler", {}, "DDIMParallelScheduler"),
        ("sd1", "IPNDMScheduler", {}, "IPNDMScheduler"),
        ("sd1", DDIM, {"beta_schedule": "sigmoid"}, "sigmoid"),
        ("sdxl", "EDMDPMSolverMultistepScheduler", {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"}, "order 3"),
    ):
        yield Entry(f"refused: {name} {config}", base, scheduler(name, **config), refused=words)
    mask = edit_json("text_encoder/config.json", use_attention_mask=True)
    nested = edit_json("text_encoder/config.json", only={"model_type": "clip", "text_config": {"hidden_size": 32}})
    yield Entry("refused: a text encoder inside CLIP's configuration", "sd1", (nested,), refused="hidden_size")
    quantized = unet(quantization_config={"quant_method": "bitsandbytes"})
    yield Entry("refused: quantized weights", "sd1", (quantized,), refused="quantization_config")
    yield Entry("refused: a masked prompt", "sd1", (mask,), refused="use_attention_mask")
    yield Entry("refused: an embedding of classes", "sd1", (unet(num_class_embeds=10),), refused="num_class_embeds")
    yield Entry(
        "refused: sizes in SD 1.x", "sd1", (unet(addition_embed_type="text_time"),), refused="addition_embed_type"
    )
    yield Entry("refused: projected prompts", "sd1", (unet(encoder_hid_dim=24),), refused="encoder_hid_dim")
    yield Entry("refused: nine channels", "sd1", (unet(in_channels=9),), refused="9 channels")
    aesthetic = index(_class_name="StableDiffusionXLImg2ImgPipeline", requires_aesthetics_score=True)
    yield Entry("refused: aesthetic scores", "sdxl", (aesthetic,), refused="aesthetic")
    yield Entry("refused: no such variant", "sd1", (as_variant("unet"),), {"variant": "bf16"}, refused="variant 'bf16'")
    yield Entry("refused: a pickle alone", "sd1", (pickled("unet"),), refused="pickle")
    yield Entry(
        "refused: no scheduler", "sd1", (removed("scheduler/scheduler_config.json"),), refused="scheduler_config"
    )
    yield Entry(
        "refused: a part that has no place",
        "sd1",
        (index(controlnet=["diffusers", "ControlNetModel"]),),
        refused="controlnet",
    )
    yield Entry(
        "refused: statistics of another length",
        "sdxl",
        (vae(latents_mean=[0.0], latents_std=[1.0]),),
        refused="latents_mean",
    )
