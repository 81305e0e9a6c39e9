"""What callers pass by keyword, stated once for type checkers and editors: they cannot see what is forwarded."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

from ..engines import Store
from ..schedules import FoundSchedules
from .device.base import Device


class SamplerOptions(TypedDict, total=False):
    """Options of samplers and schedules; a call takes those that its sampler knows (`fewstep samplers --json`)."""

    eta: float
    s_churn: float
    s_tmin: float
    s_tmax: float
    s_noise: float
    order: int
    solver_type: str
    lower_order_final: bool
    euler_at_final: bool
    disable_corrector: Sequence[int]
    large_variance: bool
    learned_variance: bool
    thresholding: bool
    dynamic_thresholding_ratio: float
    sample_max_value: float
    timestep_scaling: float
    shifted_timestep: int
    first_timestep: float
    first_sigma: float
    last_sigma: float | str
    sigma_min: float
    sigma_max: float
    sigma_data: float
    rho: float
    alpha: float
    beta: float
    steps_offset: int
    original_steps: int


class CallArguments(SamplerOptions, total=False):
    """The fields of `Call` but the prompt, which documents them. Any other option of a sampler goes into `options`."""

    negative: str | Sequence[str] | None
    loras: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None
    prompt_2: str | Sequence[str] | None
    negative_2: str | Sequence[str] | None
    prompt_syntax: str
    long_prompts: str | None
    clip_skip: int
    prompt_embeds: Any
    negative_prompt_embeds: Any
    pooled_prompt_embeds: Any
    negative_pooled_prompt_embeds: Any
    steps: int | None
    sampler: str | None
    schedule: str | os.PathLike[str] | FoundSchedules | None
    schedule_digest: str | None
    timesteps: Sequence[float] | None
    sigmas: Sequence[float] | None
    guidance: float | Sequence[float] | None
    compat: str | None
    seed: int | Sequence[int] | None
    seed_device: str
    shared_stream: bool
    variation_seed: int | Sequence[int] | None
    variation: float
    images_per_prompt: int
    size: tuple[int, int] | None
    original_size: tuple[int, int] | None
    crop_top_left: tuple[int, int]
    target_size: tuple[int, int] | None
    negative_original_size: tuple[int, int] | None
    negative_crop_top_left: tuple[int, int] | None
    negative_target_size: tuple[int, int] | None
    latents: Any
    image: Any
    strength: float | None
    noise_level: int | None
    fit: str
    mask: Any
    mask_threshold: float | None
    control: Mapping[str, Any] | None
    controlnet_conditioning_scale: float | Mapping[str, float] | None
    control_guidance_start: float | Mapping[str, float] | None
    control_guidance_end: float | Mapping[str, float] | None
    guess_mode: bool
    canny: Sequence[str] | Mapping[str, tuple[float, float]] | None
    ip_adapter_image: Any
    ip_adapter_scale: float | Sequence[float] | None
    frames: int | None
    fps: int | None
    motion_bucket: int | None
    noise_augmentation: float | None
    min_guidance: float | None
    decode_chunk: int | None
    decoder: str
    options: Mapping[str, Any]


class SharedOptions(TypedDict, total=False):
    """The keyword arguments of `Pipeline`, which documents them, that pipelines on several devices share."""

    backend: str
    mode: str | None
    graphs: bool | None
    graphs_kept: int
    size: tuple[int, int] | None
    batch: int
    store: Store | None
    build: str
    threads: int
    most_contexts: int
    vae_tiling: str | bool
    vae_slicing: str | bool
    keep_text_encoders: bool
    lora_folder: str | os.PathLike[str] | None
    embeddings: Sequence[tuple[str | None, str | os.PathLike[str]]]
    swappable: bool
    engine_options: Mapping[str, Any] | None
    progress: Callable[[str, str, float], None] | None


class LoadOptions(SharedOptions, total=False):
    """The keyword arguments of `Pipeline`."""

    device: str | Device | None
