"""How the fields of a request say the arguments of a call: each has a field, or a reason why it has none."""

from __future__ import annotations

from typing import Any

from ...runtime.call import CLIP_ARGUMENTS
from ...runtime.second_pass import SecondPass
from .errors import HttpError

RANDOM = -1
"""As a seed, what others call so: as if it were left out."""
PLAIN = {
    **{"steps": "num_inference_steps", "guidance": "guidance_scale", "options": "sampler_options"},
    **{"negative": "negative_prompt", "negative_2": "negative_prompt_2"},
    **{
        name: name
        for name in (
            *("prompt_2", "prompt_syntax", "long_prompts", "clip_skip", "loras"),
            *("sampler", "schedule", "schedule_digest", "timesteps", "sigmas", "compat"),
            *("seed", "seed_device", "shared_stream", "variation_seed", "variation", "decoder"),
            *("original_size", "crop_top_left", "target_size"),
            *("negative_original_size", "negative_crop_top_left", "negative_target_size"),
        )
    },
}
"""Arguments of a call by the fields that say them as they are."""
EDITING = {name: name for name in ("strength", "fit", "mask_threshold", "noise_level")}
"""The same, of a call with a picture to start from."""
SHAPED = {
    **{"images_per_prompt": "n", "size": "size", "image": "image", "mask": "mask", "guess_mode": "guess_mode"},
    **dict.fromkeys(("control", "controlnet_conditioning_scale", "canny"), "control"),
    **dict.fromkeys(("control_guidance_start", "control_guidance_end"), "control"),
    **dict.fromkeys(("ip_adapter_image", "ip_adapter_scale"), "ip_adapter"),
}
"""Arguments by the fields or files that say them in a form of their own."""
NOT_TAKEN = {
    **dict.fromkeys(
        ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds", "latents"),
        "an array of floats, which a client would have to make with the model's own parts",
    ),
    **dict.fromkeys(CLIP_ARGUMENTS, "of clips, which no server makes"),
}
"""Arguments of a call that no request can say, each with the reason."""


def arguments(call: Any) -> dict[str, Any]:
    """A call as `Server.submit` takes it."""
    given = {argument: getattr(call, name) for argument, name in PLAIN.items()}
    options = {name: value for name, value in given.items() if value is not None}
    for name in ("seed", "variation_seed"):
        if options.get(name) == RANDOM:
            del options[name]
    options["images_per_prompt"] = call.n or 1
    if call.size not in (None, "auto"):
        options["size"] = _sides(call.size)
    if call.hires is not None:
        options["second"] = _second_pass(call.hires)
    return options


def editing_arguments(call: Any) -> dict[str, Any]:
    """What a call says of the picture that it starts from."""
    given = {argument: getattr(call, name) for argument, name in EDITING.items()}
    options = {name: value for name, value in given.items() if value is not None}
    return options | ({"mask_threshold": None} if call.mask_threshold == "none" else {})


def _second_pass(hires: Any) -> SecondPass:
    given = {k: v for k in ("scale", "size", "strength", "steps", "upscaler") if (v := getattr(hires, k)) is not None}
    if "size" in given:
        if "scale" in given:
            raise HttpError(422, "invalid_combination", "hires has a scale and a size; one is taken", param="hires")
        given |= {"size": _sides(given["size"]), "scale": None}
    return SecondPass(**given)


def _sides(size: str) -> tuple[int, int]:
    width, _, height = size.partition("x")
    return int(width), int(height)
