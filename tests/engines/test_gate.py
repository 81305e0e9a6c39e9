"""The gate: limits that torch sets, errors that are found, references that are refused, and engines that are marked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fewstep.bundle import Bundle
from fewstep.engines import Engine, Store, build_engines, open_engine
from fewstep.engines.gate.gate import FLOAT32_FLOOR, compare, engine_function, gate_engine, limit_for
from fewstep.engines.gate.reference import FILE, Case, file_sha256, read_reference
from fewstep.engines.gate.verify import load_cases, verify_bundle
from fewstep.errors import CorruptError, GateError, MissingError
from safetensors.numpy import save_file
from small_bundle import example, weights_of, write_bundle

DIMS = {
    "text_encoder": [{"prompts": 1}, {"prompts": 3}],
    "unet": [
        {"rows": 1, "height": 8, "width": 8, "tokens": 77},
        {"rows": 2, "height": 12, "width": 16, "tokens": 154},
    ],
    "vae_decoder": [{"batch": 1, "height": 8, "width": 8}, {"batch": 2, "height": 4, "width": 6}],
}


def torch_outputs(component: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The small components written in torch: the reference does not come from what it judges."""
    import torch
    from torch.nn import functional

    w = {k: torch.from_numpy(v) for k, v in weights_of(component).items()}
    x = {k: torch.from_numpy(v) for k, v in inputs.items()}
    if component == "text_encoder":
        embedded = w["embedding.weight"][x["input_ids"]]
        return {"hidden": functional.layer_norm(embedded, (16,), w["norm.weight"], w["norm.bias"]).numpy()}
    if component == "vae_decoder":
        packed = functional.conv2d(x["latent"], w["conv.weight"], w["conv.bias"], padding=1)
        pixels = functional.pixel_shuffle(packed, 4)
        image = (pixels * 127.5 + 127.5).clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        return {"image": image.contiguous().numpy(), "finite": torch.isfinite(pixels).all(dim=(1, 2, 3)).numpy()}
    features = functional.conv2d(x["sample"], w["conv_in.weight"], w["conv_in.bias"], padding=1)
    mixed = functional.silu(functional.group_norm(features, 4, w["norm.weight"], w["norm.bias"]))
    mixed = mixed + (x["timestep"][:, None] * 1e-3 @ w["time.weight"])[:, :, None, None]
    rows, channels, height, width = mixed.shape
    cells = mixed.flatten(2).transpose(1, 2)

    def heads(tensor: Any) -> Any:
        return tensor.unflatten(-1, (2, channels // 2)).transpose(1, 2)

    context = heads(x["encoder_hidden_states"])
    attended = functional.scaled_dot_product_attention(heads(cells @ w["query.weight"]), context, context)
    cells = attended.transpose(1, 2).flatten(2) + cells
    back = cells.transpose(1, 2).reshape(rows, channels, height, width)
    return {"out": functional.conv2d(back, w["conv_out.weight"], w["conv_out.bias"], padding=1).numpy()}


def write_reference(folder: Path, **metadata: str) -> Path:
    tensors, stated = {}, {}
    for component, sizes in DIMS.items():
        for index, dims in enumerate(sizes):
            inputs = example(component, dims, seed=index)
            stated[f"{component}/{index}"] = {"dims": dims, "torch_error": {"float32": 2e-7, "float16": 1e-3}}
            tensors |= {f"{component}/{index}/in/{k}": v for k, v in inputs.items()}
            outputs = torch_outputs(component, inputs)
            tensors |= {f"{component}/{index}/out/{k}": np.ascontiguousarray(v) for k, v in outputs.items()}
    save_file(tensors, folder / FILE, metadata={"cases": json.dumps(stated), **metadata})
    return folder / FILE


@pytest.fixture
def gated(tmp_path: Path) -> Bundle:
    bundle = write_bundle(tmp_path / "gated")
    write_reference(bundle.folder)
    return bundle


def test_a_reference_is_read_case_by_case(gated: Bundle) -> None:
    cases = load_cases(gated)
    assert [(c.component, c.index) for c in cases] == [(n, i) for n in DIMS for i in range(2)]
    assert cases[3].dims == DIMS["unet"][1]
    assert cases[3].inputs["sample"].shape == (2, 4, 12, 16)
    assert cases[3].torch_error == {"float32": 2e-7, "float16": 1e-3}
    assert len(read_reference(gated.folder / FILE, "unet")) == 2


@pytest.mark.parametrize(
    "cases",
    [
        "{",
        "[]",
        "{}x",
        '{"unet/0": {}}',
        '{"unet/x": {"dims": {}, "torch_error": {}}}',
        '{"unet/9": {"dims": {}, "torch_error": {}}}',
    ],
)
def test_a_malformed_reference_is_refused(gated: Bundle, cases: str) -> None:
    write_reference(gated.folder, cases=cases)
    with pytest.raises(CorruptError, match="is no reference"):
        load_cases(gated)


def test_a_cut_or_absent_reference_is_refused(gated: Bundle) -> None:
    path = gated.folder / FILE
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CorruptError, match="is no reference"):
        load_cases(gated)
    path.unlink()
    with pytest.raises(MissingError, match="writes it: fewstep export CHECKPOINT BUNDLE --overwrite"):
        load_cases(gated)


def test_measures_are_those_of_their_definitions() -> None:
    one, other = np.array([1.0, 2.0, 2.0], np.float32), np.array([1.0, 2.0, 2.3], np.float32)
    report = compare(other, one)
    assert report.max_abs == pytest.approx(0.3, rel=1e-5)
    assert report.rel_l2 == pytest.approx(0.1, rel=1e-5)
    assert report.psnr == pytest.approx(10 * math.log10(4 / 0.03), rel=1e-5)
    same = compare(one, one)
    assert (same.max_abs, same.rel_l2, same.psnr, same.finite) == (0.0, 0.0, math.inf, True)
    zero = np.zeros(3, np.float32)
    assert compare(zero, zero).rel_l2 == 0
    assert compare(one, zero).rel_l2 == math.inf
    for bad in (math.nan, math.inf):
        assert compare(np.array([1, bad, 2], np.float32), one).finite is False
    image = np.full((4, 4), 100, np.uint8)
    assert compare(image + np.uint8(1), image).psnr == pytest.approx(20 * math.log10(255), rel=1e-6)
    with pytest.raises(GateError, match=r"shape \(2,\)"):
        compare(one[:2], one)


def test_torch_sets_the_limit_and_float32_has_a_floor() -> None:
    assert limit_for("float16", {"float16": 2e-3}) == pytest.approx(3e-3)
    assert limit_for("float32", {}) == FLOAT32_FLOOR
    assert limit_for("float32", {"float32": 1e-2}) == pytest.approx(1.5e-2)
    assert FLOAT32_FLOOR < 2.0**-11 / 4
    with pytest.raises(MissingError, match="bfloat16"):
        limit_for("bfloat16", {"float16": 1e-3})


def test_graphs_and_engines_agree_with_torch_and_the_verdict_is_kept(gated: Bundle, store: Store) -> None:
    built = build_engines(gated, backend="ort-cpu", store=store)
    for one in built.values():
        assert one.entry.gate["passed"] is True
        assert len(one.entry.gate["cases"]) >= 2
    reports = verify_bundle(gated, store=store)
    assert [(r.component, r.subject.partition(" ")[2][:6]) for r in reports] == [
        (n, kind) for n in gated.components for kind in ("ONNX g", "engine")
    ]
    floats = [row.report.rel_l2 for r in reports for row in r.rows if row.tensor in {"hidden", "out"}]
    assert max(floats) < 2e-6


def noisy(engine: Engine, relative: float) -> Any:
    """An engine whose float outputs are off by this much, relatively."""
    inner, draw = engine_function(engine), np.random.default_rng(0)

    def evaluate(inputs: Mapping[str, np.ndarray], dims: Mapping[str, int]) -> dict[str, np.ndarray]:
        result = {}
        for name, value in inner(inputs, dims).items():
            noise = draw.standard_normal(value.shape)
            scale = relative * np.linalg.norm(value) / np.linalg.norm(noise)
            result[name] = (value + scale * noise).astype(value.dtype) if value.dtype == np.float32 else value
        return result

    return evaluate


@pytest.mark.parametrize(
    ("dtype", "relative", "passes"),
    [("float32", 5e-5, True), ("float32", 2e-4, False), ("float16", 1.4e-3, True), ("float16", 1.6e-3, False)],
)
def test_an_error_just_under_the_limit_passes_and_just_over_it_does_not(
    gated: Bundle, store: Store, dtype: str, relative: float, passes: bool
) -> None:
    engine = open_engine(gated, "unet", backend="ort-cpu", store=store)
    report = gate_engine(noisy(engine, relative), load_cases(gated), component="unet", dtype=dtype, check=False)
    assert report.passed is passes
    if not passes:
        assert report.worst.reason.startswith("relative error")
        with pytest.raises(GateError, match="disagrees with torch") as caught:
            gate_engine(noisy(engine, relative), load_cases(gated), component="unet", dtype=dtype)
        assert caught.value.exit_code == 5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda image: np.roll(image, 1, axis=1), "PSNR"),
        (lambda image: np.where(np.arange(image.size).reshape(image.shape) == 7, image ^ 128, image), "PSNR|off by"),
        (lambda image: np.where(np.arange(image.size).reshape(image.shape) == 7, image ^ 4, image), "off by 4 levels"),
    ],
)
def test_an_image_that_is_off_is_found(gated: Bundle, change: Any, words: str) -> None:
    case = load_cases(gated)[4]

    def evaluate(inputs: Mapping[str, np.ndarray], dims: Mapping[str, int]) -> dict[str, np.ndarray]:
        return {**case.outputs, "image": change(case.outputs["image"]).astype(np.uint8)}

    with pytest.raises(GateError, match=words):
        gate_engine(evaluate, [case], component="vae_decoder", dtype="float32")


def altered(case: Case, **outputs: np.ndarray) -> Any:
    def evaluate(inputs: Mapping[str, np.ndarray], dims: Mapping[str, int]) -> dict[str, np.ndarray]:
        return {**case.outputs, **outputs}

    return evaluate


def test_nan_a_wrong_flag_and_a_missing_output_are_found(gated: Bundle) -> None:
    cases = load_cases(gated)
    bad = cases[2].outputs["out"].copy()
    bad[0, 0, 0, 0] = np.nan
    with pytest.raises(GateError, match="NaN or infinity"):
        gate_engine(altered(cases[2], out=bad), cases[2:3], component="unet", dtype="float32")
    with pytest.raises(GateError, match="a flag differs"):
        gate_engine(
            altered(cases[4], finite=~cases[4].outputs["finite"]), cases[4:5], component="vae_decoder", dtype="float32"
        )
    with pytest.raises(GateError, match="has no output image"):
        gate_engine(
            lambda i, d: {"finite": cases[4].outputs["finite"]}, cases[4:5], component="vae_decoder", dtype="float32"
        )
    with pytest.raises(MissingError, match="no case of 'vae_encoder'"):
        gate_engine(altered(cases[0]), cases, component="vae_encoder", dtype="float32")


def test_a_wrong_engine_is_marked_at_its_build_and_never_opened(tmp_path: Path, store: Store) -> None:
    """The reference is torch's with these weights; the bundle's graph has others."""
    bundle = write_bundle(tmp_path / "wrong", seed=1)
    write_reference(bundle.folder)
    with pytest.raises(GateError, match="relative error"):
        build_engines(bundle, backend="ort-cpu", components=["unet"], store=store)
    (entry,) = store.entries("unet")
    assert entry.failed
    for policy in ("never", "if_missing"):
        with pytest.raises(GateError, match="failed its comparison"):
            open_engine(bundle, "unet", backend="ort-cpu", store=store, build=policy)
    with pytest.raises(GateError, match="disagrees with torch"):
        verify_bundle(bundle, store=store, components=["unet"])
    assert [r.passed for r in verify_bundle(bundle, store=store, components=["unet"], check=False)] == [False, False]


def test_a_reference_that_was_taken_away_or_changed_does_not_switch_the_gate_off(
    gated: Bundle, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    path = gated.folder / FILE
    stated = replace(gated, gate={"status": "passed", "reference": "torch float32"})
    digested = replace(gated, gate={**stated.gate, "reference_sha256": file_sha256(path)})
    build_engines(digested, backend="ort-cpu", components=["text_encoder"], store=store)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(CorruptError, match="changed since the export"):
        build_engines(digested, backend="ort-cpu", components=["unet"], store=store)
    path.unlink()
    for bundle in (stated, digested):
        with pytest.raises(MissingError, match="with which its gate was run"):
            build_engines(bundle, backend="ort-cpu", components=["unet"], store=store)
    assert not list(store.entries("unet"))
    with caplog.at_level("WARNING", "fewstep.engines"):
        build_engines(replace(gated, gate={}), backend="ort-cpu", components=["unet"], store=store)
    assert "not compared with torch: the bundle was exported without a gate" in caplog.text
    (entry,) = store.entries("unet")
    assert not entry.gate
    for bundle in (stated, digested):  # it was built, and is not used, without having been compared
        with pytest.raises(MissingError, match="with which its gate was run"):
            build_engines(bundle, backend="ort-cpu", components=["unet"], store=store)


def test_verify_includes_what_it_is_given(gated: Bundle, store: Store) -> None:
    cases = [c for c in load_cases(gated) if c.component == "unet"]

    def exact(inputs: Mapping[str, np.ndarray], dims: Mapping[str, int]) -> Mapping[str, np.ndarray]:
        return next(c.outputs for c in cases if dict(c.dims) == dict(dims))

    reports = verify_bundle(gated, store=store, components=["unet"], extra={"unet": exact})
    assert [r.subject for r in reports] == ["the ONNX graph", "exact"]
    assert reports[1].rows[0].report.rel_l2 == 0


def test_engines_of_other_machines_are_passed_over(gated: Bundle, store: Store) -> None:
    entry = build_engines(gated, backend="ort-cpu", components=["unet"], store=store)["unet"].entry
    other = replace(entry.key, backend_version="0.1")
    folder = store.entry_folder(other)
    entry.folder.rename(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "key": other.to_json()}))
    assert [r.subject for r in verify_bundle(gated, store=store, components=["unet"])] == ["the ONNX graph"]
