"""Adapters that are no plain LoRA, fused at export: against PEFT's own layers, torch, and diffusers for DoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import make_lora, write_lora
from fewstep.errors import CorruptError, UnsupportedError
from fewstep.export import export_bundle
from fewstep.export.checkpoint.compose import compose_checkpoint
from fewstep.runtime.loras import LoraLibrary
from safetensors.torch import load_file, save_file
from test_loras import fused_parts

peft = pytest.importorskip("peft")
UNET = "unet/diffusion_pytorch_model.safetensors"
LINEAR, CONV = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.resnets.0.conv1"
SCALE, ALPHA, RANK = 0.7, 3.0, 4


def rand(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def fused(folder: Path, path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    save_file(tensors, path)
    return fused_parts(compose_checkpoint(folder, loras=[(path, SCALE)]))["unet"]


def kohya(module: str) -> str:
    return f"lora_unet_{module.replace('.', '_')}"


def shapes_of(weight: torch.Tensor, kind: str, form: str) -> dict[str, tuple[int, ...]]:
    """Shapes of a kind's tensors for a weight, in one of the forms that files have."""
    out, width, *kernel = weight.shape
    flat = width * int(np.prod(kernel, dtype=int))
    if kind == "LoHa":
        if form == "tucker":
            pairs = {f"hada_w{i}_{s}": (RANK, n) for i in (1, 2) for s, n in (("a", out), ("b", width))}
            return pairs | {f"hada_t{i}": (RANK, RANK, *kernel) for i in (1, 2)}
        return {f"hada_w{i}_{s}": (out, RANK) if s == "a" else (RANK, flat) for i in (1, 2) for s in "ab"}
    first, second = (4, 4), (out // 4, width // 4)
    if form == "full":
        return {"lokr_w1": first, "lokr_w2": (*second, *kernel)}
    if form == "tucker":
        return {"lokr_w1": first, "lokr_t2": (RANK, RANK, *kernel), "lokr_w2_a": (RANK, second[0]),
                "lokr_w2_b": (RANK, second[1])}  # fmt: skip
    return {"lokr_w1_a": (4, RANK), "lokr_w1_b": (RANK, 4), "lokr_w2_a": (second[0], RANK),
            "lokr_w2_b": (RANK, second[1] * int(np.prod(kernel, dtype=int)))}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "module", "form"),
    [
        *(("LoHa", LINEAR, "plain"), ("LoHa", CONV, "plain"), ("LoHa", CONV, "tucker")),
        *(("LoKr", LINEAR, "plain"), ("LoKr", LINEAR, "full"), ("LoKr", CONV, "full"), ("LoKr", CONV, "tucker")),
    ],
)
def test_lycoris_is_fused_as_peft_computes_it(
    tiny_sd1: Path, tmp_path: Path, kind: str, module: str, form: str
) -> None:
    weight = load_file(tiny_sd1 / UNET)[f"{module}.weight"]
    parts = {n: rand(i, *s) for i, (n, s) in enumerate(shapes_of(weight, kind, form).items())}
    tensors = {f"{kohya(module)}.{n}": t for n, t in parts.items()} | {f"{kohya(module)}.alpha": torch.tensor(ALPHA)}
    found = fused(tiny_sd1, tmp_path / "l.safetensors", tensors)[f"{module}.weight"]
    change = expected_change(kind, form, parts, weight.shape)
    factor = SCALE * (1.0 if form == "full" else ALPHA / RANK)
    np.testing.assert_allclose(found, (weight + factor * change).numpy(), atol=2e-6)
    assert np.abs(found - weight.numpy()).max() > 1e-2


def expected_change(kind: str, form: str, parts: dict[str, torch.Tensor], shape: torch.Size) -> torch.Tensor:
    """PEFT's own functions on the tensors."""
    from peft.tuners.loha.layer import make_weight, make_weight_cp
    from peft.tuners.lokr.layer import make_kron
    from peft.tuners.lokr.layer import make_weight_cp as lokr_cp

    one = torch.tensor(1.0)
    if kind == "LoHa":
        a = [parts[f"hada_w{i}_{s}"] for i in (1, 2) for s in "ab"]
        if form == "tucker":
            return make_weight_cp(parts["hada_t1"], a[0], a[1], parts["hada_t2"], a[2], a[3], scale=one).reshape(shape)
        return make_weight(*a, scale=one).reshape(shape)
    first = parts.get("lokr_w1")
    if first is None:
        first = parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    if "lokr_w2" in parts:
        second = parts["lokr_w2"]
    elif form == "tucker":
        second = lokr_cp(parts["lokr_t2"], parts["lokr_w2_a"], parts["lokr_w2_b"])
    else:
        second = parts["lokr_w2_a"] @ parts["lokr_w2_b"]
    return make_kron(first, second, 1.0).reshape(shape)


def test_a_middle_matrix_is_torchs_three_convolutions(tiny_sd1: Path, tmp_path: Path) -> None:
    """LoCon's Tucker form is a pointwise convolution, one of the kernel's size, and a pointwise one."""
    weight = load_file(tiny_sd1 / UNET)[f"{CONV}.weight"]
    out, width, *kernel = weight.shape
    down, mid, up = rand(1, RANK, width, 1, 1), rand(2, RANK, RANK, *kernel), rand(3, out, RANK, 1, 1)
    name = kohya(CONV)
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_mid.weight": mid, f"{name}.lora_up.weight": up}
    found = fused(tiny_sd1, tmp_path / "l.safetensors", tensors | {f"{name}.alpha": torch.tensor(ALPHA)})
    x = rand(4, 1, width, 7, 6)
    conv = torch.nn.functional.conv2d
    three = conv(conv(conv(x, down), mid, padding=1), up) * (SCALE * ALPHA / RANK)
    change = torch.from_numpy(found[f"{CONV}.weight"]) - weight
    np.testing.assert_allclose(conv(x, change, padding=1).numpy(), three.numpy(), atol=2e-4)


def test_full_differences_of_weights_and_biases(tiny_sd1: Path, tmp_path: Path) -> None:
    state = load_file(tiny_sd1 / UNET)
    weight, bias = state[f"{CONV}.weight"], state[f"{CONV}.bias"]
    tensors = {f"{kohya(CONV)}.diff": rand(1, *weight.shape), f"{kohya(CONV)}.diff_b": rand(2, *bias.shape)}
    found = fused(tiny_sd1, tmp_path / "l.safetensors", tensors)
    np.testing.assert_allclose(found[f"{CONV}.weight"], weight + SCALE * tensors[f"{kohya(CONV)}.diff"], atol=1e-6)
    np.testing.assert_allclose(found[f"{CONV}.bias"], bias + SCALE * tensors[f"{kohya(CONV)}.diff_b"], atol=1e-6)


def test_dora_is_fused_as_peft_merges_it(tiny_sd1: Path, tmp_path: Path) -> None:
    """diffusers drops the magnitudes of this naming, with a warning; PEFT's layer of the same tensors does not."""
    state = load_file(tiny_sd1 / UNET)
    pairs = {m: p for m, p in make_lora(tiny_sd1, text=False)["unet"].items() if ".attn" in m or m.endswith("conv1")}
    path = write_lora({"unet": pairs}, tmp_path / "dora.safetensors", "kohya", folder=tiny_sd1)
    tensors = load_file(path)
    expected = {}
    for i, (module, (down, up)) in enumerate(pairs.items()):
        weight = state[f"{module}.weight"]
        norm = weight.flatten(1).norm(dim=1).reshape(-1, *(1,) * (weight.ndim - 1))
        magnitude = norm * (1 + rand(i, *norm.shape).abs())
        tensors[f"{kohya(module)}.dora_scale"] = magnitude
        alpha = float(tensors[f"{kohya(module)}.alpha"])
        expected[module] = merged_dora(weight, down, up, magnitude, SCALE * alpha / len(down))
    found = fused(tiny_sd1, path, tensors)
    for module, value in expected.items():
        np.testing.assert_allclose(found[f"{module}.weight"], value.numpy(), atol=3e-6, rtol=1e-5, err_msg=module)
        assert np.abs(found[f"{module}.weight"] - state[f"{module}.weight"].numpy()).max() > 1e-2


def merged_dora(
    weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor, magnitude: torch.Tensor, scaling: float
) -> torch.Tensor:
    """A weight that PEFT merged."""
    base = (
        torch.nn.Conv2d(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), bias=False)
        if weight.ndim == 4
        else torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    )
    base.weight.data = weight.clone()
    config = peft.LoraConfig(r=len(down), lora_alpha=scaling * len(down), use_dora=True, target_modules=["0"])
    model = peft.get_peft_model(torch.nn.Sequential(base), config)
    layer = model.base_model.model[0]
    layer.lora_A["default"].weight.data = down.reshape(layer.lora_A["default"].weight.shape)
    layer.lora_B["default"].weight.data = up.reshape(layer.lora_B["default"].weight.shape)
    own = layer.lora_magnitude_vector["default"].weight
    own.data = magnitude.reshape(own.shape)
    return model.merge_and_unload()[0].weight.detach()


def test_exports_pass_their_gate_and_run_time_refuses_them(tiny_sd1: Path, sd1_bundle: Any, tmp_path: Path) -> None:
    weight = load_file(tiny_sd1 / UNET)[f"{LINEAR}.weight"]
    parts = {n: rand(i, *s) for i, (n, s) in enumerate(shapes_of(weight, "LoHa", "plain").items())}
    path = tmp_path / "loha.safetensors"
    save_file({f"{kohya(LINEAR)}.{n}": t for n, t in parts.items()}, path)
    bundle = export_bundle(tiny_sd1, tmp_path / "b", loras=[(path, SCALE)], quick_gate=True)
    assert bundle.gate["reference"] == "torch float32, LoRAs fused by fewstep: diffusers does not read LoHa"
    with pytest.raises(UnsupportedError, match=r"a LoHa.*Fuse it at export"):
        LoraLibrary(sd1_bundle).changes(((str(path), "", 1.0),))


@pytest.mark.parametrize(
    ("tensors", "error", "words"),
    [
        ({"hada_w1_a": (32, 4)}, CorruptError, "w1_a matrix only"),
        ({"lokr_w1": (3, 3), "lokr_w2": (3, 3)}, CorruptError, "changes a weight of shape"),
        ({"diff": (5, 5)}, CorruptError, "changes a weight of shape"),
        ({"dora_scale": (32, 1)}, CorruptError, "a magnitude"),
        ({"lora_down.weight": (4, 32), "hada_w1_a": (32, 4)}, CorruptError, "only"),
        ({"oft_blocks": (4, 4, 4)}, UnsupportedError, "OFT"),
        (
            {"lora_down.weight": (4, 32), "lora_up.weight": (32, 4), "lora_mid.weight": (3, 4, 3, 3)},
            CorruptError,
            "shapes",
        ),
    ],
    ids=lambda v: str(v)[:40],
)
def test_what_does_not_fit_is_told(
    tiny_sd1: Path, tmp_path: Path, tensors: dict[str, tuple[int, ...]], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        fused(tiny_sd1, tmp_path / "l.safetensors", {f"{kohya(LINEAR)}.{n}": rand(0, *s) for n, s in tensors.items()})
