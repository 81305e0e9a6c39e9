"""LoRA files of every key style, fused while weights are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import ALPHA, RANK, copy, make_lora, write_lora
from fewstep.commands.export import lora
from fewstep.errors import (
    CorruptError,
    FewstepError,
)
from fewstep.export import export_bundle
from fewstep.export.checkpoint.compose import compose_checkpoint
from fewstep.export.checkpoint.folder import Checkpoint
from fewstep.weights.lora import match_loras
from fewstep.weights.stored import convert, open_tensors
from refusals import refused, rewrite
from safetensors.numpy import load_file, save_file

UNET = "unet/diffusion_pytorch_model.safetensors"


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


STYLES = [("sd1", "kohya"), ("sdxl", "kohya original"), ("sd2", "diffusers"), ("sd1", "old")]


@pytest.mark.parametrize(("family", "style"), STYLES, ids=[" ".join(s) for s in STYLES])
def test_loras_are_fused_as_diffusers_fuses_them(
    family: str, style: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Two LoRAs with factors, over linear layers and convolutions of the UNet and the text encoders."""
    pytest.importorskip("peft")
    from fewstep.export.gate.loading import load_fused

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
        ("lora_unet_mid_block_attentions_0_proj_in.dora_scale", CorruptError, "has its a magnitude"),
        ("lora_unet_mid_block_attentions_0_proj_in.hada_w1_a", CorruptError, "w1_a matrix only"),
        ("lora_unet_mid_block_attentions_0_proj_in.lokr_w2", CorruptError, "w2 matrix only"),
        ("lora_unet_mid_block_attentions_0_proj_in.lora_mid.weight", CorruptError, "mid matrix only"),
        ("lora_unet_mid_block_attentions_0_proj_in.lora_up.weight", CorruptError, "up matrix only"),
    ],
)
def test_parts_of_adapters_are_told(
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


def test_without_peft_the_reference_is_fused_here(tiny_sd1: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from fewstep.export.gate import loading

    file = write_lora(make_lora(tiny_sd1), tmp_path / "l.safetensors", "kohya")
    checkpoint = compose_checkpoint(tiny_sd1, loras=[(file, 0.5)])
    monkeypatch.setattr(loading, "_has_peft", lambda: False)
    assert loading.lora_method(checkpoint) == "fused by fewstep: peft is not installed"
    models = loading.load_fused(checkpoint)
    for name, fused in fused_parts(checkpoint).items():
        for key, value in plainly(models[name].state_dict()).items():
            np.testing.assert_allclose(value.numpy(), fused[key], atol=1e-6, err_msg=key)
