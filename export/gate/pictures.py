"""Pictures of diffusers' own pipeline, loaded by diffusers' own loaders: what the gate compares whole requests with.

Components that agree one by one may still be put together wrongly, and what both sides of a component's comparison
leave out shows in neither. So one picture from a prompt, and one from a picture, are made by the library itself from
the original checkpoint; nothing of an export's reading of it is used. Text encoders are let go of before the UNet is
loaded, as diffusers' users do where memory is short.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

from ...families.control import T2I, picture_input
from ..checkpoint.parts import Checkpoint, IpAdapter
from .loading import load_control, load_fused, load_image_encoder, load_model

PROMPT, SEED, GUIDANCE = "a red circle, hello! 7 stars", 20240, 3.0
STEPS, IMAGE_STEPS, STRENGTH = 2, 4, 0.5
LEAST_SIDE = 16
"""Of the latent, in cells."""
LEAST_STEPS = {"PNDMScheduler": 4}
"""Steps without which a class cannot be run in one of its forms."""
NOISE_DIFFERS = {"DPMSolverSDEScheduler": "its noise comes from a Brownian tree there, and from a stream here"}
TASKS = ("text_to_image", "image_to_image")
OTHER_TASKS = {"none": TASKS[:1], "told": ("upscaled",)}
"""Of families whose pictures are not what sampling starts from."""
ENLARGED = 4
"""How many times smaller the picture is that is made larger."""
CONTROLLED = "controlled"
"""The task of a checkpoint with ControlNets: a picture for each of them, all at once where diffusers takes them so."""
PROMPTED = "prompted_by_a_picture"
"""The task of a checkpoint with an IP-Adapter; the last, since the adapter stays in the UNet."""


def make_pictures(checkpoint: Checkpoint) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors (`picture/text_to_image/out/image` uint8 [H, W, 3], ...) and, by task, what was asked for.

    Where diffusers cannot make a picture that can be compared, `not_run` says why instead.
    """
    tasks = OTHER_TASKS.get(checkpoint.model.pictures, TASKS)
    tasks = (*tasks, *((CONTROLLED,) if checkpoint.controls else ()), *((PROMPTED,) if checkpoint.adapter else ()))
    why = NOISE_DIFFERS.get(str(checkpoint.scheduler["_class_name"]))
    if why is not None:
        return {}, {task: {"not_run": why} for task in tasks}
    if checkpoint.model.text_encoders and not checkpoint.text_encoders:
        return {}, {task: {"not_run": "there is no text encoder"} for task in tasks}
    try:
        embeddings = _encode(checkpoint)
        pipe = _load(checkpoint, without=[n for n in checkpoint.parts if n.startswith("text_encoder")])
    except Exception as error:  # whatever the library says of a checkpoint is recorded, and said
        return {}, {task: {"not_run": words_of(error)} for task in tasks}
    tensors: dict[str, np.ndarray] = {}
    asked: dict[str, Any] = {}
    for task in tasks:
        try:
            tensors_of_task, asked[task] = _picture(checkpoint, pipe, task, embeddings)
        except Exception as error:
            asked[task] = {"not_run": words_of(error)}
            continue
        tensors |= {f"picture/{task}/{name}": value for name, value in tensors_of_task.items()}
    return tensors, asked


def words_of(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"diffusers {diffusers.__version__} says {type(error).__name__}: {text[:300]}"


def _pipeline_class(checkpoint: Checkpoint, *, image: bool = False) -> Any:
    """The class that makes pictures from prompts, whichever task's the checkpoint names, or its class for pictures."""
    model = checkpoint.model
    plain = (model.respacing if checkpoint.pipeline in model.respacing else model.pipelines)[0]
    if image:
        return getattr(diffusers, plain.replace("Pipeline", "Img2ImgPipeline"))
    named = checkpoint.pipeline
    return getattr(diffusers, plain if any(word in named for word in ("Img2Img", "Inpaint")) else named)


def _load(checkpoint: Checkpoint, *, without: list[str]) -> Any:
    """The pipeline in float32 but for some parts, with the tokenizers of those that it has."""
    tokenizers = {e.tokenizer for e in checkpoint.model.text_encoders if e.name in without}
    given: dict[str, Any] = dict.fromkeys([*without, *tokenizers])
    wanted = [n for n, p in checkpoint.parts.items() if n not in without and p.files]
    given = {n: None for n in given if n not in checkpoint.parts or checkpoint.parts[n].files}
    if checkpoint.loras:
        given |= {n: m for n, m in load_fused(checkpoint).items() if n in wanted}
    for name in wanted:
        part = checkpoint.parts[name]
        replaced = part.place.parent != checkpoint.folder or part.files[0].parent != part.place
        alike = part.files[0] == checkpoint.file and name in _alike(checkpoint)
        if name not in given and (alike or (replaced and part.files[0] != checkpoint.file)):
            given[name] = load_model(checkpoint, part)
    if checkpoint.file is not None and _is_marked(checkpoint.file):
        given["scheduler"] = getattr(diffusers, checkpoint.scheduler["_class_name"]).from_config(checkpoint.scheduler)
    cls = _pipeline_class(checkpoint)
    options = {**given, "torch_dtype": torch.float32, "local_files_only": True, **_unchecked(cls)}
    if checkpoint.file is not None:
        pipe = cls.from_single_file(str(checkpoint.file), config=str(checkpoint.folder), **options)
    else:
        pipe = cls.from_pretrained(
            checkpoint.folder, use_safetensors=True, variant=checkpoint.options.get("variant"), **options
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _alike(checkpoint: Checkpoint) -> set[str]:
    """Text encoders of one width: diffusers tells those of a single file apart by it, and takes one for the other."""
    widths = {e.name: checkpoint.parts[e.name].config["hidden_size"] for e in checkpoint.model.text_encoders}
    return {n for n, width in widths.items() if list(widths.values()).count(width) > 1}


def _is_marked(file: Path) -> bool:
    """Whether a single file has tensors that say how it was trained: diffusers does not read those."""
    with safe_open(file, framework="np") as opened:
        return bool({"v_pred", "ztsnr"} & set(opened.keys()))


def _unchecked(cls: Any) -> dict[str, Any]:
    """No safety checker, where the class would take one, and no watermark."""
    expected, optional = cls._get_signature_keys(cls)
    optional_parts = ("safety_checker", "feature_extractor", "image_encoder", "watermarker")
    absent = {n: None for n in optional_parts if n in expected}
    said = {"requires_safety_checker": False, "add_watermarker": False}
    return {**absent, **{k: v for k, v in said.items() if k in optional}}


def _encode(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The prompt's embeddings, and those of no negative prompt, as arguments of a call."""
    pipe = _load(checkpoint, without=["unet", "vae"])
    guided = not checkpoint.parts["unet"].config.get("time_cond_proj_dim")
    with torch.no_grad():
        values = pipe.encode_prompt(PROMPT, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=guided)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return {n: v for n, v in zip(names, values, strict=False) if v is not None}


def _picture(
    checkpoint: Checkpoint, pipe: Any, task: str, embeddings: dict[str, torch.Tensor]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    image = task == "image_to_image"
    channels, factor, multiple = checkpoint.model.geometry(
        checkpoint.parts["unet"].config, checkpoint.parts["vae"].config
    )
    del channels
    side = -(-max(LEAST_SIDE, 2 * multiple) // multiple) * multiple * factor
    least = LEAST_STEPS.get(type(pipe.scheduler).__name__, 0)
    asked = {
        "prompt": PROMPT,
        "seed": SEED,
        "guidance": GUIDANCE,
        "width": side,
        "height": side,
        "steps": max(IMAGE_STEPS if image else STEPS, least),
    }
    call = {
        **embeddings,
        "num_inference_steps": asked["steps"],
        "guidance_scale": GUIDANCE,
        "generator": torch.Generator().manual_seed(SEED),
        "output_type": "np",
    }
    tensors: dict[str, np.ndarray] = {}
    if image:
        pipe = _for_pictures(checkpoint, pipe)
        asked["strength"] = STRENGTH
        tensors["in/image"] = drawing(side)
        call |= {"image": Image.fromarray(tensors["in/image"]), "strength": STRENGTH}
    else:
        call |= {"width": side, "height": side}
    if checkpoint.model.pictures == "told":
        tensors["in/image"] = drawing(side // ENLARGED)
        call |= {"image": Image.fromarray(tensors["in/image"])}
    if task == CONTROLLED:
        names = _alike_controls(checkpoint)
        pipe = _with_controls(checkpoint, pipe, names)
        drawings = {n: drawing(side)[:: (-1) ** i] for i, n in enumerate(names)}
        tensors |= {f"in/{picture_input(n)}": np.ascontiguousarray(d) for n, d in drawings.items()}
        shown = [Image.fromarray(d) for d in drawings.values()]
        call |= {"image": shown if len(shown) > 1 else shown[0]}
    if task == PROMPTED and checkpoint.adapter is not None:
        pipe = _with_adapter(pipe, checkpoint.adapter)
        tensors["in/ip_adapter_image"] = drawing(side)
        call |= {"ip_adapter_image": Image.fromarray(tensors["in/ip_adapter_image"])}
    with torch.no_grad():
        made = np.asarray(pipe(**call).images)[0]
    if not np.isfinite(made).all():
        raise ValueError("its picture holds NaN")
    tensors["out/image"] = (made * 255).round().astype(np.uint8)
    return tensors, asked


def _for_pictures(checkpoint: Checkpoint, pipe: Any) -> Any:
    """The pipeline that starts from pictures, of the same parts and of what the checkpoint's index says to it."""
    cls = _pipeline_class(checkpoint, image=True)
    _, optional = cls._get_signature_keys(cls)
    stated = {k: pipe.config[k] for k in optional if k in pipe.config}
    made = cls(**{**pipe.components, **stated, **_unchecked(cls)})
    made.set_progress_bar_config(disable=True)
    return made


def _alike_controls(checkpoint: Checkpoint) -> list[str]:
    """The controls that one pipeline takes at once: of the first one's class, of T2I adapters one, and ControlNets that
    pool what they add if the first does, as diffusers asks the first of several alone.
    """
    kinds = {n: (p.class_name, bool(p.config.get("global_pool_conditions"))) for n, p in checkpoint.controls.items()}
    first = next(iter(kinds.values()))
    alike = [n for n in kinds if kinds[n] == first]
    return alike[:1] if first[0] == T2I else alike


def _with_controls(checkpoint: Checkpoint, pipe: Any, names: Sequence[str]) -> Any:
    """The pipeline that makes pictures from prompts under some of the checkpoint's ControlNets."""
    adapter = checkpoint.controls[names[0]].class_name == T2I
    kind = "AdapterPipeline" if adapter else "ControlNetPipeline"
    cls = getattr(diffusers, checkpoint.model.pipelines[0].replace("Pipeline", kind))
    expected, optional = cls._get_signature_keys(cls)
    stated = {k: pipe.config[k] for k in optional if k in pipe.config}
    parts = {k: v for k, v in pipe.components.items() if k in expected}
    nets = [load_control(checkpoint, part) for part in (checkpoint.controls[n] for n in names)]
    given = {"adapter" if adapter else "controlnet": nets if len(nets) > 1 else nets[0], **stated, **_unchecked(cls)}
    made = cls(**{**parts, **given})
    made.set_progress_bar_config(disable=True)
    return made


def _with_adapter(pipe: Any, adapter: IpAdapter) -> Any:
    """The same pipeline with an IP-Adapter in its UNet, for good, and the image encoder in front."""
    pipe.register_modules(image_encoder=load_image_encoder(adapter))
    pipe.load_ip_adapter(str(adapter.file.parent), subfolder="", weight_name=adapter.file.name)
    pipe.set_ip_adapter_scale(1.0)
    return pipe


def drawing(side: int) -> np.ndarray:
    """A gradient with a disc on it, uint8 [side, side, 3]."""
    y, x = np.mgrid[0:side, 0:side] / side
    disc = (x - 0.5) ** 2 + (y - 0.4) ** 2 < 0.06
    channels = [255 * x, 255 * y, np.where(disc, 220.0, 60.0)]
    return np.stack(channels, -1).round().astype(np.uint8)
