"""The floor: FLOPs by definition, and a run on the embedded decoder against torch's own count."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from fewstep.bench.floor import flops, main, with_floor
from torch.utils.flop_counter import FlopCounterMode

STUDENT = Path(__file__).parents[2] / "export" / "demo" / "student"


@pytest.mark.parametrize(
    ("operator", "inputs", "outputs", "expected"),
    [
        ("Conv", [[1, 8, 5, 5], [16, 8, 3, 3]], [[1, 16, 5, 5]], 2 * 16 * 25 * 8 * 9),
        ("MatMul", [[2, 7, 4], [4, 3]], [[2, 7, 3]], 2 * 2 * 7 * 4 * 3),
        ("Gemm", [[7, 4], [3, 4]], [[7, 3]], 2 * 7 * 4 * 3),
        ("MultiHeadAttention", [[2, 5, 8], [2, 9, 8]], [[2, 5, 8]], 2 * 2 * 2 * 5 * 9 * 8),
        ("Attention", [[2, 4, 5, 2], [2, 4, 9, 2]], [[2, 4, 5, 2]], 2 * 2 * 2 * 4 * 5 * 9 * 2),
        ("Add", [[4], [4]], [[4]], 0),
    ],
)
def test_flops_are_two_for_each_product(
    operator: str, inputs: list[list[int]], outputs: list[list[int]], expected: int
) -> None:
    assert flops(operator, inputs, outputs) == expected


def test_the_floor_is_the_larger_of_arithmetic_and_weights() -> None:
    data = {"ms": 10.0, "weights_mb": 100.0, "rows": [{"gflop": 0.2}, {"gflop": 0.3}]}
    floor = with_floor(data, 100.0, 50.0)
    assert (floor["floor_flops_ms"], floor["floor_weights_ms"], floor["above_floor"]) == (5.0, 2.0, 2.0)
    assert with_floor(data, 1000.0, 50.0)["above_floor"] == 5.0


def test_the_embedded_decoder_is_counted_as_torch_counts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE_DIR", str(tmp_path / "cache"))
    output = tmp_path / "floor.json"
    arguments = ["floor.py", "student", "--components", "vae_decoder", "--runs", "2", "--threads", "1"]
    monkeypatch.setattr("sys.argv", [*arguments, "--output", str(output)])
    assert main() == 0
    part = json.loads(output.read_text())["components"]["vae_decoder"]
    assert {"Conv", "InstanceNormalization", "MultiHeadAttention"} <= {r["operator"] for r in part["rows"]}
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(STUDENT / "vae"))
        latent = torch.zeros(1, 4, 16, 16)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae.decode(latent)
    # ONNX Runtime's layout pads channels to its vector's width, so that a little more is computed than torch counts
    assert part["gflop"] == pytest.approx(counter.get_total_flops() / 1e9, rel=0.05)
