"""`fewstep memory`: estimates, measurements in processes of their own, and the batch that fits."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fewstep.cli import main


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
    assert large["stages"][2]["activations"] == 4 * one["stages"][2]["activations"]
    assert large["largest_batch"]["predicted"] <= one["largest_batch"]["predicted"]
    assert main(["memory", folder, "--no-measure"]) == 0
    assert "images at once that fit" in capsys.readouterr().out


def test_what_is_measured_is_of_the_estimates_order(capsys: pytest.CaptureFixture[str], folder: str) -> None:
    """Measured peaks hold the weights at least; a larger size takes more; the batch that fits is a number."""
    code, data = call(capsys, "memory", folder, "--backend", "ort-cpu", "--size", "256x256")
    assert code == 0
    for stage in data["stages"]:
        assert stage["measured"] > 0.3 * stage["total"], stage
        assert stage["measured"] < 40 * stage["total"] + 200e6, stage
    assert data["largest_batch"]["measured"] >= 1


def test_what_cannot_be_measured_says_why(capsys: pytest.CaptureFixture[str], folder: str) -> None:
    for device in ("tpu", "cuda:x"):
        code, data = call(capsys, "memory", folder, "--stage", "unet", "--device", device)
        assert (code, "cpu, cuda or cuda:<index>" in data["error"]["found"]) == (2, True)
    assert call(capsys, "memory", folder, "--no-measure", "--size", "65x64")[0] == 2
    code, data = call(capsys, "memory", folder, "--no-measure", "--device", "cuda")
    assert code == 3
    assert "driver" in data["error"]["found"] or "pynvml" in data["error"]["found"]
