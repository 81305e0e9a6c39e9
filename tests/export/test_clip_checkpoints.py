"""Checkpoints that make clips: what is read of them, what is refused, and what their manifests must agree in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import copy
from fewstep.bundle import read_bundle
from fewstep.errors import ArgumentError, CorruptError, FewstepError, UnsupportedError
from fewstep.export.checkpoint.compose import compose_checkpoint
from fewstep.export.checkpoint.folder import hub_files, open_checkpoint
from fewstep.families import find_family


def change(file: Path, **values: Any) -> None:
    stated = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in {**stated, **values}.items() if v is not ...}))


def test_what_a_bundle_says_of_its_clips(tiny_svd: Any) -> None:
    bundle = tiny_svd.bundle
    assert (bundle.family, bundle.latent.frames) == ("svd", 14)
    assert list(bundle.components) == ["image_encoder", "unet", "vae_decoder", "vae_encoder"]
    assert bundle.tokenizers == ()
    assert (bundle.defaults.width, bundle.defaults.height) == (32, 18)
    assert bundle.gate["status"] == "passed"
    assert bundle.gate["pictures"]["image_to_video"]["psnr_db"] >= 75
    inputs = {s.name: s.shape for s in bundle.component("unet").inputs}
    assert inputs["sample"] == ("rows", "frames", 4, "height", "width")
    assert bundle.component("vae_decoder").inputs[0].shape == ("chunk", 4, "height", "width")


def test_the_published_size() -> None:
    unet = {
        "sample_size": 96,
        "block_out_channels": [320, 640, 1280, 1280],
        "up_block_types": ["UpBlockSpatioTemporal"],
    }
    assert find_family("svd").default_size(unet, 8) == (1024, 576)


def test_attention_to_one_token_needs_its_value_alone(tiny_svd: Any) -> None:
    """Neither queries nor keys of attention to the picture are in the bundle; its gate compared the pictures."""
    from safetensors import safe_open

    with safe_open(tiny_svd.bundle.folder / "unet.safetensors", framework="np") as file:
        names = set(file.keys())
    assert any(n.endswith("attn2.to_v.weight") for n in names)
    assert not [n for n in names if "attn2.to_q" in n or "attn2.to_k" in n]


def test_what_is_fetched() -> None:
    index = {
        "_class_name": "StableVideoDiffusionPipeline",
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
        "unet": ["diffusers", "UNetSpatioTemporalConditionModel"],
    }
    files = hub_files(index, "fp16")
    assert {"image_encoder/model.fp16.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors"} <= set(files)
    assert "feature_extractor/*.json" in files
    pictures = {"_class_name": "StableDiffusionPipeline", "image_encoder": [None, None], "unet": index["unet"]}
    assert not [f for f in hub_files(pictures, None) if f.startswith(("image_encoder", "feature_extractor"))]


REFUSED: list[tuple[str, dict[str, Any], type[FewstepError], str]] = [
    ("image_encoder/config.json", {"image_size": 336}, UnsupportedError, "takes pictures of 336 pixels"),
    ("unet/config.json", {"in_channels": 9}, UnsupportedError, "takes 9 channels"),
    ("unet/config.json", {"in_channels": 4}, UnsupportedError, "takes 4 channels and gives 4"),
    ("unet/config.json", {"projection_class_embeddings_input_dim": 32}, UnsupportedError, "asks for embeddings of 32"),
    ("unet/config.json", {"num_frames": ...}, CorruptError, "does not state num_frames"),
    ("unet/config.json", {"num_frames": 5000}, CorruptError, "num_frames"),
    ("vae/config.json", {"latent_channels": 8}, ArgumentError, "latents of 8 channels"),
    ("model_index.json", {"image_encoder": [None, None]}, UnsupportedError, "has no image_encoder"),
    ("model_index.json", {"vae": ["diffusers", "AutoencoderKL"]}, UnsupportedError, "the vae is a 'AutoencoderKL'"),
    ("feature_extractor/preprocessor_config.json", {"image_mean": [0.5] * 3}, UnsupportedError, "normalises pictures"),
]


@pytest.mark.parametrize(("file", "values", "error", "match"), REFUSED, ids=[m for *_, m in REFUSED])
def test_what_is_refused(
    tiny_svd: Any, tmp_path: Path, file: str, values: dict[str, Any], error: type[FewstepError], match: str
) -> None:
    bad = copy(tiny_svd.checkpoint, tmp_path / "bad")
    change(bad / file, **values)
    with pytest.raises(error, match=match):
        compose_checkpoint(bad)


def test_without_a_feature_extractor_it_is_clips_own(tiny_svd: Any, tmp_path: Path) -> None:
    plain = copy(tiny_svd.checkpoint, tmp_path / "plain")
    (plain / "feature_extractor" / "preprocessor_config.json").unlink()
    change(plain / "model_index.json", feature_extractor=...)
    assert open_checkpoint(plain).family == "svd"


PICTURES = ["batch", 4, "height", "width"]
MANIFESTS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda d: d["latent"].pop("frames"), "the unet's sample|the latent's frames"),
    (lambda d: d["latent"].update(frames=15), "the latent's frames"),
    (lambda d: d["latent"].update(frames=-1), "the latent's frames"),
    (lambda d: d["components"].pop("vae_encoder"), "no component 'vae_encoder'"),
    (lambda d: d["components"].pop("image_encoder"), "no component 'image_encoder'"),
    (
        lambda d: d["components"]["vae_decoder"]["inputs"][0].update(shape=PICTURES),
        "vae_decoder",
    ),
    (lambda d: d["components"]["image_encoder"]["outputs"][0].update(shape=["batch", 2, 24]), "image_encoder's hidden"),
]


@pytest.mark.parametrize(("spoil", "match"), MANIFESTS, ids=[m for _, m in MANIFESTS])
def test_a_manifest_that_does_not_agree(
    tiny_svd: Any, tmp_path: Path, spoil: Callable[[dict[str, Any]], Any], match: str
) -> None:
    data = tiny_svd.bundle.to_json()
    spoil(data)
    (tmp_path / "bundle.json").write_text(json.dumps(data))
    with pytest.raises(CorruptError, match=match):
        read_bundle(tmp_path)
