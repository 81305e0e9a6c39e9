"""Clip skip at run time: one graph gives every layer that diffusers' `clip_skip` can name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fewstep.engines.backends.ort import OrtEngine
from fewstep.export.checkpoint.folder import open_checkpoint
from fewstep.export.gate.loading import load_model


def encode(bundle: Any, name: str, ids: np.ndarray, skip: int) -> dict[str, np.ndarray]:
    part = bundle.components[name]
    engine = OrtEngine.from_onnx(bundle.path(part.graph), inputs=part.inputs, outputs=part.outputs)
    binding = engine.bind({"prompts": len(ids)})
    np.copyto(binding.inputs["input_ids"], ids)
    np.copyto(binding.inputs["clip_skip"], skip)
    binding.enqueue()
    return {n: np.array(v) for n, v in binding.outputs.items()}


@pytest.mark.parametrize(
    ("family", "name"),
    [("sd1", "text_encoder"), ("sd2", "text_encoder"), ("sdxl", "text_encoder"), ("sdxl", "text_encoder_2")],
)
def test_every_layer_is_diffusers_own(family: str, name: str, request: pytest.FixtureRequest) -> None:
    """SD takes hidden_states[-(n + 1)] through the final norm, SDXL hidden_states[-(n + 2)] as it is."""
    bundle = request.getfixturevalue(f"{family}_bundle")
    checkpoint = open_checkpoint(request.getfixturevalue(f"tiny_{family}"))
    model = load_model(checkpoint, checkpoint.parts[name])
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 77))
    with torch.no_grad():
        states = model(torch.from_numpy(ids), output_hidden_states=True).hidden_states
        wanted = [states[-(n + 2)] for n in range(len(states) - 1)]
        if family != "sdxl":
            wanted = [model.final_layer_norm(states[-(n + 1)]) for n in range(len(states))]
    found = [encode(bundle, name, ids, n) for n in range(len(wanted))]
    for n, layer in enumerate(wanted):
        np.testing.assert_allclose(found[n]["hidden"], layer.numpy(), rtol=1e-4, atol=2e-5, err_msg=f"clip_skip={n}")
        assert n == 0 or not np.allclose(found[n]["hidden"], found[0]["hidden"], atol=1e-3)
        if "pooled" in found[n]:
            np.testing.assert_array_equal(found[n]["pooled"], found[0]["pooled"])


def test_the_gate_covers_a_skipped_layer(sd1_bundle: Any) -> None:
    from fewstep.engines.gate.verify import load_cases

    skips = [int(c.inputs["clip_skip"][0]) for c in load_cases(sd1_bundle) if c.component == "text_encoder"]
    assert {0, 1} <= set(skips)
