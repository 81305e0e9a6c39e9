"""`fewstep swap` on the command line, and the same between a server's requests."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import fewstep
import numpy as np
import pytest
from fewstep.bundle import Bundle
from fewstep.cli import main
from fewstep.errors import UnavailableError
from fewstep.export.embedded import embedded_bundle
from fewstep.serving import Server
from PIL import Image
from safetensors.numpy import load_file, save_file


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return embedded_bundle("student")[0]


@pytest.fixture(scope="module")
def lora(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    random, tensors = np.random.default_rng(1), {}
    for name, value in load_file(bundle.path(bundle.component("unet").weights)).items():
        if name.endswith("attn1.to_q.weight"):
            module = name.removeprefix("model.").removesuffix(".weight")
            tensors[f"unet.{module}.lora_A.weight"] = random.normal(size=(4, value.shape[1])).astype(np.float32)
            tensors[f"unet.{module}.lora_B.weight"] = random.normal(size=(value.shape[0], 4)).astype(np.float32)
    path = tmp_path_factory.mktemp("lora") / "style.safetensors"
    save_file(tensors, path)
    return path


def test_the_command_says_what_it_did(
    bundle: Bundle, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["swap", "student", "--lora", f"{lora}:0.7", "--backend", "ort-cpu", "--threads", "1"]
    assert main([*words, "--prompt", "a red circle", "--seed", "3", "--output", str(tmp_path / "o.png"), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert list(data["components_ms"]) == ["unet"]
    assert data["loaded"]["unet"] != bundle.component("unet").weights_sha256
    assert data["loaded"]["vae_decoder"] == bundle.component("vae_decoder").weights_sha256
    pipe = fewstep.load(bundle, backend="ort-cpu", threads=1)
    expected = pipe("a red circle", seed=3, loras={lora: 0.7}).images[0].astype(np.float64)
    with Image.open(tmp_path / "o.png") as picture:
        error = np.mean((np.asarray(picture) - expected) ** 2)
    assert error == 0 or 10 * np.log10(255**2 / error) > 75
    assert main(["swap", "student", "student"]) == 0
    assert "nothing differs" in capsys.readouterr().out
    assert main(["swap", "student", "base"]) == 0, "the two embedded models are of one architecture"
    assert "embedded-base in" in capsys.readouterr().out


def test_a_server_finishes_what_it_has_accepted_first(bundle: Bundle, lora: Path) -> None:
    pipe = fewstep.load(bundle, swappable=True, threads=1)
    asked: dict[str, Any] = {"steps": 30, "guidance": 3.0, "seed": 3}
    plain = pipe("a red circle", **asked).images
    with Server(pipe, most_slots=2, most_rows=2, buckets=[2], row_threads=1) as server:
        ticket = server.submit("a red circle", **asked)
        thread = threading.Thread(target=server.load_weights, kwargs={"loras": {lora: 3.0}})
        thread.start()
        while server.state != "swapping":
            time.sleep(0.001)
        with pytest.raises(UnavailableError, match="swapping"):
            server.submit("a red circle", **asked)
        assert ticket.result(60).images.shape == plain.shape
        thread.join(60)
        assert server.state == "ready"
        styled = server.generate("a red circle", **asked).images
    assert np.abs(ticket.result().images.astype(int) - plain).max() <= 1
    assert np.abs(styled.astype(int) - plain).max() > 5
    assert np.abs(styled.astype(int) - pipe("a red circle", **asked).images).max() <= 1
