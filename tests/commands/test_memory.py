"""`fewstep memory`: estimates, measurements in processes of their own, and the batch that fits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from checkpoints import make_sd1
from fewstep.bundle import Bundle, read_bundle
from fewstep.cli import main
from fewstep.commands.memory import _lines
from fewstep.engines.machine import peak_memory
from fewstep.engines.memory import ADAPTED, WITHIN, dims_for, predict_stage
from fewstep.export import export_bundle

HELD = ("weights", "buffers", "activations")


@pytest.fixture(scope="module")
def folder() -> str:
    from fewstep.export.embedded import embedded_bundle

    return str(embedded_bundle("base")[0].folder)


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_estimates_grow_with_what_they_are_of(capsys: pytest.CaptureFixture[str], folder: str) -> None:
    code, one = call(capsys, "memory", folder, "--no-measure")
    _, four = call(capsys, "memory", folder, "--no-measure", "--batch", "4")
    _, large = call(capsys, "memory", folder, "--no-measure", "--size", "128x128")
    assert code == 0
    assert [s["component"] for s in one["stages"]] == ["text_encoder", "unet", "vae_decoder"]
    for few, many in zip(one["stages"], four["stages"], strict=True):
        assert many["weights"] == few["weights"]
        assert many["activations"] == 4 * few["activations"]
        assert few["total"] == few["library"] + max(few["opening"], sum(few[n] for n in HELD))
    assert large["stages"][2]["activations"] == 4 * one["stages"][2]["activations"]
    assert large["largest_batch"]["predicted"] <= one["largest_batch"]["predicted"]
    assert main(["memory", folder, "--no-measure"]) == 0
    assert "images at once that fit" in capsys.readouterr().out


def test_what_is_measured_is_what_is_estimated(capsys: pytest.CaptureFixture[str], folder: str) -> None:
    """Each stage within the stated factor, whatever else this process has measured; the batch that fits is a number."""
    _, small = call(capsys, "memory", folder, "--backend", "ort-cpu", "--size", "64x64")
    code, data = call(capsys, "memory", folder, "--backend", "ort-cpu", "--size", "256x256")
    assert small["stages"][1]["measured"] < 0.8 * data["stages"][1]["measured"]
    assert code == 0
    for stage in data["stages"]:
        assert 1 / WITHIN < stage["measured"] / stage["total"] < WITHIN, stage
    assert data["largest_batch"]["measured"] >= 1
    assert data["largest_batch"]["predicted"] >= 1


@pytest.fixture(scope="module")
def many_tokens(tmp_path_factory: pytest.TempPathFactory) -> str:
    """SD 1.5's tokens and heads at its own size, in two levels of few channels, and a VAE of four levels as its own."""
    place = tmp_path_factory.mktemp("memory")
    levels: dict[str, Any] = {"layers_per_block": 1, "norm_num_groups": 8}
    narrow = {"block_out_channels": (16, 32, 64, 64), "down_block_types": ("DownEncoderBlock2D",) * 4}
    make_sd1(
        place / "checkpoint",
        vae={**levels, **narrow, "up_block_types": ("UpDecoderBlock2D",) * 4},
        **levels, block_out_channels=(32, 64), attention_head_dim=8, sample_size=64,
    )  # fmt: skip
    return str(export_bundle(place / "checkpoint", place / "bundle", gate=False).folder)


@pytest.mark.parametrize(
    ("stage", "size", "batch"),
    [("unet", "256x256", 1), ("unet", "768x512", 1), ("unet", "256x256", 6), ("vae_decoder", "512x512", 1)],
)
def test_attention_by_blocks_is_not_counted_as_scores(many_tokens: str, stage: str, size: str, batch: int) -> None:
    """All scores of a level would be 1.1 GB a row at 512x512; what is measured has none, and so has the estimate."""
    measured, expected = both(many_tokens, stage, size, batch)
    assert 1 / WITHIN < measured / expected < WITHIN, (measured, expected)
    assert measured < 0.5e9


@pytest.mark.parametrize("size", ["128x128", "384x384"])
def test_scores_that_are_written_are_counted(folder: str, size: str) -> None:
    """The embedded model's own size has few: its engines write them all, at larger sizes too."""
    measured, expected = both(folder, "unet", size, 1)
    assert 1 / WITHIN < measured / expected < WITHIN, (measured, expected)


def test_the_engine_of_loras_is_counted(capsys: pytest.CaptureFixture[str], folder: str) -> None:
    code, data = call(capsys, "memory", folder, "--backend=ort-cpu", "--size=256x256", "--lora-rank=16")
    assert code == 0
    stage = data["stages"][-1]
    assert stage["component"] == ADAPTED
    assert stage["buffers"] > data["stages"][1]["buffers"], "matrices of all layers"
    assert 1 / WITHIN < stage["measured"] / stage["total"] < WITHIN, stage


def test_what_controls_add_is_counted(adapted_sd1: Any, sd1_bundle: Bundle) -> None:
    """Their residuals are as large as all that the UNet skips, and two sets of them are alive at once."""
    sides = []
    for bundle in (adapted_sd1.bundle, sd1_bundle):
        sides.append(predict_stage(bundle, "unet", dims_for(bundle, (256, 256), 4)))
    assert sides[0].activations > sides[1].activations
    assert sides[0].buffers > sides[1].buffers + 8 * 3 * 256 * 256 * 4, "a picture a row"


def both(folder: str, stage: str, size: str, batch: int) -> tuple[int, int]:
    """A stage's peak in bytes, measured in a process of its own, and estimated."""
    bundle = read_bundle(folder)
    width, height = map(int, size.split("x"))
    command = [sys.executable, "-m", "fewstep", "memory", folder, "--json", "--backend=ort-cpu", f"--stage={stage}"]
    done = subprocess.run([*command, f"--size={size}", f"--batch={batch}"], capture_output=True, text=True, check=True)
    expected = predict_stage(bundle, stage, dims_for(bundle, (width, height), batch))
    return json.loads(done.stdout)["measured"], expected.total


LIMITED = """
import resource, sys
import fewstep
from fewstep.errors import OutOfMemoryError
from fewstep.export.embedded import embedded_bundle

pipe = fewstep.load(embedded_bundle("student")[0], threads=1, backend="ort-cpu")
asked = {"steps": 1, "seed": 1, "guidance": 1.0}
first = pipe("a circle", **asked).images
held = next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))
for megabytes, size in ((20, 256), (50, 512), (300, 1024), (100, 4096), (300, 4096)):
    resource.setrlimit(resource.RLIMIT_AS, (held + megabytes * 2**20, resource.RLIM_INFINITY))
    try:
        pipe("a circle", size=(size, size), **asked)
        sys.exit(f"{size} fits into {megabytes} MB")
    except OutOfMemoryError as error:
        assert f"{size}x{size}" in error.found and error.expected and error.remedy, error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    assert (pipe("a circle", **asked).images == first).all(), "the pipeline works afterwards"
print("typed")
"""


def test_running_out_of_memory_is_typed(folder: str) -> None:
    """By the system's own limit on a process; in ONNX Runtime's arena, in NumPy, and on the command line."""
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, check=False)
    assert done.stdout == "typed\n", done.stderr[-2000:]
    run = "exec python -m fewstep run student --prompt x --size 4096x4096 --backend ort-cpu --threads 1 --json"
    limited = f"ulimit -v 1500000; {run}".replace("python", sys.executable, 1)
    done = subprocess.run(["/bin/bash", "-c", limited], capture_output=True, text=True, check=False)
    error = json.loads(done.stdout)
    assert (done.returncode, error["error"]["type"]) == (3, "OutOfMemoryError"), done.stderr[-2000:]
    assert done.stderr == f"fewstep: {error['error']['found']}; expected a smaller size. {error['error']['remedy']}\n"


def test_what_does_not_fit_is_said_by_what_the_error_names(folder: str) -> None:
    """The remedy of running out of memory is this command: it has to answer where memory does not suffice."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (1_500_000_000,) * 2)"
    command = [folder, "--backend=ort-cpu", "--size=4096x4096", "--json"]
    run = f"{limit}; from fewstep.cli import main; raise SystemExit(main(['memory', *{command!r}]))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    data = json.loads(done.stdout)
    measured = {s["component"]: s["measured"] for s in data["stages"]}
    assert measured["unet"] is None
    assert measured["text_encoder"] > 0
    assert data["largest_batch"]["measured"] == 0
    assert any(n.startswith("unet") and n.endswith("does not fit") for n in _lines(data))


def test_a_peak_is_in_bytes_where_the_system_tells_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    kibibytes = peak_memory()
    monkeypatch.setattr(sys, "platform", "darwin")  # whose kernel counts bytes
    counted = peak_memory()
    assert kibibytes is not None
    assert counted is not None
    assert 0.9 < kibibytes / (1024 * counted) < 1.1


def test_what_cannot_be_measured_says_why(capsys: pytest.CaptureFixture[str], folder: str) -> None:
    for device in ("tpu", "cuda:x"):
        code, data = call(capsys, "memory", folder, "--stage", "unet", "--device", device)
        assert (code, "cpu, cuda or cuda:<index>" in data["error"]["found"]) == (2, True)
    assert call(capsys, "memory", folder, "--no-measure", "--size", "65x64")[0] == 2
    code, data = call(capsys, "memory", folder, "--no-measure", "--device", "cuda")
    assert code == 3
    assert "driver" in data["error"]["found"] or "pynvml" in data["error"]["found"]
