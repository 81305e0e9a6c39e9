"""`from_pretrained`: a bundle's folder, or a checkpoint that is exported on the spot, with diffusers' own options."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...bundle import MANIFEST, Bundle
from ...errors import ArgumentError, UnknownNameError, UnsupportedError
from ...families import all_families
from ..group import PipelineGroup
from ..library import is_embedded, open_bundle, open_library
from ..loader import load
from ..pipeline import Pipeline
from .components import Opened

PRECISIONS = ("float32", "float16", "bfloat16")
IGNORED = ("low_cpu_mem_usage", "requires_safety_checker", "force_download", "offload_state_dict")
"""They change how diffusers loads or warns, and no picture."""
ABSENT = ("safety_checker", "feature_extractor", "image_encoder", "add_watermarker", "custom_pipeline", "mirror")
"""Bundles hold none of these: `None` and `False` are what is done anyway, anything else is refused."""
READ = ("torch_dtype", "dtype", "use_safetensors", "variant", "revision", "local_files_only")
CONTROLNET = "controlnet"
_LOADED = tuple(n for n, p in inspect.signature(Pipeline).parameters.items() if p.kind is p.KEYWORD_ONLY)


def component_options() -> set[str]:
    """The components that `from_pretrained` and constructors take."""
    encoders = [e for f in all_families() for e in f.text_encoders]
    return {"scheduler", "unet", "vae", *(e.name for e in encoders), *(e.tokenizer for e in encoders)}


def open_pretrained(source: Any, options: Mapping[str, Any]) -> tuple[Opened, dict[str, Any]]:
    """The pipeline of a `Pipeline`, a bundle, a bundle's folder, a diffusers folder or a hub id; and what replaces its
    components. Raises `UnknownNameError` and `UnsupportedError` for options by their names.
    """
    known = {CONTROLNET, *_LOADED, *READ, *IGNORED, *ABSENT, *component_options(), "devices"}
    for name in options:
        if name not in known:
            raise UnknownNameError("option of from_pretrained", name, known)
    for name in ABSENT:
        if options.get(name):
            raise UnsupportedError(f"{name} in from_pretrained", remedy="Leave it out: bundles hold none.")
    if options.get("use_safetensors") is False:
        raise UnsupportedError("use_safetensors is False", expected="safetensors: pickles are not read")
    bundled = isinstance(source, (Pipeline, PipelineGroup, Bundle)) or _is_bundle(source)
    if bundled and options.get(CONTROLNET) is not None:
        raise UnsupportedError(
            "controlnet beside a bundle",
            expected="the checkpoint: a ControlNet is traced with its UNet",
            remedy="Give the checkpoint itself, or export it with: --controlnet NAME=PATH",
        )
    parts = {k: v for k, v in options.items() if k in component_options() and v is not None}
    if isinstance(source, (Pipeline, PipelineGroup)):
        _check_bundle(source.bundle, options)
        return source, parts
    bundle = source if isinstance(source, Bundle) else _bundle(source, options)
    if bundle is source or _is_bundle(source):
        _check_bundle(bundle, options)
    return load(bundle, **{k: v for k, v in options.items() if k in (*_LOADED, "devices")}), parts


def _is_bundle(source: Any) -> bool:
    return is_embedded(source) or (isinstance(source, (str, os.PathLike)) and (Path(source) / MANIFEST).is_file())


def _bundle(source: Any, options: Mapping[str, Any]) -> Bundle:
    folder = Path(source)
    if _is_bundle(source) or not (folder.is_dir() or "/" in str(source)):
        return open_bundle(source)
    return open_library().export_checkpoint(
        str(source),
        dtype=precision_of(options.get("torch_dtype", options.get("dtype"))) or "float32",
        variant=options.get("variant"),
        revision=options.get("revision"),
        offline=bool(options.get("local_files_only")),
        controlnets=_listed(options.get(CONTROLNET)),
    )


def _listed(given: Any) -> list[Any]:
    if given is None:
        return []
    nets = getattr(given, "nets", given)  # diffusers' MultiControlNetModel
    return list(nets) if isinstance(nets, Iterable) and not isinstance(nets, (str, os.PathLike)) else [nets]


def precision_of(value: Any) -> str | None:
    """`torch.float16`, or its name, as ours; `None` for `None`."""
    if value is None:
        return None
    name = str(value).removeprefix("torch.")
    if name not in PRECISIONS:
        raise UnknownNameError("torch_dtype", name, PRECISIONS)
    return name


def _check_bundle(bundle: Bundle, options: Mapping[str, Any]) -> None:
    """Refuse what a checkpoint would be asked and a bundle has decided."""
    asked, own = precision_of(options.get("torch_dtype", options.get("dtype"))), bundle.component("unet").dtype
    if asked not in (None, own):
        raise ArgumentError(
            f"torch_dtype is {asked}, and the bundle {bundle.name!r} holds {own}",
            expected=f"torch.{own}",
            remedy="Export the checkpoint again with --dtype, or give the checkpoint itself.",
        )
    variant = options.get("variant")
    if variant is not None and not any(f".{variant}." in name for name in _files(bundle)):
        raise ArgumentError(
            f"variant is {variant!r}, and the bundle {bundle.name!r} was not made from it",
            remedy="Export the checkpoint with --variant, or give the checkpoint itself.",
        )
    if options.get("revision") not in (None, bundle.source.get("revision")):
        raise ArgumentError(
            f"revision is {options['revision']!r}, and the bundle is of {bundle.source.get('revision')!r}",
            remedy="Leave it out, or give the hub id.",
        )


def _files(bundle: Bundle) -> list[str]:
    """The names of the weight files that a bundle was made from."""
    return [
        str(f.get("file", f.get("name", ""))) for c in bundle.components.values() for f in c.source.get("files", ())
    ]
