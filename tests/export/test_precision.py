"""Which precision a component gets and why, and the gate of bundles that are large."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoints import psnr
from fewstep import load
from fewstep.bundle import read_bundle
from fewstep.cli import main
from fewstep.errors import ArgumentError, GateError, OutOfMemoryError
from fewstep.export import export_bundle, open_checkpoint
from fewstep.export.gate import gating
from fewstep.export.plan import choose_precisions


def chosen(checkpoint: Path, *asked: str) -> dict[str, str]:
    return {k: p.dtype for k, p in choose_precisions(open_checkpoint(checkpoint), *asked).items()}


def test_a_vae_that_overflows_is_float32_and_says_so(tiny_sdxl: Path) -> None:
    found = choose_precisions(open_checkpoint(tiny_sdxl), "fp16")
    assert (found["unet"].dtype, found["unet"].why) == ("float16", "asked for")
    assert found["vae_decoder"].dtype == "float32"
    assert "force_upcast" in found["vae_decoder"].why
    assert chosen(tiny_sdxl, "bf16")["vae_decoder"] == "bfloat16", "bfloat16 has float32's range"
    assert chosen(tiny_sdxl, "fp16", "fp16")["vae_encoder"] == "float16", "what is asked for by name is done"


def test_a_precision_by_component(tiny_sdxl: Path) -> None:
    found = chosen(tiny_sdxl, "fp16,text_encoder=fp32,vae=bf16")
    assert found == {
        "text_encoder": "float32",
        "text_encoder_2": "float16",
        "unet": "float16",
        "vae_decoder": "bfloat16",
        "vae_encoder": "bfloat16",
    }
    assert chosen(tiny_sdxl, "unet=fp16")["text_encoder"] == "float32"
    assert chosen(tiny_sdxl, "fp16,vae_decoder=fp32")["vae_encoder"] == "float32", "its own policy still holds"


def test_sdxl_in_half_precision_passes_the_gate(tiny_sdxl: Path, sdxl_bundle: Any, tmp_path: Path) -> None:
    """Its time ids are float32 beside a pooled vector that once was cast: ONNX has no `Concat` of two types."""
    bundle = export_bundle(tiny_sdxl, tmp_path / "b", dtype="unet=fp16", quick_gate=True)
    assert bundle.components["unet"].dtype == "float16"
    assert bundle.gate["components"]["unet"]["status"] == "passed"
    images = [
        load(bundle, backend=b, device=d)("a", seed=0, steps=2, guidance=3.0).images[0]
        for b, d in (("ort-cpu", "cpu"), ("torch", "cpu:torch"))
    ]
    assert psnr(*images) > 40, "the engine that is built, and torch's, run it too"


def test_upcast_attention_is_recorded(tiny_sd2: Path) -> None:
    checkpoint = open_checkpoint(tiny_sd2)
    assert "attention in float32" in choose_precisions(checkpoint, "fp16")["unet"].why
    assert choose_precisions(checkpoint, "fp32")["unet"].why == "asked for"


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (("int4",), "unknown precision 'int4'"),
        (("fp16,bf16",), "'bf16'.*names no component"),
        (("fp16,clip=fp32",), "no component 'clip'"),
        (("fp16,text_encoder_2=fp32",), "no component 'text_encoder_2'"),
        (("vae=fp16", "fp32"), "given twice"),
        (("unet=",), "unknown precision ''"),
    ],
)
def test_precisions_that_cannot_be_had(tiny_sd1: Path, asked: tuple[str, ...], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        choose_precisions(open_checkpoint(tiny_sd1), *asked)


def test_policies_are_in_the_bundle_and_printed(tiny_sd1: Path, sd1_bundle: Any, tmp_path: Path, capsys: Any) -> None:
    """The precisions asked for are those of the session's bundle, so that nothing is traced."""
    assert main(["export", str(tiny_sd1), str(tmp_path / "b"), "--dtype", "fp32,vae=fp32", "--no-gate"]) == 0
    assert "(asked for by name)" in capsys.readouterr().out
    parts = read_bundle(tmp_path / "b").components
    assert parts["unet"].source["precision"] == "asked for"
    assert parts["vae_decoder"].source["precision"] == "asked for by name"


def test_a_large_bundle_is_judged_apart_at_fewer_points(
    tiny_sd1: Path, sd1_bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gating, "LARGE_BYTES", 1000)
    bundle = export_bundle(tiny_sd1, tmp_path / "b")
    assert bundle.gate["status"] == "passed"
    assert bundle.gate["points"] == "few"
    assert {n: c["cases"] for n, c in bundle.gate["components"].items()} == {
        "text_encoder": 2,
        "unet": 1,
        "vae_decoder": 1,
        "vae_encoder": 1,
    }
    monkeypatch.setattr(gating, "_run_reference", lambda c, path, d, quick: path.write_bytes(other.read_bytes()))
    from fewstep.export.embedded import embedded_checkpoint

    other = embedded_checkpoint("base") / "reference.safetensors"
    with pytest.raises((GateError, ArgumentError)):
        export_bundle(tiny_sd1, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_memory_is_asked_for_before_it_is_taken(
    tiny_sd1: Path, sd1_bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gating, "LARGE_BYTES", 1000)
    monkeypatch.setattr(gating, "available_memory", lambda: 10**9)
    with pytest.raises(OutOfMemoryError, match=r"1\.5 GB of memory and 1\.0 GB are free.*--no-gate"):
        export_bundle(tiny_sd1, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    gating.check_memory(10**12, None)
    assert gating.needed_memory(sd1_bundle, fused=True) >= gating.needed_memory(sd1_bundle)
