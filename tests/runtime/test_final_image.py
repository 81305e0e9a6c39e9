"""The gate on the final image: backends that agree with torch pass, one that is a little wrong does not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fewstep.bundle import Bundle
from fewstep.cli import main
from fewstep.commands import final_image
from fewstep.commands.final_image import compare_final_images
from fewstep.engines import RunOptions, build_engines
from fewstep.engines.backends.registry import registered_backend
from fewstep.export import export_bundle
from fewstep.export.embedded import embedded_bundle, embedded_checkpoint


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    found = embedded_bundle("student")[0]
    build_engines(found, backend="ort-cpu")
    return found


class Scaled:
    """An engine whose float outputs are off by a factor."""

    def __init__(self, engine: Any, factor: float) -> None:
        self._engine, self._factor = engine, factor
        self.backend, self.device, self.capture = "scaled", "cpu", "none"
        self.inputs, self.outputs = engine.inputs, engine.outputs

    def bind(self, dims: Mapping[str, int]) -> Any:
        binding, factor = self._engine.bind(dims), np.float32(self._factor)

        class Off:
            inputs, outputs = binding.inputs, binding.outputs

            def enqueue(self, stream: int | None = None) -> None:
                binding.enqueue(stream)
                for value in binding.outputs.values():
                    if value.dtype == np.float32:
                        value *= factor

        return Off()


def test_the_graphs_and_the_engines_make_torchs_picture(bundle: Bundle) -> None:
    verdicts = compare_final_images(bundle, ["ort-cpu"])
    assert [v.subject for v in verdicts] == ["onnx-graphs", "ort-cpu"]
    assert all(v.passed and v.limit == 50.0 and v.psnr > 60.0 for v in verdicts), verdicts


def test_an_engine_that_is_a_little_wrong_fails(bundle: Bundle) -> None:
    def factory(bundle: Bundle, name: str, run: RunOptions) -> Any:
        return Scaled(final_image._open_graph(bundle, name, run), 1.05 if name == "unet" else 1.0)

    with registered_backend("scaled", factory):
        verdict = compare_final_images(bundle, ["scaled"])[-1]
    assert not verdict.passed
    assert "limit 50.0 dB" in verdict.reason
    assert 10.0 < verdict.psnr < 50.0


def test_engines_that_cannot_run_here_fail_in_words(bundle: Bundle) -> None:
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("this machine has a GPU")
    verdict = compare_final_images(bundle, ["ort-cuda"])[-1]
    assert not verdict.passed
    assert "no CUDA device" in verdict.reason
    assert json.loads(json.dumps(verdict.to_json()))["psnr_db"] is None


def test_the_command_says_it_and_fails_by_it(
    bundle: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(bundle.folder)
    assert main(["verify", folder, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [v["subject"] for v in data["images"]] == ["onnx-graphs", "ort-cpu"]
    monkeypatch.setattr(final_image, "IMAGE_PSNR_DB", 500.0)
    assert main(["verify", folder]) == 5
    out = capsys.readouterr().out
    assert "final image" in out
    assert "limit 500.0 dB" in out
    assert main(["verify", folder, "--no-image", "--json"]) == 0
    assert "images" not in json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_half_precision_is_held_to_torchs_own_error(tmp_path: Path) -> None:
    made = export_bundle(embedded_checkpoint("student"), tmp_path / "half", dtype="float16", gate=False)
    own, graphs = compare_final_images(made, [])
    assert own.subject == "torch in the bundle's precision"
    assert graphs.limit == pytest.approx(min(50.0, own.psnr - 3.52), abs=0.01)
    assert graphs.passed, graphs
