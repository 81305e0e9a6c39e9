"""Checkpoints as people have them: single files, UNets over a base, other VAEs, LoRAs, and what presets say of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import ALPHA, RANK, copy, make_lora, write_lora, write_original
from fewstep.bundle import Bundle, read_bundle, read_defaults, write_manifest
from fewstep.cli import main
from fewstep.commands.export import lora
from fewstep.errors import (
    ArgumentError,
    CorruptError,
    FewstepError,
    MissingError,
    UnknownNameError,
    UnsafeFileError,
    UnsupportedError,
)
from fewstep.export import export_bundle
from fewstep.export.checkpoint import Checkpoint
from fewstep.export.compose import compose_checkpoint, read_tensors
from fewstep.export.lora import match_loras
from fewstep.export.presets import find_preset, preset_defaults, recognise_preset
from fewstep.export.weights import convert, open_tensors
from fewstep.presets import PRESETS, preset_warnings
from fewstep.runtime.request import make_request
from safetensors.numpy import load_file, save_file

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"


def hashes(bundle: Any) -> dict[str, str]:
    return {n: c.weights_sha256 for n, c in bundle.components.items()}


def refused(source: Path, target: Path, kind: type[FewstepError], words: str, **options: Any) -> None:
    with pytest.raises(kind, match=words) as caught:
        export_bundle(source, target, gate=False, **options)
    assert caught.value.remedy or caught.value.expected
    assert not target.exists()
    assert not list(target.parent.glob(f".{target.name}*")), "something half-written stayed"


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
    from fewstep.export.loading import load_model

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
    assert len(found.components["unet"].source["files"][0]["sha256"]) == 64


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


STYLES = [("sd1", "kohya"), ("sdxl", "kohya original"), ("sd2", "diffusers"), ("sd1", "old")]


@pytest.mark.parametrize(("family", "style"), STYLES, ids=[" ".join(s) for s in STYLES])
def test_loras_are_fused_as_diffusers_fuses_them(
    family: str, style: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Two LoRAs with factors, over linear layers and convolutions of the UNet and the text encoders."""
    pytest.importorskip("peft")
    from fewstep.export.loading import load_fused

    folder: Path = request.getfixturevalue(f"tiny_{family}")
    files = [
        (write_lora(make_lora(folder, seed=seed), tmp_path / f"{seed}.safetensors", style, folder=folder), scale)
        for seed, scale in ((1, 0.8), (2, -0.3))
    ]
    checkpoint = compose_checkpoint(folder, loras=files)
    expected = {n: plainly(m.state_dict()) for n, m in load_fused(checkpoint).items()}
    plain = fused_parts(compose_checkpoint(folder))
    changed = 0
    for name, fused in fused_parts(checkpoint).items():
        for key, value in fused.items():
            np.testing.assert_allclose(value, expected[name][key].numpy(), atol=1e-6, rtol=1e-6, err_msg=key)
            changed += not np.array_equal(plain[name][key], value)
    assert changed == sum(len(pairs) for pairs in make_lora(folder).values())


def plainly(state: dict[str, Any]) -> dict[str, Any]:
    return {k.removeprefix("text_model."): v for k, v in state.items()}


def fused_parts(checkpoint: Checkpoint) -> dict[str, dict[str, np.ndarray]]:
    """The weights of UNet and text encoders as an export writes them."""
    stored = {n: open_tensors(p.files) for n, p in checkpoint.parts.items() if n != "vae"}
    shapes = {n: {k: t.shape for k, t in found.items()} for n, found in stored.items()}
    fusion = match_loras(checkpoint.loras, {n: (checkpoint.parts[n].config, shapes[n]) for n in stored})
    return {
        n: {
            k.removeprefix("text_model."): convert(fusion.fuse(n, k, t), "float32", k).reshape(t.shape)
            for k, t in found.items()
        }
        for n, found in stored.items()
    }


def test_a_peft_adapter_takes_alpha_from_its_configuration(tiny_sd1: Path, tmp_path: Path) -> None:
    lora = make_lora(tiny_sd1, text=False)
    file = write_lora(lora, tmp_path / "adapter_model.safetensors", "peft")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 12}))
    found = fused_parts(compose_checkpoint(tiny_sd1, loras=[(file, 0.5)]))["unet"]
    weights = load_file(tiny_sd1 / UNET)
    for module, (down, up) in lora["unet"].items():
        change = torch.einsum("or,ri->oi", up.flatten(1).double(), down.flatten(1).double()).numpy() * 0.5 * 12 / RANK
        expected = weights[f"{module}.weight"] + change.reshape(weights[f"{module}.weight"].shape)
        np.testing.assert_allclose(found[f"{module}.weight"], expected, atol=2e-6)


@pytest.mark.parametrize("config", ["", "[1]", '{"lora_alpha": "many"}', '{"alpha_pattern": 3}'])
def test_an_adapters_configuration_that_is_none(tiny_sd1: Path, tmp_path: Path, config: str) -> None:
    file = write_lora(make_lora(tiny_sd1, text=False), tmp_path / "adapter_model.safetensors", "peft")
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(CorruptError, match="adapter configuration"):
        fused_parts(compose_checkpoint(tiny_sd1, loras=[(file, 1.0)]))


def test_half_precision_loras_are_fused_in_float32(tiny_sd1: Path, tmp_path: Path) -> None:
    """The rounding happens once, at the end: weights and LoRA in float16 are summed in float32."""
    folder = copy(tiny_sd1, tmp_path / "half")
    save_file({k: v.astype(np.float16) for k, v in load_file(folder / UNET).items()}, folder / UNET)
    lora = make_lora(tiny_sd1, text=False)
    half = {p: {m: tuple(t.half() for t in pair) for m, pair in pairs.items()} for p, pairs in lora.items()}
    file = write_lora(half, tmp_path / "l.safetensors", "kohya")
    found = fused_parts(compose_checkpoint(folder, loras=[(file, 1.0)]))["unet"]
    module, (down, up) = next(iter(half["unet"].items()))
    change = (up.flatten(1).float() @ down.flatten(1).float()).numpy() * (ALPHA / RANK)
    weight = load_file(folder / UNET)[f"{module}.weight"].astype(np.float32)
    np.testing.assert_allclose(found[f"{module}.weight"], weight + change.reshape(weight.shape), atol=1e-6)


def test_an_export_with_lora_and_single_file_passes_the_gate(
    originals: dict[str, Path], scrambled: dict[str, Path], tiny_sd1: Path, tmp_path: Path
) -> None:
    """The gate's reference opens the same parts in its own process, and diffusers fuses there."""
    file = write_lora(make_lora(tiny_sd1), tmp_path / "style.safetensors", "kohya")
    bundle = export_bundle(
        originals["sd1"], tmp_path / "b", base=scrambled["sd1"], loras=[(file, 0.8)], quick_gate=True
    )
    assert bundle.gate["status"] == "passed"
    assert bundle.gate["reference"].startswith("torch float32, LoRAs fused by ")
    assert bundle.components["unet"].source["loras"][0]["scale"] == 0.8
    assert "loras" not in bundle.components["vae_decoder"].source


def rewrite(path: Path, target: Path, change: Any) -> Path:
    weights = load_file(path)
    change(weights)
    save_file(weights, target)
    return target


def test_keys_that_match_nothing_are_listed(tiny_sd1: Path, tiny_sdxl: Path, tmp_path: Path) -> None:
    file = write_lora(make_lora(tiny_sd1), tmp_path / "l.safetensors", "kohya")
    strange = rewrite(
        file, tmp_path / "strange.safetensors", lambda w: w.update({"lora_unet_nowhere.alpha": w.copy().popitem()[1]})
    )
    refused(tiny_sd1, tmp_path / "b", CorruptError, "1 keys.*lora_unet_nowhere", loras=[(strange, 1.0)])
    other = write_lora(make_lora(tiny_sdxl), tmp_path / "xl.safetensors", "kohya")
    refused(tiny_sd1, tmp_path / "b", CorruptError, "match no weight.*lora_te2", loras=[(other, 1.0)])


@pytest.mark.parametrize(
    ("key", "kind", "words"),
    [
        ("lora_unet_mid_block_attentions_0_proj_in.dora_scale", UnsupportedError, "DoRA"),
        ("lora_unet_mid_block_attentions_0_proj_in.hada_w1_a", UnsupportedError, "LoHa"),
        ("lora_unet_mid_block_attentions_0_proj_in.lokr_w2", UnsupportedError, "LoKr"),
        ("lora_unet_mid_block_attentions_0_proj_in.lora_mid.weight", UnsupportedError, "middle matrix"),
        ("lora_unet_mid_block_attentions_0_proj_in.lora_up.weight", CorruptError, "up matrix only"),
    ],
)
def test_other_adapters_are_refused_by_name(
    tiny_sd1: Path, tmp_path: Path, key: str, kind: type[FewstepError], words: str
) -> None:
    save_file({key: np.ones((2, 2), np.float32)}, tmp_path / "l.safetensors")
    with pytest.raises(kind, match=words):
        fused_parts(compose_checkpoint(tiny_sd1, loras=[(tmp_path / "l.safetensors", 1.0)]))


def test_matrices_that_do_not_fit(tiny_sd1: Path, tmp_path: Path) -> None:
    name = "lora_unet_mid_block_attentions_0_proj_in"
    for down, up, words in (((2, 5), (16, 2), "changes a weight"), ((2, 16), (16, 3), "have shapes")):
        pair = {
            f"{name}.lora_down.weight": np.ones(down, np.float32),
            f"{name}.lora_up.weight": np.ones(up, np.float32),
        }
        save_file(pair, tmp_path / "l.safetensors")
        with pytest.raises(CorruptError, match=words):
            fused_parts(compose_checkpoint(tiny_sd1, loras=[(tmp_path / "l.safetensors", 1.0)]))


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


@pytest.mark.parametrize(
    ("name", "family", "preset"),
    [
        ("sdxl_lightning_4step_unet.safetensors", "sdxl", "sdxl-lightning-4"),
        ("sdxl_lightning_1step_unet_x0.safetensors", "sdxl", "sdxl-lightning-1"),
        ("sdxl_lightning_8step_lora.safetensors", "sdxl", "sdxl-lightning-8"),
        ("stabilityai/sdxl-turbo", "sdxl", "sdxl-turbo"),
        ("sd_xl_turbo_1.0_fp16.safetensors", "sdxl", "sdxl-turbo"),
        ("stabilityai/sd-turbo", "sd2", "sd-turbo"),
        ("models--latent-consistency--lcm-lora-sdv1-5", "sd1", "lcm-lora"),
        ("SimianLuo/LCM_Dreamshaper_v7", "sd1", "lcm"),
        ("h1t/TCD-SDXL-LoRA", "sdxl", "tcd-lora"),
        ("Hyper-SDXL-4steps-lora.safetensors", "sdxl", "hyper-sd-4"),
        ("Hyper-SDXL-12steps-CFG-lora.safetensors", "sdxl", None),
        ("Hyper-SDXL-1step-lora.safetensors", "sdxl", "hyper-sd-unified"),
        ("Hyper-SDXL-1step-Unet.safetensors", "sdxl", "hyper-sdxl-1-unet"),
        ("dmd2_sdxl_4step_lora_fp16.safetensors", "sdxl", "dmd2-4"),
        ("dmd2_sdxl_1step_unet_fp16.safetensors", "sdxl", "dmd2-1"),
        ("sdxl_lightning_4step_unet.safetensors", "sd1", None),
        ("stabilityai/stable-diffusion-xl-base-1.0", "sdxl", None),
    ],
)
def test_presets_are_told_by_names(name: str, family: str, preset: str | None) -> None:
    found = recognise_preset([name], family)
    assert (found and found.name) == preset


TIMESTEPS = {
    "sdxl-lightning-1": [999],
    "sdxl-lightning-2": [999, 499],
    "sdxl-lightning-4": [999, 749, 499, 249],
    "sdxl-lightning-8": [999, 874, 749, 624, 499, 374, 249, 124],
    "sdxl-turbo": [999],
    "sd-turbo": [999],
    "lcm-lora": [999, 759, 499, 259],
    "lcm": [999, 759, 499, 259],
    "tcd-lora": [999, 759, 499, 259],
    "hyper-sd-2": [999, 499],
    "hyper-sd-4": [999, 749, 499, 249],
    "hyper-sd-8": [999, 874, 749, 624, 499, 374, 249, 124],
    "hyper-sd-unified": [999, 759, 499, 259],
    "hyper-sdxl-1-unet": [800],
    "dmd2-4": [999, 749, 499, 249],
    "dmd2-1": [399],
}


def preset_bundle(tiny: Any, name: str) -> Bundle:
    chosen = next(p for p in PRESETS if p.name == name)
    return replace(tiny, defaults=read_defaults(preset_defaults(chosen, 1024, 1024)))


@pytest.fixture(scope="module")
def leading(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle whose own scheduler has leading spacing, as SDXL's base has."""
    return export_bundle(tiny_sd1, tmp_path_factory.mktemp("leading") / "b", gate=False)


def test_every_preset_runs_its_published_timesteps(leading: Bundle) -> None:
    assert leading.scheduler.get("timestep_spacing", "leading") == "leading"
    assert set(TIMESTEPS) == {p.name for p in PRESETS}
    for name, timesteps in TIMESTEPS.items():
        request = make_request(preset_bundle(leading, name), "a red circle", seed=0, size=(32, 32))
        assert [float(t) for t in request.program.timesteps] == timesteps, name
        assert request.guidance == next(p.guidance for p in PRESETS if p.name == name)


def test_a_presets_prediction_replaces_the_schedulers(leading: Bundle) -> None:
    """A network that returns the image itself gives just that image after one step, noise or not."""
    request = make_request(preset_bundle(leading, "sdxl-lightning-1"), "a", seed=0, size=(32, 32))
    image = np.full((1, 4, 2, 2), 0.25)
    made = request.program.run(lambda x, t: image, np.ones_like(image), lambda: np.zeros_like(image))
    np.testing.assert_allclose(made, image, atol=1e-12)


def test_a_bundle_keeps_its_preset(tiny_sd1: Path, tmp_path: Path) -> None:
    file = write_lora(make_lora(tiny_sd1, text=False), tmp_path / "lcm-lora-sdv1-5.safetensors", "kohya")
    bundle = export_bundle(tiny_sd1, tmp_path / "b", loras=[(file, 1.0)], gate=False)
    assert read_bundle(tmp_path / "b").defaults == bundle.defaults
    assert (bundle.defaults.preset, bundle.defaults.sampler, bundle.defaults.steps) == ("lcm-lora", "lcm", 4)
    chosen = replace(bundle, defaults=read_defaults(preset_defaults(find_preset("dmd2-4", "sdxl"), 64, 64)))
    write_manifest(chosen)
    assert read_bundle(tmp_path / "b").defaults == chosen.defaults
    refused(tiny_sd1, tmp_path / "c", UnknownNameError, "lcm-lora", preset="lcm-lara")
    refused(tiny_sd1, tmp_path / "c", ArgumentError, "family sd1", preset="sdxl-turbo")


@pytest.mark.parametrize(
    ("preset", "asked", "words"),
    [
        ("sdxl-turbo", {"guidance": 7.5}, "without guidance"),
        ("sdxl-turbo", {"steps": 20}, "at most 4 steps"),
        ("sdxl-turbo", {"size": (1024, 1024)}, "512x512"),
        ("sdxl-lightning-4", {"steps": 8}, "4 steps, not 8"),
        ("sdxl-lightning-4", {"schedule": "leading"}, "trailing"),
        ("sdxl-lightning-4", {"sampler": "Euler Karras"}, "karras"),
        ("lcm-lora", {"guidance": 7.0}, "at most 2"),
        ("sdxl-turbo", {"steps": 4, "guidance": 0.0, "size": (512, 512)}, None),
        ("sdxl-lightning-4", {"steps": 4, "sampler": "euler", "schedule": None}, None),
        ("lcm", {"guidance": 8.0}, None),
    ],
)
def test_what_goes_against_a_preset_is_said(
    leading: Bundle, preset: str, asked: dict[str, Any], words: str | None
) -> None:
    found = preset_warnings(preset_bundle(leading, preset), asked)
    assert len(found) == (words is not None)
    assert words is None or words in found[0]
    assert preset_warnings(leading, asked) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("style.safetensors", ("style.safetensors", 1.0)),
        ("style.safetensors:0.8", ("style.safetensors", 0.8)),
        ("a:b/style.safetensors:-1", ("a:b/style.safetensors", -1.0)),
        ("a:b/style.safetensors", ("a:b/style.safetensors", 1.0)),
    ],
)
def test_loras_on_the_command_line(text: str, expected: tuple[str, float]) -> None:
    assert lora(text) == expected


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


def test_without_peft_the_reference_is_fused_here(tiny_sd1: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from fewstep.export import loading

    file = write_lora(make_lora(tiny_sd1), tmp_path / "l.safetensors", "kohya")
    checkpoint = compose_checkpoint(tiny_sd1, loras=[(file, 0.5)])
    monkeypatch.setattr(loading, "_has_peft", lambda: False)
    assert loading.lora_method(checkpoint) == "fused by fewstep: peft is not installed"
    models = loading.load_fused(checkpoint)
    for name, fused in fused_parts(checkpoint).items():
        for key, value in plainly(models[name].state_dict()).items():
            np.testing.assert_allclose(value.numpy(), fused[key], atol=1e-6, err_msg=key)
