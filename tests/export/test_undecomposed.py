"""Leaving out the exporter's second trace changes no graph: small modules, exported with and without it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.reference
import pytest
import torch
from fewstep.export.trace import undecomposed as subject
from fewstep.export.trace.undecomposed import undecomposed
from torch import nn
from torch.onnx._internal.exporter import _fx_passes


class Block(nn.Module):
    """What UNets are made of, with conversions to the same type and to another."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3, padding=1)
        self.up = nn.Upsample(scale_factor=2)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        scale = torch.exp(t.to(torch.float32)).to(x.dtype)[:, None, None, None]
        h = self.conv(torch.nn.functional.silu(self.norm(x))) * scale
        return self.up(x + h).to(torch.float32)


class InPlace(nn.Module):
    """Changes what it made, which only decompositions take apart."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y.add_(t.to(x.dtype)[:, None, None, None])
        return y


def export(module: nn.Module) -> onnx.ModelProto:
    given = {"x": torch.zeros(2, 4, 6, 6), "t": torch.zeros(2, dtype=torch.int64)}
    height = torch.export.Dim("height")
    program = torch.onnx.export(
        module.eval(),
        kwargs=given,
        dynamo=True,
        optimize=False,
        opset_version=23,
        dynamic_shapes={"x": {2: height}, "t": {}},
        verbose=False,
    )
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    return model


def run(model: onnx.ModelProto) -> np.ndarray:
    rng = np.random.default_rng(0)
    x, t = rng.standard_normal((2, 4, 10, 6)).astype(np.float32), np.array([1, 2], np.int64)
    (out,) = onnx.reference.ReferenceEvaluator(model).run(None, {"x": x, "t": t})
    return np.asarray(out)


@pytest.mark.parametrize(("kind", "plain"), [(Block, True), (InPlace, False)])
def test_the_graph_is_the_same(kind: type[nn.Module], plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators in their order, and what they compute; where decompositions are needed they are made."""
    told: list[bool] = []
    real = subject._plain

    def spied(*given: Any) -> bool:
        told.append(real(*given))
        return told[-1]

    monkeypatch.setattr(subject, "_plain", spied)
    torch.manual_seed(0)
    module, before = kind(), _fx_passes.decompose_with_registry
    usual = export(module)
    with undecomposed():
        own = export(module)
    assert told == [plain]
    assert _fx_passes.decompose_with_registry is before
    assert [n.op_type for n in own.graph.node if n.op_type != "Cast"] == [
        n.op_type for n in usual.graph.node if n.op_type != "Cast"
    ]
    np.testing.assert_array_equal(run(own), run(usual))


def test_another_torch_decomposes_as_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(_fx_passes, "decompose_with_registry")
    with undecomposed():
        assert not hasattr(_fx_passes, "decompose_with_registry")


def test_the_exporters_own_function_is_back_after_an_error() -> None:
    before = _fx_passes.decompose_with_registry
    with pytest.raises(ZeroDivisionError), undecomposed():
        raise ZeroDivisionError
    assert _fx_passes.decompose_with_registry is before
