"""A tiny autoencoder's decoder beside the VAE, chosen by each request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fewstep
import numpy as np
import pytest
import torch
from checkpoints import make_tiny_vae, psnr
from diffusers import AutoencoderTiny
from fewstep.cli import main
from fewstep.errors import ArgumentError, UnknownNameError
from fewstep.export import export_bundle
from fewstep.runtime.pictures.parameters import command_words, read_parameters
from fewstep.serving.live.settings import LiveSettings
from fewstep.serving.server import Server

CALL: dict[str, Any] = {"steps": 2, "guidance": 3.0, "seed": 4, "size": (32, 24)}
LEAST_PSNR = 75.0


@pytest.fixture(scope="module")
def tiny_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_vae(tmp_path_factory.mktemp("taesd") / "tiny-taesd")


@pytest.fixture(scope="module")
def bundle(tiny_sd1: Path, sd1_bundle: Any, tiny_vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return export_bundle(tiny_sd1, tmp_path_factory.mktemp("b") / "b", tiny_decoder=tiny_vae, quick_gate=True)


def theirs(tiny_vae: Path, latents: Any) -> Any:
    """What diffusers' tiny autoencoder makes of latents, as its pipelines round it, uint8 [B, H, W, 3]."""
    with torch.no_grad():
        decoded = AutoencoderTiny.from_pretrained(tiny_vae).decode(torch.from_numpy(latents)).sample
    return ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def test_the_gate_judges_it_and_says_how_far_it_is(bundle: Any, sd1_bundle: Any) -> None:
    assert bundle.gate["status"] == "passed"
    assert bundle.gate["components"]["tiny_decoder"]["status"] == "passed"
    assert all(0 < v["tiny_decoder_db"] < 50 for v in bundle.gate["pictures"].values())
    assert bundle.components["vae_decoder"].graph_sha256 == sd1_bundle.components["vae_decoder"].graph_sha256
    assert bundle.components["tiny_decoder"].config["_class_name"] == "AutoencoderTiny"


@pytest.mark.parametrize("given", [{}, {"device": "cpu:torch"}, {"device": "cpu:torch", "mode": "latency"}])
def test_a_request_chooses_its_decoder(bundle: Any, tiny_vae: Path, given: dict[str, Any]) -> None:
    with fewstep.load(bundle, **given) as pipe:
        before, tiny, after = (pipe("a circle", **CALL, decoder=d) for d in ("full", "tiny", "full"))
    np.testing.assert_array_equal(before.images, after.images)
    np.testing.assert_array_equal(before.latents, tiny.latents)
    assert psnr(tiny.images, theirs(tiny_vae, tiny.latents)) >= LEAST_PSNR
    assert psnr(tiny.images, before.images) < 50


def test_previews_are_decoded_by_it(bundle: Any, tiny_vae: Path) -> None:
    with fewstep.load(bundle) as pipe:
        stream = pipe.stream(pipe.request("a circle", **CALL), previews=True)
        step = next(stream)
        assert step.x0 is not None
        assert psnr(step.preview(), theirs(tiny_vae, step.x0)) >= LEAST_PSNR
        stream.close()


def test_requests_of_both_share_a_server(bundle: Any) -> None:
    with fewstep.load(bundle, size=CALL["size"]) as pipe:
        alone = {d: pipe("a circle", **CALL, decoder=d).images for d in ("full", "tiny")}
        with Server(pipe) as server:
            tickets = {d: server.submit("a circle", **CALL, decoder=d) for d in alone}
            for name, ticket in tickets.items():
                assert psnr(ticket.result().images, alone[name]) >= LEAST_PSNR
        assert LiveSettings().request(pipe, image=False).decoder == "tiny"
        assert LiveSettings(decoder="full").request(pipe, image=False).decoder == "full"


def test_a_picture_records_it(bundle: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "tiny.png"
    words = ["run", str(bundle.folder), "--prompt=a circle", "--steps=1", "--seed=1", "--size=32x32", "--decoder=tiny"]
    assert main([*words, f"--output={output}", "--json"]) == 0
    capsys.readouterr()
    parameters = read_parameters(output)
    assert parameters["recorded"]["decoder"] == "tiny"
    assert "--decoder=tiny" in command_words(parameters, "out.png")


def test_what_cannot_be(bundle: Any, sd1_bundle: Any, tiny_sd1: Path, tiny_vae: Path, tmp_path: Path) -> None:
    with fewstep.load(sd1_bundle) as pipe:
        with pytest.raises(ArgumentError, match=r"decoder 'tiny'.*--tiny-decoder"):
            pipe.request("a circle", decoder="tiny")
        with pytest.raises(UnknownNameError, match="'tint'"):
            pipe.request("a circle", decoder="tint")
    with pytest.raises(ArgumentError, match="is an AutoencoderKL"):
        export_bundle(tiny_sd1, tmp_path / "out", tiny_decoder=tiny_sd1)
    config = json.loads((tiny_vae / "config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "diffusion_pytorch_model.safetensors").write_bytes(
        (tiny_vae / "diffusion_pytorch_model.safetensors").read_bytes()
    )
    (other / "config.json").write_text(json.dumps(config | {"latent_channels": 16}))
    with pytest.raises(ArgumentError, match="latents of 16 channels"):
        export_bundle(tiny_sd1, tmp_path / "out", tiny_decoder=other)
    assert not (tmp_path / "out").exists()
