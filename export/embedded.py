"""The model that travels with fewstep: two small checkpoints, their graphs and references, exported without torch."""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import Path

from ..bundle import Bundle
from ..engines.kept import find_kept, keeping, kept_folder
from ..errors import ArgumentError, MissingError
from ..places import writing
from .trace.graphs import RECIPE

MODELS = ("base", "student")


def embedded_checkpoint(model: str) -> Path:
    """The folder of an embedded checkpoint in diffusers' layout."""
    if model not in MODELS:
        raise ArgumentError(f"no embedded model {model!r}", expected=f"one of {', '.join(MODELS)}")
    folder = Path(str(resources.files(__package__).joinpath("demo", model)))
    if not folder.is_dir():
        raise MissingError(f"the embedded model {model!r} is not in this installation", remedy="Install fewstep again.")
    return folder


def embedded_bundle(model: str) -> tuple[Bundle, bool]:
    """The bundle of an embedded model in the user's cache, and whether it was exported just now.

    Its folder is named by what went into it, so that another version of fewstep or of the model makes another one.
    """
    checkpoint = embedded_checkpoint(model)
    digest = hashlib.sha256(str(RECIPE).encode())
    for file in sorted(checkpoint.rglob("*")):
        if file.is_file():
            digest.update(f"{file.relative_to(checkpoint)}\0{file.stat().st_size}\0".encode())
            digest.update(file.read_bytes())
    folder = kept_folder("embedded", f"{model}-{digest.hexdigest()[:12]}")
    kept = find_kept(folder)
    if kept is not None:
        return kept, False
    with writing("the embedded model's bundle", folder.parent), keeping(folder):
        kept = find_kept(folder)
        if kept is not None:
            return kept, False
        from .export import export_bundle

        reference = checkpoint / "reference.safetensors"
        return export_bundle(checkpoint, folder, name=f"embedded-{model}", reference=reference), True
