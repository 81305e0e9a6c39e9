"""A folder of pictures as latents, for the bound's data."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import ArgumentError, MissingError
from ..runtime import Pipeline
from ..runtime.arrays import Float32

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MOST_FILES = 1024


def encode_folder(pipeline: Pipeline, folder: Path, size: tuple[int, int]) -> list[Float32]:
    """The pictures of a folder by name, each cut to `size` (width, height), as latents float32 [C, h, w].

    Raises `MissingError` where there is no folder, `ArgumentError` for none or too many pictures in it.
    """
    if not folder.is_dir():
        raise MissingError(f"no folder {str(folder)!r}", expected="a folder of pictures")
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    if not 1 <= len(files) <= MOST_FILES:
        raise ArgumentError(
            f"{len(files)} pictures in {str(folder)!r}", expected=f"1 to {MOST_FILES} ({', '.join(SUFFIXES)})"
        )
    latents = []
    for seed, file in enumerate(files):
        asked = pipeline.request(
            "", image=file, size=size, fit="cover", strength=1.0, steps=1, sampler="euler", seed=seed, guidance=1.0
        )
        encoded = pipeline.prepare(asked).latents
        if encoded is not None:
            latents.append(np.asarray(encoded[0], np.float32))
    return latents
