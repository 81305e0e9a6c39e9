"""Checkpoints made of parts: single files, UNets over a base, other VAEs."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import copy, make_lora, write_lora
from fewstep.bundle import Bundle, read_bundle
from fewstep.cli import main
from fewstep.errors import (
    ArgumentError,
    CorruptError,
    MissingError,
    UnsafeFileError,
    UnsupportedError,
)
from fewstep.export import export_bundle
from fewstep.export.checkpoint.compose import compose_checkpoint, read_tensors
from fewstep.export.checkpoint.folder import Checkpoint
from fewstep.runtime.pictures.infotext import infotext
from fewstep.runtime.pictures.parameters import check_parameters
from fewstep.runtime.request import make_request
from fewstep.runtime.result import picture_parameters
from fewstep.values import Reader
from fewstep.weights.stored import convert, open_tensors
from refusals import refused, rewrite
from safetensors.numpy import load_file, save_file

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"


def hashes(bundle: Any) -> dict[str, str]:
    return {n: c.weights_sha256 for n, c in bundle.components.items()}


def tensors_of(checkpoint: Checkpoint, name: str, keys: list[str]) -> dict[str, np.ndarray]:
    """A part's weights as an export reads them, in float32."""
    part = checkpoint.parts[name]
    found = read_tensors(part, open_tensors(part.files), keys)
    plain = {k.removeprefix("text_model."): v for k, v in found.items()}
    return {k: convert(plain[k.removeprefix("text_model.")], "float32", k) for k in keys}


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_single_file_holds_the_folders_tensors(
    family: str, originals: dict[str, Path], scrambled: dict[str, Path], request: pytest.FixtureRequest
) -> None:
    """Every tensor of every part, byte for byte; and diffusers' own conversion of the same file agrees."""
    from fewstep.export.gate.loading import load_model

    folder: Path = request.getfixturevalue(f"tiny_{family}")
    checkpoint = compose_checkpoint(originals[family], base=scrambled[family])
    assert checkpoint.family == family
    for name, part in checkpoint.parts.items():
        stem = "model" if name.startswith("text") else "diffusion_pytorch_model"
        expected = load_file(folder / name / f"{stem}.safetensors")
        found = tensors_of(checkpoint, name, sorted(expected))
        theirs = {k.removeprefix("text_model."): v for k, v in load_model(checkpoint, part).state_dict().items()}
        for key, value in expected.items():
            np.testing.assert_array_equal(found[key].reshape(value.shape), value, err_msg=key)
            np.testing.assert_array_equal(theirs[key.removeprefix("text_model.")].numpy(), value, err_msg=key)


def test_a_single_file_gives_the_folders_bundle(
    originals: dict[str, Path], scrambled: dict[str, Path], tiny_sd1: Path, tmp_path: Path
) -> None:
    expected = export_bundle(tiny_sd1, tmp_path / "folder", gate=False)
    found = export_bundle(originals["sd1"], tmp_path / "file", base=scrambled["sd1"], gate=False)
    assert hashes(found) == hashes(expected)
    assert (found.family, found.scheduler, found.tokenizers) == ("sd1", expected.scheduler, expected.tokenizers)
    assert found.components["unet"].source["files"][0]["file"] == "sd1.safetensors"
    sha256 = hashlib.sha256(originals["sd1"].read_bytes()).hexdigest()
    assert found.components["unet"].source["files"][0]["sha256"] == sha256
    assert (found.checkpoint_sha256, expected.checkpoint_sha256) == (sha256, None)
    (parameters,) = picture_parameters(found, make_request(found, "a ring", seed=1))
    assert f", Model hash: {sha256[:10]}, Model: {found.name}, " in infotext(parameters)
    check_parameters(parameters, Reader(place="a picture"))
    (parameters,) = picture_parameters(expected, make_request(expected, "a ring", seed=1))
    assert "Model hash" not in infotext(parameters)


@pytest.mark.parametrize("changed", ["files", "loras", "replaced", "digest", "missing"])
def test_what_is_more_than_one_file_has_no_hash_of_a_checkpoint(sd1_bundle: Bundle, changed: str) -> None:
    """Of nothing but one file: not of two, nor of one with LoRAs in it, nor with a part of another bundle."""
    own: dict[str, Any] = {"part": "unet", "files": [{"file": "m.safetensors", "sha256": "ab" * 32, "licence": None}]}
    told = {
        "files": {"files": [*own["files"], *own["files"]]},
        "loras": {"loras": [{"file": "l.safetensors"}]},
        "digest": {"files": [{"file": "m.safetensors", "sha256": "abc"}]},
        "missing": {"files": ["m.safetensors"]},
    }
    components = {n: replace(c, source=own) for n, c in sd1_bundle.components.items()}
    assert replace(sd1_bundle, components=components).checkpoint_sha256 == "ab" * 32
    source = {"replaced": ["unet"]} if changed == "replaced" else {}
    other = replace(components["unet"], source=own | told.get(changed, {}))
    assert replace(sd1_bundle, components=components | {"unet": other}, source=source).checkpoint_sha256 is None


def test_a_unet_file_over_a_base(originals: dict[str, Path], tiny_sd1: Path, tmp_path: Path) -> None:
    """Both layouts, with and without a prefix; everything else stays the base's."""
    weights = load_file(tiny_sd1 / UNET)
    other = {k: v * np.float32(0.5) for k, v in weights.items()}
    save_file(other, tmp_path / "unet.safetensors")
    original = {
        k.removeprefix("model.diffusion_model."): v * np.float32(0.5)
        for k, v in load_file(originals["sd1"]).items()
        if k.startswith("model.diffusion_model.")
    }
    save_file(original, tmp_path / "original.safetensors")
    base = export_bundle(tiny_sd1, tmp_path / "base", gate=False)
    found = [export_bundle(tiny_sd1, tmp_path / n, unet=tmp_path / f"{n}.safetensors", gate=False)
             for n in ("unet", "original")]  # fmt: skip
    assert hashes(found[0]) == hashes(found[1])
    changed = {n for n in hashes(base) if hashes(base)[n] != hashes(found[0])[n]}
    assert changed == {"unet"}
    bundled = load_file(found[0].path("unet.safetensors"))
    assert len(bundled) == len(other)


def test_another_vae_by_file_and_by_folder(originals: dict[str, Path], tiny_sd1: Path, tmp_path: Path) -> None:
    folder = copy(tiny_sd1, tmp_path / "other")
    save_file({k: v * np.float32(0.5) for k, v in load_file(folder / VAE).items()}, folder / VAE)
    base = hashes(export_bundle(tiny_sd1, tmp_path / "base", gate=False))
    sources = {"file": folder / VAE, "part": folder / "vae", "whole": folder}
    found = [hashes(export_bundle(tiny_sd1, tmp_path / n, vae=p, gate=False)) for n, p in sources.items()]
    assert found[0] == found[1] == found[2]
    assert {n for n in base if base[n] != found[0][n]} == {"vae_decoder", "vae_encoder"}
    same = hashes(export_bundle(folder, tmp_path / "same", vae=originals["sd1"], gate=False))
    assert same == base


def test_parts_that_do_not_belong_together(
    originals: dict[str, Path], tiny_sd1: Path, tiny_sdxl: Path, tmp_path: Path
) -> None:
    target = tmp_path / "b"
    refused(originals["sd1"], target, UnsupportedError, "single file.*--base")
    refused(originals["sdxl"], target, ArgumentError, "width 64", base=tiny_sd1)
    refused(tiny_sd1, target, ArgumentError, "width 64", unet=tiny_sdxl / UNET)
    refused(tiny_sd1, target, ArgumentError, "no single file", base=tiny_sd1)
    refused(tiny_sd1, target, MissingError, "no file", unet=tmp_path / "none.safetensors")
    refused(tiny_sd1, target, MissingError, "no LoRA file", loras=[(tmp_path / "none.safetensors", 1.0)])
    refused(tiny_sd1, target, ArgumentError, "scale", loras=[(tiny_sd1 / UNET, float("nan"))])
    (tmp_path / "l.pt").write_bytes(b"\x80\x04.")
    refused(tiny_sd1, target, UnsafeFileError, "pickle", loras=[(tmp_path / "l.pt", 1.0)])
    refused(tiny_sd1, target, UnsafeFileError, "pickle", vae=tmp_path / "l.pt")
    refused(tiny_sd1, target, CorruptError, "no UNET that is known", unet=tiny_sd1 / VAE)


def test_single_files_that_are_something_else(originals: dict[str, Path], tiny_sd1: Path, tmp_path: Path) -> None:
    target, file = tmp_path / "b", tmp_path / "m.safetensors"
    first = "model.diffusion_model.input_blocks.0.0.weight"

    def wide(weights: dict[str, np.ndarray]) -> None:
        weights[first] = np.concatenate([weights[first], weights[first], weights[first][:, :1]], axis=1)

    rewrite(originals["sd1"], file, wide)
    refused(file, target, UnsupportedError, "takes 9 channels", base=tiny_sd1)
    rewrite(originals["sd1"], file, lambda w: w.update({"model.diffusion_model.extra.weight": w[first]}))
    refused(file, target, CorruptError, "1 weights.*extra.weight", base=tiny_sd1)
    rewrite(originals["sd1"], file, lambda w: w.pop("model.diffusion_model.out.2.bias"))
    refused(file, target, CorruptError, "lacks 1 weights.*conv_out.bias", base=tiny_sd1)
    rewrite(originals["sd1"], file, lambda w: [w.pop(k) for k in list(w) if k.startswith("first_stage")])
    refused(file, target, MissingError, "no vae", base=tiny_sd1)
    save_file({"conditioner.embedders.0.model.ln_final.weight": np.ones(2, np.float32)}, file)
    refused(file, target, UnsupportedError, "refiner", base=tiny_sd1)


def test_the_command_line_takes_parts_and_warns(
    tiny_sd1: Path, originals: dict[str, Path], scrambled: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    file = write_lora(make_lora(tiny_sd1, text=False), tmp_path / "lcm-lora.safetensors", "kohya")
    parts = [str(originals["sd1"]), str(tmp_path / "b"), "--base", str(scrambled["sd1"]), "--lora", f"{file}:0.25"]
    assert main(["export", *parts, "--vae", str(tiny_sd1 / "vae"), "--no-gate"]) == 0
    assert "preset lcm-lora: lcm, 4 steps" in capsys.readouterr().out
    bundle = read_bundle(tmp_path / "b")
    assert bundle.components["unet"].source["loras"][0]["scale"] == 0.25
    image = ["--prompt", "a", "--seed", "1", "--size", "32x32", "--output", str(tmp_path / "i.png")]
    assert main(["run", str(tmp_path / "b"), *image]) == 0
    assert "warning" not in capsys.readouterr().err
    assert main(["run", str(tmp_path / "b"), *image, "--guidance", "7"]) == 0
    assert "warning: lcm-lora was made for guidance of at most 2, not 7." in capsys.readouterr().err
