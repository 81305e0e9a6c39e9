"""diffusers' methods that change no picture: each does nothing here, and says what is done instead.

`REFUSED` are those whose absence would change pictures, with what to do about each.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

log = logging.getLogger("fewstep.runtime.diffusers_adapter")

_ATTENTION = "attention is one operation of the engine, which holds no matrix of scores"
_MEMORY = "engines stay where they were loaded; keep_text_encoders=False frees the text encoders between prompts"
_PRECISION = "the precision of each component was chosen when it was exported"
_COMPILED = "graphs are fused and compiled by the backend when engines are built"

INSTEAD: Mapping[str, str] = {
    "enable_attention_slicing": _ATTENTION,
    "disable_attention_slicing": _ATTENTION,
    "set_attention_slice": _ATTENTION,
    "enable_xformers_memory_efficient_attention": _ATTENTION,
    "disable_xformers_memory_efficient_attention": _ATTENTION,
    "set_use_memory_efficient_attention_xformers": _ATTENTION,
    "enable_model_cpu_offload": _MEMORY,
    "enable_sequential_cpu_offload": _MEMORY,
    "enable_group_offload": _MEMORY,
    "maybe_free_model_hooks": _MEMORY,
    "remove_all_hooks": _MEMORY,
    "reset_device_map": _MEMORY,
    "upcast_vae": _PRECISION,
    "fuse_qkv_projections": _COMPILED,
    "unfuse_qkv_projections": _COMPILED,
    "disable_freeu": "FreeU is not there to be switched off",
    "set_progress_bar_config": "there is no progress bar",
}
QUIET = ("set_progress_bar_config", "maybe_free_model_hooks", "remove_all_hooks")
"""Nobody need be told of these."""

REFUSED: Mapping[str, str] = {
    "load_ip_adapter": "Export the checkpoint with it: fewstep export CHECKPOINT FOLDER --ip-adapter FILE",
    "enable_freeu": "FreeU is not done.",
    "enable_layerwise_casting": "Choose precisions when the checkpoint is exported, with --dtype.",
    "encode_prompt": "Pass prompt_embeds made with diffusers' pipeline, or prompts.",
    "save_pretrained": "The bundle's folder is what can be kept and copied.",
    "from_single_file": "Export it over a base: fewstep export FILE FOLDER --base CHECKPOINT",
}


def quiet_method(name: str, said: set[str]) -> Callable[..., None]:
    """The method of a name of `INSTEAD`, which says once what is done instead."""

    def method(*_: Any, **__: Any) -> None:
        if name not in said and name not in QUIET:
            said.add(name)
            log.warning("%s does nothing here: %s.", name, INSTEAD[name])

    method.__name__ = name
    method.__doc__ = f"Nothing: {INSTEAD[name]}."
    return method
