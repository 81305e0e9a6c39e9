"""Checkpoints of many makers and ages give diffusers' own pictures, pipeline against pipeline, or are refused."""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import fewstep
import numpy as np
import pytest
import torch
import transformers
from checkpoints import psnr
from corpus import Entry, entries
from fewstep.bundle import Bundle
from fewstep.errors import CorruptError, MissingError, UnsafeFileError, UnsupportedError
from fewstep.export import export_bundle
from PIL import Image

ENTRIES = list(entries())
EQUAL, REFUSED = [e for e in ENTRIES if e.refused is None], [e for e in ENTRIES if e.refused is not None]
PROMPT, NEGATIVE_SEED, GUIDANCE, STEPS = "a red circle, hello!", 31, 3.0, 4
CLASSES = {
    "sdxl": (diffusers.StableDiffusionXLPipeline, diffusers.StableDiffusionXLImg2ImgPipeline),
    "sd": (diffusers.StableDiffusionPipeline, diffusers.StableDiffusionImg2ImgPipeline),
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    level = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    diffusers.utils.logging.set_verbosity(level)


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An entry's checkpoint, made of the tiny one of its family."""
    entry: Entry = request.param
    made = Path(shutil.copytree(request.getfixturevalue(f"tiny_{entry.base}"), tmp_path / "checkpoint"))
    for edit in entry.edits:
        edit(made)
    return made


def exported(entry: Entry, folder: Path) -> Bundle:
    source, options = folder, dict(entry.export)
    if options.pop("base", False):
        source, options["base"] = folder.parent / f"{folder.name}.safetensors", folder
    return export_bundle(source, folder.parent / "bundle", gate=False, **options)


def reference(entry: Entry, folder: Path, picture: Image.Image | None) -> np.ndarray:
    """diffusers' picture, loaded as its users load it."""
    cls = CLASSES["sdxl" if entry.base == "sdxl" else "sd"][picture is not None]
    if entry.export.get("base"):
        file = folder.parent / f"{folder.name}.safetensors"
        options: dict[str, Any] = {"config": str(folder), "local_files_only": True, "torch_dtype": torch.float32}
        if entry.base == "sdxl":  # told apart from the first encoder by its width, which is the same in tiny ones
            second = folder / "text_encoder_2"
            options["text_encoder_2"] = transformers.CLIPTextModelWithProjection.from_pretrained(second)
        pipe = cls.from_single_file(str(file), **options)
    else:
        pipe = cls.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32, **entry.loads)
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "np"}
    if picture is not None:
        call |= {"image": picture, "strength": 0.6}
    made = pipe(PROMPT, generator=torch.Generator().manual_seed(NEGATIVE_SEED), **call).images
    return (np.asarray(made)[0] * 255).round().astype(np.uint8)


@pytest.mark.parametrize(("entry", "folder"), [(e, e) for e in EQUAL], ids=[e.name for e in EQUAL], indirect=["folder"])
def test_it_gives_the_librarys_picture(entry: Entry, folder: Path) -> None:
    pipe = fewstep.load(exported(entry, folder))
    assert entry.why or entry.least == 75.0
    for picture in (None, drawing(pipe.size))[: 1 + entry.image]:
        theirs = reference(entry, folder, picture)
        call = {} if picture is None else {"image": picture, "strength": 0.6}
        ours = pipe(PROMPT, seed=NEGATIVE_SEED, steps=STEPS, guidance=GUIDANCE, **call).images[0]
        assert ours.shape == theirs.shape
        assert theirs.std() > 3, "the reference shows nothing"
        assert psnr(ours, theirs) >= entry.least


def drawing(size: tuple[int, int]) -> Image.Image:
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], -1).astype(np.uint8))


@pytest.mark.parametrize(
    ("entry", "folder"), [(e, e) for e in REFUSED], ids=[e.name for e in REFUSED], indirect=["folder"]
)
def test_it_is_refused_by_name(entry: Entry, folder: Path) -> None:
    with pytest.raises((UnsupportedError, MissingError, UnsafeFileError, CorruptError), match=entry.refused) as refusal:
        exported(entry, folder)
    assert refusal.value.expected or refusal.value.remedy
    assert not (folder.parent / "bundle").exists()


def test_the_documents_rules_name_entries_that_there_are() -> None:
    page = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\|.*\| ([^|]*) \|$", page.partition("## What diffusers changes")[2].partition("## The gate")[0], re.M
    )
    named = [name for row in rows for name in re.findall(r'"([^"]+)"', row)]
    assert len(rows) > 20
    assert set(named) <= {e.name for e in ENTRIES}
    assert f"{len(ENTRIES)} checkpoints" in page


def test_the_corpus_is_large() -> None:
    assert len({e.name for e in ENTRIES}) == len(ENTRIES) >= 90
    assert len(EQUAL) >= 60
