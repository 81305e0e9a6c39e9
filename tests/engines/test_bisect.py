"""Bisection: a node that was made wrong is named, wherever it stands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from fewstep.bundle import Bundle
from fewstep.engines.gate.bisect import bisect_engine
from fewstep.engines.gate.gate import Evaluate
from fewstep.engines.gate.reference import Case
from small_bundle import SPECS, example

DIMS = {"rows": 1, "height": 4, "width": 6, "tokens": 77}


def case_of(component: str = "unet") -> Case:
    inputs = example(component, DIMS)
    return Case(component=component, index=0, dims=DIMS, inputs=inputs, outputs={}, torch_error={"float32": 1e-7})


def spoiled(node: str, operator: str) -> Any:
    """A backend that computes another function in one node."""

    def make(cut: Bundle, component: str) -> Evaluate:
        path = cut.path(cut.component(component).graph)
        model = onnx.load(str(path), load_external_data=False)
        for one in model.graph.node:
            if one.name == node:
                one.op_type = operator
        wrong = path.with_name("wrong.onnx")
        onnx.save(model, str(wrong))
        session = onnxruntime.InferenceSession(str(wrong), providers=["CPUExecutionProvider"])

        def evaluate(inputs: Mapping[str, np.ndarray], dims: Mapping[str, int]) -> dict[str, np.ndarray]:
            names = [o.name for o in session.get_outputs()]
            return dict(zip(names, session.run(names, dict(inputs)), strict=True))

        return evaluate

    return make


@pytest.mark.parametrize(
    ("node", "operator", "instead"),
    [("sigmoid_2", "Sigmoid", "Tanh"), ("mul_5", "Mul", "Sub"), ("add_14", "Add", "Sub")],
)
def test_the_node_that_is_wrong_is_named(bundle: Bundle, node: str, operator: str, instead: str) -> None:
    seen: list[str] = []
    found = bisect_engine(bundle, "unet", case_of(), candidate=spoiled(node, instead), progress=seen.append)
    assert found is not None
    assert (found.node, found.operator) == (node, operator)
    assert found.before <= found.limit < found.rel_l2
    assert found.builds == len(seen) <= 6


@pytest.mark.parametrize("component", list(SPECS))
def test_a_backend_that_agrees_has_no_culprit(bundle: Bundle, component: str) -> None:
    case = case_of("unet")
    dims = {**DIMS, "prompts": 1, "batch": 1}
    case = Case(component=component, index=0, dims=dims, inputs=example(component, dims), outputs={}, torch_error={})
    assert bisect_engine(bundle, component, case) is None


def test_a_limit_below_rounding_finds_the_first_rounding(bundle: Bundle) -> None:
    """The engine of ONNX Runtime itself: reordered convolutions round otherwise, which a limit of zero calls wrong."""
    found = bisect_engine(bundle, "unet", case_of(), limit=0.0)
    assert found is not None
    assert found.before == 0
    assert found.rel_l2 < 1e-5
