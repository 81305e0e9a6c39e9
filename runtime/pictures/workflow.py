"""A picture's parameters as a prompt for ComfyUI, of fewstep's nodes there and its core's node that saves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .infotext import most_guidance

LOAD, LORA, SCHEDULE, SAMPLE, DECODE, SAVE = (
    *("FewstepLoad", "FewstepLora", "FewstepSchedule", "FewstepSample", "FewstepDecode", "SaveImage"),
)
"""The classes of nodes, as `fewstep.integrations.comfyui` names them to ComfyUI."""
KNOWN = frozenset(
    {"bundle", "model", "prompt", "negative", "seed", "index", "steps", "guidance", "width", "height", "sampler"}
    | {"schedule", "compat", "sampler_name", "schedule_name", "version", "unet_sha256", "loras", "options", "recorded"}
    | {"strength", "image", "variation", "variation_seed", "checkpoint_sha256"}
)
"""What the nodes have inputs for, or need not know."""


def comfy_prompt(p: Mapping[str, Any]) -> dict[str, Any] | None:
    """Nodes by number, each with its class and inputs, as ComfyUI's queue takes them; links are [node, output].

    `None` for a call that the nodes do not do: from a picture, in two passes, of a batch with one stream of noise.
    """
    recorded, options = dict(p.get("recorded") or {}), dict(p.get("options") or {})
    plain = {k: v for k, v in recorded.items() if isinstance(v, (str, int, float))}
    if p.keys() - KNOWN or p.get("image") or plain != recorded:
        return None
    nodes: dict[str, Any] = {}

    def add(kind: str, **inputs: Any) -> list[Any]:
        nodes[str(len(nodes) + 1)] = {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}
        return [str(len(nodes)), 0]

    pipeline = add(LOAD, bundle=str(p.get("bundle", "")), backend="auto")
    for name, scale in (p.get("loras") or {}).items():
        parts = scale if isinstance(scale, Mapping) else {"unet": scale, "text": scale}
        text = next((s for c, s in parts.items() if c != "unet"), 0.0)
        pipeline = add(LORA, pipeline=pipeline, file=name, strength_model=parts.get("unet", 0.0), strength_clip=text)
    for name in ("sampler", "schedule", "compat"):
        if p.get(name) is not None:
            options[name] = p[name]
    schedule = add(
        SCHEDULE,
        sampler=options.pop("sampler", "") or "",
        schedule=options.pop("schedule", "") or "",
        steps=p.get("steps") or 0,
        options=json.dumps(options),
    )
    taken = {**plain, **{k: p[k] for k in ("variation", "variation_seed") if k in p}}
    taken |= {"negative": ""} if p.get("negative") == "" else {}
    latent = add(
        SAMPLE,
        pipeline=pipeline,
        schedule=schedule,
        prompt=str(p.get("prompt", "")),
        negative=p.get("negative") or "",
        seed=p.get("seed") or 0,
        guidance=most_guidance(p) or 0.0,
        width=p.get("width"),
        height=p.get("height"),
        batch_size=1,
        denoise=1.0,
        arguments=json.dumps(taken),
    )
    images = add(DECODE, pipeline=pipeline, samples=latent)
    add(SAVE, images=images, filename_prefix="fewstep")
    return nodes
