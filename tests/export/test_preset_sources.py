"""Where presets are recognised, and what they carry into a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import make_lora, write_lora, write_original
from fewstep.bundle import read_bundle
from fewstep.errors import CorruptError
from fewstep.export import export_bundle
from fewstep.export.checkpoint.compose import compose_checkpoint, names_of
from fewstep.presets import recognise_preset
from fewstep.runtime.request import make_request
from safetensors.numpy import load_file, save_file


def titled(source: Path, target: Path, **metadata: str) -> Path:
    save_file(load_file(source), target, metadata=metadata)
    return target


def test_a_file_is_known_by_its_metadata(tiny_sd1: Path, tmp_path: Path) -> None:
    plain = write_lora(make_lora(tiny_sd1, text=False), tmp_path / "plain.safetensors", "kohya")
    for key in ("modelspec.title", "ss_output_name"):
        file = titled(plain, tmp_path / "style.safetensors", **{key: "LCM_LoRA_sd15"})
        found = recognise_preset(names_of(compose_checkpoint(tiny_sd1, loras=[(file, 1.0)])), "sd1")
        assert found is not None
        assert found.name == "lcm-lora", key
    assert recognise_preset(names_of(compose_checkpoint(tiny_sd1, loras=[(plain, 1.0)])), "sd1") is None


def test_a_single_files_metadata_counts(tiny_sd1: Path, tmp_path: Path) -> None:
    plain = write_original(tiny_sd1, tmp_path / "plain.safetensors")
    file = titled(plain, tmp_path / "model.safetensors", **{"modelspec.title": "LCM Dreamshaper v7"})
    found = recognise_preset(names_of(compose_checkpoint(file, base=tiny_sd1)), "sd1")
    assert found is not None
    assert found.name == "lcm"


def test_options_of_the_sampler_are_part_of_the_bundle(tiny_sd1: Path, sd1_bundle: Any, tmp_path: Path) -> None:
    """Hyper-SD's unified LoRA wants TCD with eta 1; what a request asks for goes before that."""
    file = write_lora(make_lora(tiny_sd1, text=False), tmp_path / "Hyper-SD15-1step-lora.safetensors", "kohya")
    bundle = export_bundle(tiny_sd1, tmp_path / "b", loras=[(file, 1.0)], gate=False)
    bundle = read_bundle(bundle.folder)
    assert bundle.defaults.options == {"eta": 1.0}

    def noises(**given: Any) -> float:
        program = make_request(bundle, "a", seed=0, size=(32, 32), **given).program
        latent = np.ones((1, 4, 2, 2))
        return float(np.abs(program.run(lambda x, t: 0 * x, latent, lambda: np.full_like(latent, 9.0))).max())

    request = make_request(sd1_bundle, "a", seed=0, size=(32, 32), sampler="tcd", steps=4, eta=1.0, compat="diffusers")
    plain, latent = request.program, np.ones((1, 4, 2, 2))
    assert noises() == pytest.approx(
        float(np.abs(plain.run(lambda x, t: 0 * x, latent, lambda: np.full_like(latent, 9.0))).max())
    )
    assert noises(eta=0.0) != pytest.approx(noises())


def test_options_that_are_no_numbers(sd1_bundle: Any, tmp_path: Path) -> None:
    data = json.loads((sd1_bundle.folder / "bundle.json").read_text())
    for wrong in ([], {"eta": "x"}, {"eta": True}):
        data["defaults"]["options"] = wrong
        (tmp_path / "bundle.json").write_text(json.dumps(data))
        with pytest.raises(CorruptError, match=r"bundle\.json"):
            read_bundle(tmp_path)
