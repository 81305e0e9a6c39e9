"""The gate compares whole pictures with diffusers' own, so that what both sides of a component leave out shows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import copy
from fewstep.bundle import Bundle
from fewstep.commands.export import picture_lines
from fewstep.errors import GateError
from fewstep.export import export_bundle
from fewstep.export.checkpoint.compose import compose_checkpoint
from fewstep.export.gate.pictures import TASKS, make_pictures
from fewstep.export.gate.reference import make_reference
from fewstep.export.gate.requests import judge_pictures, least_psnr
from fewstep.families import Family, find_family
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

STATISTICS = {"latents_mean": [0.4, -0.3, 0.2, -0.1], "latents_std": [1.6, 0.7, 1.2, 0.5]}


def stating(folder: Path, place: str, **changes: Any) -> Path:
    file = folder / place
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


@pytest.mark.parametrize("name", ["sd1_bundle", "sd2_bundle", "sdxl_bundle"])
def test_the_manifest_says_how_near_both_pictures_are(name: str, request: pytest.FixtureRequest) -> None:
    bundle: Bundle = request.getfixturevalue(name)
    assert bundle.gate["status"] == "passed"
    assert tuple(bundle.gate["pictures"]) == TASKS
    for verdict in bundle.gate["pictures"].values():
        assert verdict["status"] == "passed"
        assert verdict["limit_db"] == 75.0
        assert verdict["psnr_db"] is None or verdict["psnr_db"] >= 75.0


def test_what_both_sides_of_a_component_leave_out_is_found(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mistake that once passed: statistics of the VAE's latents, which neither graph nor torch's module read."""
    folder = stating(copy(tiny_sdxl, tmp_path / "checkpoint"), "vae/config.json", **STATISTICS)

    def leave_out(family: Family, config: Any) -> dict[str, Any]:
        return {k: v for k, v in config.items() if k not in STATISTICS}

    monkeypatch.setattr(type(find_family("sdxl")), "loaded_vae", leave_out)
    reference = tmp_path / "reference.safetensors"
    make_reference(compose_checkpoint(folder), reference, dtypes={}, quick=True)
    with pytest.raises(GateError, match=r"picture of text to image .* dB") as failure:
        export_bundle(folder, tmp_path / "bundle", reference=reference)
    assert failure.value.exit_code == 5
    assert not (tmp_path / "bundle").exists()


def test_a_scheduler_read_otherwise_is_found(tiny_sd1: Path, sd1_bundle: Bundle) -> None:
    """One that a component's comparison never sees."""
    reference = sd1_bundle.folder / "reference.safetensors"
    assert {v["status"] for v in judge_pictures(sd1_bundle, reference).values()} == {"passed"}
    other = replace(sd1_bundle, scheduler={**sd1_bundle.scheduler, "steps_offset": 0})
    with pytest.raises(GateError, match="picture of"):
        judge_pictures(other, reference)


def test_why_pictures_were_not_compared_is_recorded(sd1_bundle: Bundle, tmp_path: Path) -> None:
    reference = sd1_bundle.folder / "reference.safetensors"
    with safe_open(reference, framework="np") as file:
        metadata = file.metadata()
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(reference), bare, metadata={k: v for k, v in metadata.items() if k != "pictures"})
    assert "holds no pictures" in judge_pictures(sd1_bundle, bare)["status"]
    half = {n: replace(c, dtype="bfloat16") for n, c in sd1_bundle.components.items()}
    assert "bfloat16" in judge_pictures(replace(sd1_bundle, components=half), reference)["status"]
    halves = {n: replace(c, dtype="float16") for n, c in sd1_bundle.components.items()}
    assert least_psnr(replace(sd1_bundle, components=halves)) < least_psnr(sd1_bundle)


def test_what_diffusers_says_of_a_checkpoint_is_recorded(tiny_sd1: Path, tmp_path: Path) -> None:
    folder = copy(tiny_sd1, tmp_path / "checkpoint")
    scheduler = {"_class_name": "DPMSolverSDEScheduler"}
    stating(folder, "scheduler/scheduler_config.json", **scheduler)
    stating(folder, "model_index.json", scheduler=["diffusers", "DPMSolverSDEScheduler"])
    checkpoint = compose_checkpoint(folder)
    tensors, asked = make_pictures(checkpoint)
    assert not tensors
    assert all("Brownian" in a["not_run"] for a in asked.values())
    euler = replace(checkpoint, scheduler={**checkpoint.scheduler, "_class_name": "EulerDiscreteScheduler"})
    stating(folder, "model_index.json", scheduler=["diffusers", "NoSuchScheduler"])
    _, asked = make_pictures(euler)
    assert all("NoSuchScheduler" in a["not_run"] for a in asked.values())


def test_the_references_pictures_show_something(sd1_bundle: Bundle) -> None:
    pictures = load_file(sd1_bundle.folder / "reference.safetensors")
    shown = {n: v for n, v in pictures.items() if n.startswith("picture/")}
    assert len(shown) == 3
    assert all(v.dtype == np.uint8 and v.std() > 5 for v in shown.values())


def test_the_command_says_how_near_pictures_are_or_why_it_does_not_know() -> None:
    passed = {"status": "passed", "psnr_db": 81.4}
    assert picture_lines({"text_to_image": passed, "image_to_image": {**passed, "psnr_db": None}}) == [
        "    text to image: diffusers' own, at 81 dB",
        "    image to image: diffusers' own, to the last bit",
    ]
    assert picture_lines({"status": "not run: no kernels"}) == ["    pictures: not run: no kernels"]
    assert picture_lines({}) == []
