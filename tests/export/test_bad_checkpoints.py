"""Damaged and hostile checkpoints, one test a malformation."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import copy
from fewstep.errors import (
    CorruptError,
    FewstepError,
    MissingError,
    PickledFileError,
    UnsafeFileError,
    UnsupportedError,
)
from fewstep.export import export_bundle
from fewstep.export.trace.trace import _refusing
from fewstep.weights.stored import Stored, convert, open_tensors
from refusals import edit, refused
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

DOCUMENT = Path(__file__).parents[2] / "docs" / "checkpoints.md"
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("part", "key", "value", "kind", "words"),
    [
        ("unet", "act_fn", "foo", UnsupportedError, "the unet's configuration: activation function foo"),
        ("unet", "norm_num_groups", 3, UnsupportedError, "divisible"),
        ("unet", "sample_size", "64", CorruptError, "sample_size = '64'"),
        ("unet", "sample_size", [1, 2, 3], CorruptError, "sample_size"),
        ("vae", "scaling_factor", 0, CorruptError, "scaling_factor = 0"),
        ("vae", "scaling_factor", float("nan"), CorruptError, "the number NaN"),
        ("scheduler", "beta_start", "x", CorruptError, "beta_start = 'x'"),
        ("scheduler", "beta_schedule", "foo", FewstepError, "unknown beta_schedule 'foo'"),
        ("scheduler", "num_train_timesteps", 0, FewstepError, "num_train_timesteps is 0"),
    ],
)
def test_configurations_of_which_nothing_can_be_made(
    tiny_sd1: Path, sd1_bundle: Any, tmp_path: Path, part: str, key: str, value: Any, kind: Any, words: str
) -> None:
    bad = copy(tiny_sd1, tmp_path / "bad")
    edit(bad / part / ("scheduler_config.json" if part == "scheduler" else "config.json"), **{key: value})
    refused(bad, tmp_path / "b", kind, words)


def test_an_interrupt_that_the_exporter_took_for_an_error() -> None:
    """torch's exporter may give a Ctrl-C back as an error of its own, whose first cause it is."""

    def export() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as interrupt:
            raise torch.onnx.OnnxExporterError("failed to decompose") from interrupt

    with pytest.raises(KeyboardInterrupt), _refusing("unet"):
        export()
    with pytest.raises(UnsupportedError, match="the unet's configuration: no such operator"), _refusing("unet"):
        raise torch.onnx.OnnxExporterError("no such operator")


def test_no_such_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", tmp_path / "b", MissingError, "no folder")


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_a_pickle_is_refused(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"model{suffix}").write_bytes(b"\x80\x04.")
    refused(tmp_path / f"model{suffix}", tmp_path / "b", UnsafeFileError, "pickle")


def test_a_pickle_is_converted_as_the_document_says(tmp_path: Path) -> None:
    """Its lines make the same tensors of it, and load no pickle that holds anything else."""
    (script,) = re.findall(r"```python\n(import sys\n.*?weights_only=True.*?)```", DOCUMENT.read_text(), re.DOTALL)
    kept = {"a.weight": torch.arange(6.0).reshape(2, 3).t(), "b": torch.ones(2)}
    torch.save({"state_dict": {**kept, "b again": kept["b"]}, "epoch": 3}, tmp_path / "model.ckpt")
    torch.save({"state_dict": kept, "callback": Path("x")}, tmp_path / "evil.ckpt")
    done = {}
    for name in ("model", "evil"):
        files = [str(tmp_path / f"{name}.{end}") for end in ("ckpt", "safetensors")]
        done[name] = subprocess.run([sys.executable, "-c", script, *files], capture_output=True, text=True, check=False)
    made = load_file(tmp_path / "model.safetensors")
    assert made.keys() == {*kept, "b again"}
    assert all(np.array_equal(made[n], t.numpy()) for n, t in kept.items())
    assert done["evil"].returncode, "only tensors are read"
    assert not (tmp_path / "evil.safetensors").exists()
    with pytest.raises(PickledFileError, match=r"docs/checkpoints\.md"):
        open_tensors([tmp_path / "model.ckpt"])


def test_pickled_weights_in_a_folder_are_refused(tiny_sd1: Path, tmp_path: Path) -> None:
    bad = copy(tiny_sd1, tmp_path / "bad")
    (bad / UNET).rename(bad / "unet" / "diffusion_pytorch_model.bin")
    refused(bad, tmp_path / "b", UnsafeFileError, "pickles only")


def test_a_folder_without_an_index(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path / "b", MissingError, "model_index.json")


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 5000], ids=["empty", "cut", "list", "deep"])
def test_an_index_that_is_not_an_object(tiny_sd1: Path, tmp_path: Path, content: str) -> None:
    bad = copy(tiny_sd1, tmp_path / "bad")
    (bad / "model_index.json").write_text(content)
    refused(bad, tmp_path / "b", CorruptError, "model_index.json")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("_class_name", "StableDiffusion3Pipeline", "StableDiffusion3Pipeline"),
        ("unet", ["os", "system"], "'system'"),
        ("controlnet", ["diffusers", "ControlNetModel"], "controlnet"),
    ],
)
def test_classes_go_through_an_allow_list(tiny_sd1: Path, tmp_path: Path, name: str, value: Any, words: str) -> None:
    bad = copy(tiny_sd1, tmp_path / "bad")
    edit(bad / "model_index.json", **{name: value})
    refused(bad, tmp_path / "b", UnsupportedError, words)


def damage(kind: str, path: Path) -> None:
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    names = [n for n in header if n != "__metadata__"]
    if kind == "truncated":
        data = data[: len(data) // 2]
    elif kind == "empty":
        data = bytearray()
    elif kind == "oversize header":
        data[:8] = (2**40).to_bytes(8, "little")
    else:
        if kind == "overlap":
            header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]
        elif kind == "bad offset":
            header[names[0]]["data_offsets"] = [10**9, 10**9 + 4]
        elif kind == "hole":
            data[8 + length : 8 + length] = bytes(8)
            for name in names:
                header[name]["data_offsets"] = [o + 8 for o in header[name]["data_offsets"]]
        elif kind == "unknown dtype":
            header[names[0]]["dtype"] = "Q7"
        elif kind == "shape of another length":
            header[names[0]]["shape"] = [1, *header[names[0]]["shape"], 2]
        elif kind == "negative shape":
            header[names[0]]["shape"] = [-1, -4]
        text = json.dumps(header).encode()
        if kind == "a tensor twice":  # the same place, read as another type: whichever of the two a reader takes
            other = json.dumps({names[0]: {**header[names[0]], "dtype": "I32"}}).encode()
            text = other[:-1] + b", " + text[1:]
        elif kind == "an entry twice":
            text = text.replace(b'"dtype": "F32"', b'"dtype": "I32", "dtype": "F32"', 1)
        data = bytearray(len(text).to_bytes(8, "little") + text + data[8 + length :])
    path.write_bytes(data)


DAMAGES = (
    *("truncated", "empty", "oversize header", "overlap", "hole", "bad offset", "unknown dtype"),
    *("shape of another length", "negative shape", "a tensor twice", "an entry twice"),
)


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_safetensors(tiny_sd1: Path, tmp_path: Path, kind: str) -> None:
    bad = copy(tiny_sd1, tmp_path / "bad")
    damage(kind, bad / UNET)
    refused(bad, tmp_path / "b", CorruptError, "not a valid safetensors file|a key that is there twice", gate=False)


def test_weights_that_are_not_finite(tiny_sd1: Path, tmp_path: Path) -> None:
    bad = copy(tiny_sd1, tmp_path / "bad")
    weights = load_file(bad / UNET)
    weights["conv_in.bias"] = np.full_like(weights["conv_in.bias"], np.nan)
    save_file(weights, bad / UNET)
    refused(bad, tmp_path / "b", CorruptError, "NaN or infinity", gate=False)


def tensors_of(path: Path, changes: dict[str, torch.Tensor]) -> None:
    save_torch({**load_torch(path), **changes}, path)


NEEDED = {"unet": "conv_out.bias", "vae": "decoder.conv_in.bias", "text_encoder": "final_layer_norm.bias"}
WEIGHTS = {n: f"{n}/{'model' if n == 'text_encoder' else 'diffusion_pytorch_model'}.safetensors" for n in NEEDED}
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
EIGHTS = (torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("dtype", [*INTEGERS, *EIGHTS], ids=str)
def test_a_weight_of_another_dtype_is_refused(tiny_sd1: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    code = {**dict(zip(INTEGERS, ("I64", "I32", "I16", "I8", "U8", "BOOL"), strict=True))}.get(dtype, "F8_")
    kind = UnsupportedError if dtype in EIGHTS else CorruptError
    for part, key in NEEDED.items():
        bad = copy(tiny_sd1, tmp_path / part)
        name, own = next((n, t) for n, t in load_torch(bad / WEIGHTS[part]).items() if n.endswith(key))
        tensors_of(bad / WEIGHTS[part], {name: torch.ones(own.shape).to(dtype)})
        refused(bad, tmp_path / "b", kind, f"{key}.*has dtype {code}.*expected one of F64, F32", gate=False)


@pytest.mark.parametrize("dtype", [*INTEGERS, *EIGHTS, torch.complex64], ids=str)
def test_a_tensor_that_nobody_needs_decides_nothing(tiny_sd1: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """Counters, masks and positions lie in files beside the weights, in whatever dtype."""
    good = copy(tiny_sd1, tmp_path / "good")
    for path in WEIGHTS.values():
        tensors_of(good / path, {"num_updates": torch.ones(()).to(dtype), "position_ids": torch.ones(1, 77).to(dtype)})
    found = export_bundle(good, tmp_path / "b", gate=False)
    plain = export_bundle(tiny_sd1, tmp_path / "plain", gate=False)
    for name, component in plain.components.items():
        assert found.components[name].weights_sha256 == component.weights_sha256


@pytest.mark.parametrize(
    ("value", "dtype", "kind", "words"),
    [
        (1e300, "float32", CorruptError, "float64 that float32 does not"),
        (-4e38, "bfloat16", CorruptError, "float64 that float32 does not"),
        (3.4e38, "bfloat16", UnsupportedError, "does not fit bfloat16"),
        (7e4, "float16", UnsupportedError, "does not fit float16"),
    ],
)
def test_values_that_do_not_fit(value: float, dtype: str, kind: Any, words: str) -> None:
    values = np.array([1.0, value])
    with pytest.raises(kind, match=words):
        convert(Stored(dtype="F64", shape=(2,), data=values.view(np.uint8)), dtype, "w")


def test_weights_in_float64_are_rounded_to_float32(tiny_sd1: Path, tmp_path: Path) -> None:
    double = copy(tiny_sd1, tmp_path / "double")
    own = load_torch(double / UNET)["conv_out.bias"].double() / 3
    tensors_of(double / UNET, {"conv_out.bias": own})
    found = export_bundle(double, tmp_path / "b", gate=False)
    np.testing.assert_array_equal(load_file(found.path("unet.safetensors"))["model.conv_out.bias"], own.float())
    tensors_of(double / UNET, {"conv_out.bias": torch.full_like(own, 1e300)})
    refused(double, tmp_path / "c", CorruptError, "conv_out.bias.*float64 that float32 does not", gate=False)


def test_missing_and_misshapen_weights(tiny_sd1: Path, tmp_path: Path) -> None:
    bad = copy(tiny_sd1, tmp_path / "bad")
    weights = load_file(bad / UNET)
    gone = weights.pop("conv_in.bias")
    save_file(weights, bad / UNET)
    refused(bad, tmp_path / "b", CorruptError, "lacks 1 weights.*conv_in.bias", gate=False)
    save_file({**weights, "conv_in.bias": np.concatenate([gone, gone])}, bad / UNET)
    refused(bad, tmp_path / "b", CorruptError, "has shape", gate=False)


def test_a_variant_that_is_not_there(tiny_sd1: Path, tmp_path: Path) -> None:
    refused(tiny_sd1, tmp_path / "b", MissingError, "fp16", variant="fp16")


@pytest.mark.parametrize(("part", "key"), [("unet", "block_out_channels"), ("vae", "latent_channels")])
def test_configurations_that_lack_a_factor(tiny_sd1: Path, tmp_path: Path, part: str, key: str) -> None:
    bad = copy(tiny_sd1, tmp_path / "bad")
    edit(bad / part / "config.json", **{key: None})
    refused(bad, tmp_path / "b", CorruptError, f"does not state.*{key}")
    bad = copy(tiny_sd1, tmp_path / "worse")
    (bad / "fewstep.json").write_text('{"defaults": {"bogus": 1}}')
    refused(bad, tmp_path / "b", CorruptError, "bogus|defaults", gate=False)
