"""Polygraphy's comparison agrees with the gate's, on engines that are right and on engines that are wrong."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from fewstep.bundle import Bundle
from fewstep.engines.backends.ort import OrtEngine
from fewstep.engines.gate.cross_check import compare_with_polygraphy
from fewstep.engines.gate.gate import Evaluate, engine_function, gate_engine
from fewstep.engines.gate.reference import Case
from fewstep.errors import MissingError
from small_bundle import example

pytest.importorskip("polygraphy")

DIMS = ({"rows": 1, "height": 4, "width": 6, "tokens": 77}, {"rows": 3, "height": 8, "width": 4, "tokens": 77})


@pytest.fixture
def function(bundle: Bundle) -> Evaluate:
    part = bundle.component("unet")
    return engine_function(OrtEngine.from_onnx(bundle.path(part.graph), inputs=part.inputs, outputs=part.outputs))


@pytest.fixture
def cases(function: Evaluate) -> list[Case]:
    return [
        Case(
            component="unet",
            index=i,
            dims=dims,
            inputs=example("unet", dims, i),
            outputs=function(example("unet", dims, i), dims),
            torch_error={"float16": 1e-3},
        )
        for i, dims in enumerate(DIMS)
    ]


def scaled(function: Evaluate, factor: float) -> Evaluate:
    """Wrong by a factor: a relative L2 error of exactly `factor - 1`."""

    def evaluate(inputs: Mapping[str, np.ndarray], dims: Mapping[str, int]) -> dict[str, np.ndarray]:
        return {n: v * np.float32(factor) for n, v in function(inputs, dims).items()}

    return evaluate


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("factor", [1.0, 1.00008, 1.0002, 1.0014, 1.0016, 1.5])
def test_both_judges_agree(function: Evaluate, cases: list[Case], dtype: str, factor: float) -> None:
    subject = scaled(function, factor)
    ours = gate_engine(subject, cases, component="unet", dtype=dtype, check=False).passed
    theirs = compare_with_polygraphy({"subject": subject, "itself": function}, cases, component="unet", dtype=dtype)
    assert theirs == {"subject": ours, "itself": True}
    assert ours == (factor - 1 < {"float32": 1e-4, "float16": 1.5e-3}[dtype])


def test_one_wrong_case_is_enough_to_fail(function: Evaluate, cases: list[Case]) -> None:
    def evaluate(inputs: Mapping[str, np.ndarray], dims: Mapping[str, int]) -> Mapping[str, np.ndarray]:
        return scaled(function, 2.0 if dims["rows"] == 3 else 1.0)(inputs, dims)

    verdicts = compare_with_polygraphy({"the engine": evaluate}, cases, component="unet", dtype="float32")
    assert verdicts == {"the engine": False}
    with pytest.raises(MissingError, match="no case"):
        compare_with_polygraphy({"the engine": evaluate}, cases, component="vae_decoder", dtype="float32")
