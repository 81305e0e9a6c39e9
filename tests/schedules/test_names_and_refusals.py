"""Names of four families mean what they say; what cannot be is refused with what mends it."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
from fewstep.errors import ArgumentError, CorruptError, UnknownNameError, UnsupportedError
from fewstep.schedules import NoiseSchedule, Program, compile_program, program_from_diffusers, resolve_sampler
from fewstep.schedules.compat.classes import CLASSES, admits_thresholding
from fewstep.schedules.names import SCHEDULE_ALIASES, resolve_schedule, sampler_aliases
from fewstep.schedules.solvers.registry import SAMPLERS
from fewstep.schedules.spacing import SPACINGS

NOISE = NoiseSchedule.scaled_linear()


@pytest.mark.parametrize(
    ("name", "sampler", "schedule", "options"),
    [
        ("euler", "euler", None, {}),
        ("Euler a", "euler_ancestral", None, {}),
        ("DPM++ 2M Karras", "dpmpp_2m", "karras", {}),
        ("DPM++ 2M SDE Exponential", "dpmpp_2m_sde", "exponential", {}),
        ("DPM++ 2M SDE Heun Karras", "dpmpp_2m_sde", "karras", {"solver_type": "heun"}),
        ("DPM2 a Karras", "kdpm2_ancestral", "karras", {}),
        ("dpmpp_3m_sde", "dpmpp_3m_sde", None, {}),
        ("uni_pc_bh2", "unipc_3", None, {"solver_type": "bh2"}),
        ("DPMSolverMultistepScheduler", "dpmpp_2m", None, {}),
        ("KDPM2DiscreteScheduler", "kdpm2", None, {}),
        ("LMS Karras", "lms", "karras", {}),
        ("Euler SGM Uniform", "euler", "sgm_uniform", {}),
        ("PLMS", "plms", None, {}),
        ("dpmpp_2m_sde_gpu", "dpmpp_2m_sde", None, {}),
    ],
)
def test_aliases(name: str, sampler: str, schedule: str | None, options: dict[str, Any]) -> None:
    found = resolve_sampler(name)
    assert (found.name, found.schedule, dict(found.options)) == (sampler, schedule, options)


def test_every_alias_leads_somewhere_and_every_class_has_a_name() -> None:
    for alias, resolved in sampler_aliases().items():
        assert resolve_sampler(alias) == resolved
        assert set(resolved.options) <= set(SAMPLERS[resolved.name].options), alias
        compile_program(alias, steps=4, noise=NOISE)
    assert set(SCHEDULE_ALIASES.values()) <= set(SPACINGS)
    for name in CLASSES.keys() - {"EDMDPMSolverMultistepScheduler"}:
        assert resolve_sampler(name).name in SAMPLERS
    with pytest.raises(UnsupportedError, match="own scheduler alone"):
        resolve_sampler("EDMDPMSolverMultistepScheduler")


def test_names_carry_their_schedule_and_options_into_the_program() -> None:
    program = compile_program("DPM++ 2M Karras", steps=5, noise=NOISE)
    assert (program.sampler, program.schedule) == ("dpmpp_2m", "karras")
    pair = compile_program("dpmpp_2m", schedule="karras", steps=5, noise=NOISE)
    assert np.array_equal(program.b, pair.b)
    heun = compile_program("DPM++ 2M SDE Heun", steps=5, noise=NOISE)
    assert not np.array_equal(heun.b, compile_program("dpmpp_2m_sde", steps=5, noise=NOISE).b)
    comfy = compile_program("uni_pc", schedule="normal", steps=5, noise=NOISE)
    assert (comfy.sampler, comfy.schedule) == ("unipc_3", "linspace")
    with pytest.raises(ArgumentError, match="carries the schedule 'karras'"):
        compile_program("DPM++ 2M Karras", schedule="trailing", steps=5, noise=NOISE)


@pytest.mark.parametrize(
    ("name", "near"), [("eular", "euler"), ("dpmpp2m", "dpmpp_2m"), ("ddmi", "ddim"), ("unipc_4", "unipc")]
)
def test_unknown_samplers_name_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UnknownNameError, match=near):
        compile_program(name, steps=5, noise=NOISE)


def test_unknown_schedules_name_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="karras"):
        resolve_schedule("karas")
    with pytest.raises(UnknownNameError, match="trailing"):
        compile_program("euler", schedule="trialing", steps=5, noise=NOISE)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("DPM++ 2S a Karras", "its ancestral two-stage steps"),
        ("Euler CFG++", "its guidance inside the step"),
        ("euler_ancestral_cfg_pp", "its guidance inside the step"),
        ("DPM fast", "its fixed orders"),
    ],
)
def test_a_refused_sampler_is_a_sentence_with_its_reason(name: str, why: str) -> None:
    with pytest.raises(UnsupportedError) as raised:
        compile_program(name, steps=5, noise=NOISE)
    assert raised.value.found == f"the sampler {name!r} is known and not done, for {why}"


@pytest.mark.parametrize(
    "name",
    ["DPM adaptive", "Restart", "dpmpp_2s_ancestral", "FlowMatchEulerDiscreteScheduler", "euler_cfg_pp", "ipndm_v"],
)
def test_known_samplers_that_are_not_done_are_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedError, match=name):
        compile_program(name, steps=5, noise=NOISE)


@pytest.mark.parametrize(
    ("option", "compat"),
    [
        *itertools.product(["guidance_rescale", "use_clipped_model_output", "use_flow_sigmas"], [None, "diffusers"]),
        ("clip_sample", None),
    ],
)
def test_what_is_not_linear_is_refused_by_name(option: str, compat: str | None) -> None:
    with pytest.raises(UnsupportedError, match=option):
        compile_program("ddim", steps=5, noise=NOISE, compat=compat, **{option: True})


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"_class_name": "DDPMScheduler", "variance_type": "learned"}, "learned"),
        ({"_class_name": "DDPMScheduler", "variance_type": "fixed_large_log"}, "fixed_large_log"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"}, "dpmsolver"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas"),
        ({"_class_name": "DPMSolverMultistepScheduler", "variance_type": "fixed_small"}, "fixed_small"),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 4}, "solver_order"),
        ({"_class_name": "UniPCMultistepScheduler", "predict_x0": False}, "predict_x0"),
        ({"_class_name": "UniPCMultistepScheduler", "solver_p": {"x": 1}}, "solver_p"),
        ({"_class_name": "EulerAncestralDiscreteScheduler", "prediction_type": "sample"}, "sample"),
        (
            {
                "_class_name": "EDMDPMSolverMultistepScheduler",
                "solver_order": 3,
                "algorithm_type": "sde-dpmsolver++",
            },
            "solver_order 3",
        ),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "flow matching"),
    ],
)
def test_configs_that_rows_cannot_follow_are_refused_by_name(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        program_from_diffusers(config, steps=5)


def test_unknown_classes_and_options_name_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="EulerDiscreteScheduler"):
        program_from_diffusers({"_class_name": "EulerDiscretScheduler"}, steps=5)
    with pytest.raises(UnknownNameError):
        program_from_diffusers({}, steps=5)
    with pytest.raises(UnknownNameError, match="eta"):
        compile_program("ddim", steps=5, noise=NOISE, etaa=0.5)
    with pytest.raises(UnknownNameError, match="use_karras_sigmas"):
        compile_program("euler", steps=5, noise=NOISE, compat="diffusers", use_karras=True)
    with pytest.raises(UnknownNameError, match="timestep_spacing"):
        program_from_diffusers({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "middling"}, steps=5)


IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"steps": 0}, "steps"),
    ({"steps": -3}, "steps"),
    ({"steps": 2.5}, "steps"),
    ({"steps": True}, "steps"),
    ({"steps": 1001}, "expected at most 1000"),
    ({}, "steps=..."),
    ({"steps": 5, "start": 5}, "strength"),
    ({"steps": 5, "start": -1}, "start"),
    ({"schedule": "karras", "timesteps": [999, 500]}, "Drop schedule"),
    ({"schedule": "karras", "sigmas": [10.0, 0.0]}, "Drop schedule"),
    ({"steps": 2, "timesteps": [999, 500]}, "Drop steps"),
    ({"timesteps": [999, 500], "sigmas": [3.0, 1.0]}, "one of them"),
    ({"timesteps": []}, "empty"),
    ({"timesteps": [500, 999]}, "falling"),
    ({"timesteps": [999, 999]}, "falling"),
    ({"timesteps": [1000, 2]}, "at most 999"),
    ({"timesteps": [999, float("nan")]}, "finite"),
    ({"timesteps": [-1]}, "none below 0"),
    ({"timesteps": [999], "last_sigma": "own"}, "at least two"),
    ({"sigmas": [99.0, 1.0, 0.0]}, "trained to"),
    ({"sigmas": [0.0]}, "at least two"),
    ({"sigmas": [3.0, 0.0], "last_sigma": "zero"}, "own"),
    ({"steps": 5, "last_sigma": "own"}, "no end of its own"),
    ({"steps": 5, "last_sigma": "sigmamin"}, "sigma_min"),
    ({"steps": 5, "last_sigma": 100.0}, "last_sigma"),
    ({"steps": 5, "last_sigma": float("nan")}, "last_sigma"),
    ({"steps": 5, "schedule": "karras", "sigma_min": 5.0, "sigma_max": 1.0}, "sigma_min"),
    ({"steps": 5, "prediction": "eps"}, "epsilon"),
    ({"steps": 5, "compat": "k-diffusion"}, "diffusers"),
    ({"steps": 5, "s_churn": -1.0}, "s_churn"),
    ({"steps": 5, "s_churn": -1.0, "compat": "diffusers"}, "s_churn"),
    ({"steps": 5, "schedule": "karras", "rho": 0.0}, "rho"),
    ({"steps": 5, "schedule": "karras", "rho": "seven"}, "rho"),
    ({"steps": 5, "schedule": "karras", "sigma_min": float("nan")}, "sigma_min"),
    ({"steps": 5, "schedule": "leading", "steps_offset": -4}, "steps_offset"),
    ({"steps": 5, "schedule": "lcm", "original_steps": 0}, "original_steps"),
    ({"steps": 5, "last_sigma": [0.0]}, "last_sigma"),
    ({"timesteps": ["last", "first"]}, "numbers"),
    ({"timesteps": [None]}, "numbers"),
    ({"steps": 5, "s_churn": "much"}, "s_churn"),
]


@pytest.mark.parametrize(("arguments", "words"), IMPOSSIBLE)
def test_impossible_combinations_say_what_mends_them(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        compile_program("euler", noise=NOISE, **arguments)


def test_what_lays_out_no_steps_is_refused_by_name() -> None:
    """Where diffusers' own class fails, and where a strength means nothing."""
    for steps in (1, 2, 3):
        with pytest.raises(ArgumentError, match="expected at least 4"):
            program_from_diffusers({"_class_name": "PNDMScheduler"}, steps=steps)
    for taught in (0, -5, 1001):
        with pytest.raises(ArgumentError, match="original_inference_steps"):
            program_from_diffusers({"_class_name": "LCMScheduler", "original_inference_steps": taught}, steps=2)
    lcm, euler = {"_class_name": "LCMScheduler"}, {"_class_name": "EulerDiscreteScheduler"}
    for config, given in (
        (lcm, {"steps": 4, "strength": 0.05}),
        (lcm, {"steps": 4, "strength": 0.5, "start": 1}),
        (lcm, {"timesteps": [900, 10], "strength": 0.5}),
        (euler, {"steps": 4, "strength": 0.5}),
        *((lcm, {"steps": 4, "strength": bad}) for bad in (-0.1, 1.1, math.nan, "0.5", None, True)),
    ):
        with pytest.raises(ArgumentError, match="strength"):
            program_from_diffusers(config, **given)
    with pytest.raises(ArgumentError, match="strength"):
        compile_program("lcm", steps=4, noise=NOISE, strength=0.5)


def test_other_impossible_combinations() -> None:
    with pytest.raises(ArgumentError, match="from 0 to 1"):
        compile_program("ddim", steps=5, noise=NOISE, eta=1.5)
    with pytest.raises(ArgumentError, match="from 1 to 4"):
        compile_program("lms", steps=5, noise=NOISE, order=0)
    with pytest.raises(ArgumentError, match="sigma_data"):
        compile_program("edm_euler", steps=5, noise=NOISE, sigma_data=0)
    with pytest.raises(UnknownNameError, match="midpoint"):
        compile_program("dpmpp_2m", steps=5, noise=NOISE, solver_type="midpiont")
    with pytest.raises(UnknownNameError, match="bh1"):
        compile_program("unipc_2", steps=5, noise=NOISE, solver_type="heun")
    with pytest.raises(ArgumentError, match="lcm spacing"):
        compile_program("lcm", steps=51, noise=NOISE)
    with pytest.raises(ArgumentError, match="EDM"):
        compile_program("edm_euler", schedule="trailing", steps=5, noise=NOISE)
    with pytest.raises(ArgumentError, match="takes no explicit timesteps"):
        compile_program("lms", timesteps=[999, 500], noise=NOISE, compat="diffusers")
    with pytest.raises(ArgumentError, match="karras"):
        compile_program("euler", timesteps=[999, 500], noise=NOISE, compat="diffusers", use_karras_sigmas=True)
    with pytest.raises(UnsupportedError, match="compat=None"):
        compile_program("ddim", schedule="karras", steps=5, noise=NOISE, compat="diffusers")
    with pytest.raises(ArgumentError, match="start"):
        compile_program("plms", steps=5, start=5, noise=NOISE, compat="diffusers")
    program = compile_program("euler", steps=5, start=2, noise=NOISE)
    with pytest.raises(ArgumentError, match="latent"):
        program.run(lambda x, t: x, np.zeros(2), lambda: np.zeros(2))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": 99}', '{"format": 1, "sampler": "euler"}', "null", '{"format": 1, "a": "b"}'],
)
def test_text_that_is_no_program(text: str) -> None:
    with pytest.raises(CorruptError):
        Program.from_json(text)


@pytest.mark.parametrize(
    ("field", "value"),
    [("a", [1.0]), ("write", [0, 1, 2, 9, 0]), ("b", [[float("nan")] * 2] * 5), ("timesteps", []), ("c", [None] * 5)],
)
def test_damaged_programs_are_refused(field: str, value: Any) -> None:
    data = json.loads(compile_program("dpmpp_2m", steps=5, noise=NOISE).to_json())
    data[field] = value
    with pytest.raises(CorruptError):
        Program.from_json(json.dumps(data))


CLIPPED = {**NOISE.config, "_class_name": "HeunDiscreteScheduler", "clip_sample": True, "clip_sample_range": 2.0}


def test_a_program_that_clips_is_of_a_format_of_its_own() -> None:
    program = program_from_diffusers(CLIPPED, steps=4)
    assert program.clip is not None
    data = json.loads(program.to_json())
    assert (data["format"], data["clip"]["limit"]) == (2, 2.0)
    again = Program.from_json(program.to_json())
    assert again.clip is not None
    assert again.to_json() == program.to_json()
    plain = {k: v for k, v in data.items() if k != "clip"}
    with pytest.raises(CorruptError, match="format"):
        Program.from_json(json.dumps(plain))


@pytest.mark.parametrize(
    "clip", [{}, None, 3, {"limit": 0.0}, {"limit": 1.0, "h": [0.0], "x": [0.0]}, {"h": None}, {"limit": "x"}]
)
def test_damaged_clipping_is_refused(clip: Any) -> None:
    data = json.loads(program_from_diffusers(CLIPPED, steps=4).to_json())
    data["clip"] = {**data["clip"], **clip} if isinstance(clip, dict) and clip else clip
    with pytest.raises(CorruptError):
        Program.from_json(json.dumps(data))


THRESHOLDED = {
    **NOISE.config,
    "_class_name": "DDPMScheduler",
    "variance_type": "learned_range",
    "thresholding": True,
    "dynamic_thresholding_ratio": 0.95,
    "sample_max_value": 1.5,
}


def test_a_program_that_thresholds_or_is_spread_is_of_a_format_of_its_own() -> None:
    for config, clips, spreads in (
        (THRESHOLDED, True, True),
        ({**THRESHOLDED, "variance_type": "fixed_small"}, True, False),
        ({**THRESHOLDED, "thresholding": False, "clip_sample": False}, False, True),
    ):
        program = program_from_diffusers(config, steps=4)
        data = json.loads(program.to_json())
        assert (data["format"], "clip" in data, "spread" in data) == (3, clips, spreads)
        again = Program.from_json(program.to_json())
        assert again.to_json() == program.to_json()
        if clips:
            assert again.clip is not None
            assert (again.clip.bound.limit, again.clip.bound.ratio) == (1.5, 0.95)
        with pytest.raises(CorruptError, match="format"):
            Program.from_json(json.dumps({**data, "format": 2}))


@pytest.mark.parametrize("spread", [None, 3, [0.0], [0.0, 0.0, 0.0, float("inf")], [0.0, 0.0, 0.0, 1e3], ["x"] * 4])
def test_a_damaged_spread_is_refused(spread: Any) -> None:
    data = json.loads(program_from_diffusers(THRESHOLDED, steps=4).to_json())
    with pytest.raises(CorruptError):
        Program.from_json(json.dumps({**data, "spread": spread}))


@pytest.mark.parametrize("ratio", [-0.1, 1.5, "x", []])
def test_a_damaged_ratio_is_refused(ratio: Any) -> None:
    data = json.loads(program_from_diffusers(THRESHOLDED, steps=4).to_json())
    with pytest.raises(CorruptError):
        Program.from_json(json.dumps({**data, "clip": {**data["clip"], "ratio": ratio}}))


@pytest.mark.parametrize(
    ("key", "value"),
    [("dynamic_thresholding_ratio", v) for v in (-0.1, 1.5, True, "x", None)]
    + [("sample_max_value", v) for v in (0.0, -1.0, float("inf"), True, "x", None)]
    + [("thresholding", v) for v in ("yes", 1, None)],
)
def test_bounds_of_thresholding_that_are_none_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=key):
        program_from_diffusers({**THRESHOLDED, key: value}, steps=4)


def test_which_samplers_threshold() -> None:
    """Those whose class in diffusers does; the others are refused where a checkpoint or a caller says it."""
    noise = NoiseSchedule.from_diffusers(THRESHOLDED)
    for name, sampler in SAMPLERS.items():
        if admits_thresholding(sampler):
            program = compile_program(name, steps=5, noise=noise)
            assert program.clip is not None
            assert (program.clip.bound.ratio, program.spread is not None) == (0.95, name == "ddpm")
            assert compile_program(name, steps=5, noise=NOISE).clip is None
            assert compile_program(name, steps=5, noise=NOISE, thresholding=True).clip is not None
            continue
        for given, asked in ((noise, {}), (NOISE, {"thresholding": True})):
            with pytest.raises(UnsupportedError, match=rf"{name}.*thresholding.*one of ddim, ddpm"):
                compile_program(name, steps=5, noise=given, **asked)
        if name != "edm_euler":
            assert compile_program(name, steps=5, noise=noise, thresholding=False).clip is None
    assert sum(map(admits_thresholding, SAMPLERS.values())) == 21


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan"), float("inf"), True, "x", None])
def test_bounds_of_clipping_that_are_none_are_refused(limit: Any) -> None:
    with pytest.raises(ArgumentError, match="clip_sample_range"):
        program_from_diffusers({**CLIPPED, "clip_sample_range": limit}, steps=4)
