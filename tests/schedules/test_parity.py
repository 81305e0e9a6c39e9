"""Parity with diffusers: a seeded sample here, everything with FEWSTEP_PARITY=full (make parity)."""

import os

import numpy as np
import parity
import pytest


def test_a_sample_agrees_with_diffusers() -> None:
    full = os.environ.get("FEWSTEP_PARITY") == "full"
    table = parity.measure(parity.cases() if full else parity.sampled(4, seed=1))
    text, good = parity.report(table)
    print(text)
    assert good, text
    compared = sum(worst.cases - worst.not_finite for worst in table.values())
    assert compared > 0.9 * sum(worst.cases for worst in table.values())
    assert len(table) > 45


@pytest.mark.parametrize("field", ["a", "b", "c"])
def test_the_comparison_notices_a_wrong_coefficient(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {**parity.SD, "_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}
    case = parity.Case("dpmpp_2m_sde", config, steps=8)
    assert parity.relative_error(case, np.float32) < parity.FLOAT32_LIMIT
    compiled = parity.program_from_diffusers

    def tampered(*args: object, **kwargs: object) -> object:
        program = compiled(*args, **kwargs)  # type: ignore[arg-type]
        values = getattr(program, field)
        values.setflags(write=True)
        values[3] *= 1.001
        return program

    monkeypatch.setattr(parity, "program_from_diffusers", tampered)
    assert parity.relative_error(case, np.float32) > 10 * parity.FLOAT32_LIMIT
    assert parity.relative_error(case, np.float64) > parity.ROUNDING_RATIO
