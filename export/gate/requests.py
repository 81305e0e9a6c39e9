"""Whole requests in the gate: the bundle's pictures, by the runtime itself, against those of diffusers' pipeline.

The graphs run in ONNX Runtime on the CPU, one component after the other, so that no more is in memory at once than a
component's own comparison takes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from ...bundle import Bundle
from ...engines.backends.ort import OrtEngine
from ...engines.base import Engine
from ...engines.gate.gate import compare
from ...errors import GateError, NonFiniteError
from ...families.control import controls_of, picture_input
from ...families.decoders import FULL, TINY, TINY_DECODER
from ...families.image_prompt import IMAGE_ENCODER
from ...runtime.arrays import Float32, UInt8
from ...runtime.clip_prepare import prepare_clips
from ...runtime.clip_request import make_clip_request
from ...runtime.device.numpy_slots import NumpySlots
from ...runtime.pictures.image_prompt import ImagePrompts
from ...runtime.pictures.vae import Vae
from ...runtime.prepare import Prepared, prepare
from ...runtime.prompts.encoders import TextEncoders
from ...runtime.request import make_request
from ...values import parse_json

LEAST_PSNR_DB = 75.0
"""In float32, where pictures of the same arithmetic differ by single levels of single pixels."""
LEAST_PSNR_LOW_DB = 30.0
"""Where a component computes in less: what was left out of a request costs more than that."""
LEAST_PSNR_ZERO_SNR_DB = 50.0
"""Where sampling starts at the sigma of 4096 that stands for no signal at all: float32 keeps 3 digits of x0 there."""


def judge_pictures(bundle: Bundle, reference: Path) -> dict[str, Any]:
    """By task, how far the bundle's picture is from diffusers'; `GateError` for the first that is too far.

    A picture that could not be compared has a `status` that says why.
    """
    with safe_open(reference, framework="np") as file:
        asked = parse_json((file.metadata() or {}).get("pictures", "{}"), f"pictures of {reference.name}", finite=True)
        names = set(file.keys())
        pictures = {n: file.get_tensor(n) for n in names if n.startswith("picture/")}
    if not asked:
        return {"status": "not run: the reference holds no pictures"}
    low = [n for n, c in bundle.components.items() if c.dtype == "bfloat16"]
    if low:
        return {"status": f"not run: ONNX Runtime's CPU provider has no bfloat16 kernels ({', '.join(low)})"}
    return {task: _judge(bundle, task, stated, pictures) for task, stated in asked.items()}


def _judge(bundle: Bundle, task: str, stated: Mapping[str, Any], pictures: Mapping[str, UInt8]) -> dict[str, Any]:
    if "not_run" in stated:
        return {"status": f"not run: {stated['not_run']}"}
    image = pictures.get(f"picture/{task}/in/image")
    clip = bundle.model.clips
    if image is not None and bundle.model.pictures == "start" and "vae_encoder" not in bundle.components:
        return {"status": "not run: the bundle has no encoder"}
    expected = pictures[f"picture/{task}/out/{'frames' if clip else 'image'}"]
    limit = least_psnr(bundle)
    try:
        controls = {n: pictures.get(f"picture/{task}/in/{picture_input(n)}") for n in _controls(bundle)}
        prompting = pictures.get(f"picture/{task}/in/ip_adapter_image")
        if clip:
            made = {FULL: make_clip(bundle, stated, image)}
        else:
            made = make_picture(bundle, stated, image, controls, prompting)
        report = compare(made[FULL], expected)
    except NonFiniteError as error:
        raise _failure(task, error.found, limit) from error
    if report.psnr < limit:
        raise _failure(task, f"{report.psnr:.1f} dB", limit)
    return {
        "status": "passed",
        "psnr_db": report.psnr if math.isfinite(report.psnr) else None,
        "limit_db": limit,
        **({"tiny_decoder_db": compare(made[TINY], made[FULL]).psnr} if TINY in made else {}),
        **{k: stated[k] for k in ("width", "height", "steps", "seed")},
    }


def _failure(task: str, found: str, limit: float) -> GateError:
    return GateError(
        f"the picture of {task.replace('_', ' ')} is not that of diffusers' own pipeline: {found}",
        expected=f"{limit:.0f} dB or more",
        remedy="The components agree, so something between them differs: report the checkpoint's configurations, or "
        "leave the gate out with --no-gate.",
    )


def least_psnr(bundle: Bundle) -> float:
    """What pictures must agree to, by the components' precisions and the noise schedule."""
    if any(c.dtype != "float32" for c in bundle.components.values()):
        return LEAST_PSNR_LOW_DB
    return LEAST_PSNR_ZERO_SNR_DB if bundle.scheduler.get("rescale_betas_zero_snr") else LEAST_PSNR_DB


def _controls(bundle: Bundle) -> Collection[str]:
    return controls_of(bundle.component("unet").config)


def make_picture(
    bundle: Bundle,
    stated: Mapping[str, Any],
    image: UInt8 | None,
    controls: Mapping[str, UInt8 | None] | None = None,
    prompting: UInt8 | None = None,
) -> dict[str, UInt8]:
    """The picture of one request under the checkpoint's own scheduler, uint8 [H, W, 3], by each decoder there is."""
    plain = _with_own_scheduler(bundle)
    text = TextEncoders(plain, lambda: {n: _open(plain, n) for n in plain.text_encoders}, keep_engines=False)
    vae = Vae(plain, _open(plain, "vae_decoder"), lambda: _open(plain, "vae_encoder"))
    call = {k: stated[k] for k in ("steps", "guidance", "seed")} | {"size": (stated["width"], stated["height"])}
    if image is not None:
        call |= {"image": image} | ({"strength": stated["strength"]} if "strength" in stated else {})
    shown = {name: picture for name, picture in (controls or {}).items() if picture is not None}
    if shown:
        call |= {"control": shown}
    if prompting is not None:
        call |= {"ip_adapter_image": prompting}
    prompts = ImagePrompts(lambda: _open(plain, IMAGE_ENCODER))
    prepared = prepare(plain, text, vae, prompts, make_request(plain, stated["prompt"], **call))
    latent = _sampled(plain, prepared)
    decoded = {FULL: vae.decode_unguarded(latent)[0]}
    if TINY_DECODER in plain.components:
        tiny = Vae(plain, _open(plain, TINY_DECODER), lambda: _open(plain, "vae_encoder"))
        decoded[TINY] = tiny.decode_unguarded(latent)[0]
    return decoded


def make_clip(bundle: Bundle, stated: Mapping[str, Any], image: UInt8 | None) -> UInt8:
    """The clip of one request under the checkpoint's own scheduler, uint8 [F, H, W, 3]."""
    plain = _with_own_scheduler(bundle)
    vae = Vae(plain, _open(plain, "vae_decoder"), lambda: _open(plain, "vae_encoder"))
    call = {k: stated[k] for k in ("steps", "guidance", "seed", "frames", "decode_chunk")}
    request = make_clip_request(plain, image=image, size=(stated["width"], stated["height"]), **call)
    prepared = prepare_clips(plain, vae, ImagePrompts(lambda: _open(plain, IMAGE_ENCODER)), request)
    return vae.decode_unguarded(_sampled(plain, prepared), stated["decode_chunk"])[0]


def _with_own_scheduler(bundle: Bundle) -> Bundle:
    own = replace(
        bundle.defaults, sampler=None, schedule=None, preset=None, timesteps=None, prediction=None, options={}
    )
    return replace(bundle, defaults=own)


def _sampled(bundle: Bundle, prepared: Prepared) -> Float32:
    """The latent of a request's only image, or clip, behind an axis of one."""
    slots = NumpySlots(_open(bundle, "unet"), slots=1, shape=prepared.shape)
    slot = slots.admit(
        prepared.samplings[0], prepared.gaussians[0], None if prepared.latents is None else prepared.latents[0]
    )
    while not slots.sampling(slot).done:
        slots.tick([slot])
    latent: Float32 = np.empty((1, *prepared.shape), np.float32)
    slots.result(slot, latent[0])
    return latent


def _open(bundle: Bundle, name: str) -> Engine:
    part = bundle.component(name)
    return OrtEngine.from_onnx(
        bundle.path(part.graph), inputs=part.inputs, outputs=part.outputs, optimization="disabled"
    )
