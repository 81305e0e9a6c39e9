"""Parity with diffusers: a seeded sample here, everything with FEWSTEP_PARITY=full (make parity)."""

import os

import cases
import numpy as np
import parity
import pytest
import sides
from fewstep.schedules.solvers import multistep


def test_a_sample_agrees_with_diffusers() -> None:
    full = os.environ.get("FEWSTEP_PARITY") == "full"
    table = parity.measure(cases.cases() if full else cases.sampled(4, seed=1))
    text, good = parity.report(table)
    print(text)
    assert good, text
    compared = sum(worst.cases - worst.not_finite for worst in table.values())
    assert compared > 0.9 * sum(worst.cases for worst in table.values())
    assert len(table) > 45


@pytest.mark.parametrize("field", ["a", "b", "c"])
def test_the_comparison_notices_a_wrong_coefficient(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {**cases.SD, "_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}
    case = cases.Case("dpmpp_2m_sde", config, steps=8)
    assert parity.relative_error(case, np.float32) < parity.FLOAT32_LIMIT
    compiled = sides.program_from_diffusers

    def tampered(*args: object, **kwargs: object) -> object:
        program = compiled(*args, **kwargs)  # type: ignore[arg-type]
        values = getattr(program, field)
        values.setflags(write=True)
        values[3] *= 1.001
        return program

    monkeypatch.setattr(sides, "program_from_diffusers", tampered)
    assert parity.relative_error(case, np.float32) > 10 * parity.FLOAT32_LIMIT
    assert parity.relative_error(case, np.float64) > 10 * parity.FLOAT32_LIMIT
    assert not parity.Settled.of(case).holds
    assert parity.measure([case])["dpmpp_2m_sde"].wrong == 1


LINEAR = {**cases.SD, "beta_schedule": "linear"}
OPEN = [
    cases.Case(
        "deis_3",
        {
            **LINEAR,
            "_class_name": "DEISMultistepScheduler",
            "solver_order": 3,
            "timestep_spacing": "trailing",
            "use_beta_sigmas": True,
        },
        steps=24,
    ),
    cases.Case(
        "euler cosine",
        {
            **cases.SD,
            **cases.COSINE,
            "_class_name": "EulerDiscreteScheduler",
            "prediction_type": "v_prediction",
            "timestep_spacing": "trailing",
        },
        steps=2,
    ),
    cases.Case(
        "dpmpp_3s_sde",
        {
            **LINEAR,
            "_class_name": "DPMSolverSinglestepScheduler",
            "solver_order": 3,
            "solver_type": "heun",
            "algorithm_type": "sde-dpmsolver++",
            "final_sigmas_type": "sigma_min",
        },
        steps=27,
    ),
    cases.Case(
        "deis_2 cosine",
        {
            **cases.SD,
            **cases.COSINE,
            "_class_name": "DEISMultistepScheduler",
            "prediction_type": "v_prediction",
            "timestep_spacing": "leading",
            "steps_offset": 1,
            "use_beta_sigmas": True,
        },
        steps=9,
        start=3,
    ),
]


@pytest.mark.parametrize("case", OPEN, ids=str)
def test_what_float64_leaves_open_is_settled_in_forty_digits(case: cases.Case) -> None:
    assert parity.relative_error(case, np.float64) > parity.FLOAT64_LIMIT
    settled = parity.Settled.of(case)
    assert settled.method < 1e-15
    assert settled.theirs > parity.FLOAT64_LIMIT
    assert settled.holds
    assert (settled.ours <= parity.FLOAT64_LIMIT) == (case.label not in parity.UNSTABLE)


def test_forty_digits_notice_a_formula_off_by_a_billionth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which float64 alone would let pass for rounding in a sampler that is unstable."""
    right = multistep._exponential_integral
    monkeypatch.setattr(multistep, "_exponential_integral", lambda p, end: right(p, end) * (1 + 1e-9))
    for case in (OPEN[0], OPEN[3]):
        assert parity.Settled.of(case).method > parity.FLOAT64_LIMIT
        assert not parity.Settled.of(case).holds
        assert parity.measure([case])[case.label].wrong == 1
