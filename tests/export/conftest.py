"""Single files of the tiny checkpoints, and bases whose weights are all zero."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import copy, write_original
from safetensors.numpy import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def originals(tiny_sd1: Path, tiny_sd2: Path, tiny_sdxl: Path) -> dict[str, Path]:
    """The tiny checkpoints as single files."""
    folders = {"sd1": tiny_sd1, "sd2": tiny_sd2, "sdxl": tiny_sdxl}
    return {n: write_original(f, f.parent / f"{n}.safetensors") for n, f in folders.items()}


@pytest.fixture(scope="session")
def scrambled(tiny_sd1: Path, tiny_sd2: Path, tiny_sdxl: Path) -> dict[str, Path]:
    """Bases of the same configurations with all weights zero: nothing of theirs may reach a bundle."""
    made = {}
    for name, folder in {"sd1": tiny_sd1, "sd2": tiny_sd2, "sdxl": tiny_sdxl}.items():
        made[name] = copy(folder, folder.parent / "base")
        for file in made[name].glob("*/*.safetensors"):
            save_file({k: np.zeros_like(v) for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    return made
