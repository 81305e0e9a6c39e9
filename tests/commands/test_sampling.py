"""Every option of every sampler and schedule, from the command line and over HTTP: a property over the registries."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commandline import call
from fewstep.cli import make_parser
from fewstep.commands.asking import call_options
from fewstep.commands.sampling import OPTIONS
from fewstep.errors import FewstepError
from fewstep.runtime.pictures.parameters import command_line
from fewstep.schedules import NoiseSchedule, Program, compile_program, program_from_diffusers
from fewstep.schedules.compat.classes import CLASSES, THRESHOLD, admits_thresholding
from fewstep.schedules.names import SAMPLER_ALIASES, SCHEDULE_ALIASES, resolve_sampler, resolve_schedule
from fewstep.schedules.solvers.registry import SAMPLERS
from fewstep.schedules.spacing import SPACINGS
from fewstep.serving.http.arguments import arguments
from fewstep.serving.http.calls import make_calls, parse_body
from fewstep.serving.http.errors import HttpError
from fewstep.serving.http.settings import Settings

NOISE = NoiseSchedule.scaled_linear()
VALUES: dict[str, Any] = {
    "eta": 0.6, "s_churn": 2.0, "s_tmin": 1.0, "s_tmax": 5.0, "s_noise": 0.9, "order": 2, "lower_order_final": False,
    "euler_at_final": True, "disable_corrector": [1], "large_variance": True, "timestep_scaling": 8.0,
    "last_sigma": "sigma_min", "sigma_min": 0.05, "sigma_max": 10.0, "sigma_data": 0.7, "rho": 4.0, "alpha": 0.5,
    "beta": 0.8, "steps_offset": 3, "original_steps": 40, "learned_variance": True, "thresholding": True,
    "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5,
    "shifted_timestep": 300, "first_timestep": 700.0, "first_sigma": 3.0,
}  # fmt: skip
WHERE: dict[str, dict[str, Any]] = {
    **{name: {"s_churn": 2.0} for name in ("s_noise", "s_tmin", "s_tmax")},
    **{name: {"thresholding": True} for name in THRESHOLD[1:]},
}
"""What an option needs beside it to show."""
CALLS = make_calls(Settings(model="student"), [(64, 64)])


def cases() -> list[tuple[str, str | None, str, Any]]:
    """(sampler, schedule, option, value) for every option that the registries state."""
    found: list[tuple[str, str | None, str, Any]] = []
    for sampler in SAMPLERS.values():
        for name, default in sampler.options.items():
            other = {"midpoint": "heun", "bh1": "bh2", "bh2": "bh1"}.get(str(default))
            found.append((sampler.name, None, name, other if name == "solver_type" else VALUES[name]))
        found.append((sampler.name, None, "last_sigma", VALUES["last_sigma"]))
        if admits_thresholding(sampler):
            found += [(sampler.name, None, name, VALUES[name]) for name in THRESHOLD]
    found += [("euler", s.name, name, VALUES[name]) for s in SPACINGS.values() for name in s.options]
    return [*found, ("edm_euler", None, "sigma_data", VALUES["sigma_data"])]


def compiled(sampler: str, schedule: str | None, options: dict[str, Any]) -> Program:
    return compile_program(sampler, schedule=schedule, steps=6, noise=NOISE, **options)


def same(a: Program, b: Program) -> bool:
    return json.dumps(a.to_json()) == json.dumps(b.to_json())


def shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


@pytest.mark.parametrize(("sampler", "schedule", "name", "value"), cases())
def test_every_option_is_reached(sampler: str, schedule: str | None, name: str, value: Any) -> None:
    asked = {**WHERE.get(name, {}), name: value}
    if sampler == "dpmpp_sde":
        asked.pop("s_churn", None)
    direct = compiled(sampler, schedule, asked)
    named = [f"--{k.replace('_', '-')}={shown(v)}" for k, v in asked.items()]
    others = [f"--option={k}={json.dumps(v)}" for k, v in asked.items()]
    for words in (named, others):
        parsed = make_parser("run").parse_args(["run", "student", "--prompt=x", *words])
        assert same(compiled(sampler, schedule, call_options(parsed)["options"]), direct)
    body = {"prompt": "x", "sampler": sampler, "sampler_options": asked}
    made = arguments(CALLS.generation_from(parse_body(json.dumps(body).encode())))
    assert same(compiled(sampler, schedule, made["options"]), direct)
    form = {"prompt": "x", "sampler": sampler, "sampler_options": json.dumps(asked)}
    assert arguments(CALLS.edit_from(form))["options"] == made["options"]
    if name not in ("disable_corrector", "lower_order_final", "solver_type", "euler_at_final"):
        assert not same(direct, compiled(sampler, schedule, WHERE.get(name, {}) if "s_churn" in asked else {}))


def test_the_command_line_names_what_there_is_and_no_more() -> None:
    assert {name for _, _, name, _ in cases()} == set(OPTIONS)


def test_keys_of_a_diffusers_scheduler(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(
        capsys, "schedule", "show", "dpmpp_2m", "--steps=5", "--compat=diffusers", "--option=use_karras_sigmas=true",
        "--option=final_sigmas_type=sigma_min", "--json",
    )  # fmt: skip
    expected = compile_program("dpmpp_2m", steps=5, noise=NOISE, compat="diffusers", use_karras_sigmas=True,
                               final_sigmas_type="sigma_min")  # fmt: skip
    assert code == 0
    rows = json.loads(out)["programs"][0]["rows"]
    np.testing.assert_allclose([r["sigma"] for r in rows], expected.sigmas[:-1])


def test_a_picture_made_with_options_tells_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--sampler=dpmpp_2m", "--schedule=karras", "--rho=5", "--solver-type=heun", "--lower-order-final=false"]
    first = [f"--output={tmp_path / 'a.png'}", "--steps=4", "--seed=3", "--json"]
    code, out, err = call(capsys, "run", "student", "--prompt=a red circle", *asked, "--last-sigma=0.02", *first)
    assert code == 0, err
    parameters = json.loads(out)["parameters"][0]
    assert parameters["options"] == {"rho": 5.0, "solver_type": "heun", "lower_order_final": False, "last_sigma": 0.02}
    words = shlex.split(command_line({**parameters, "bundle": "student"}, "b.png"))
    assert "--option=lower_order_final=false" in words
    parsed = make_parser("run").parse_args(["run", "student", "--prompt=x", *(w for w in words if "--option" in w)])
    assert call_options(parsed)["options"] == parameters["options"]


@pytest.mark.parametrize(
    "words",
    ["--lower-order-final=maybe", "--order=two", "--disable-corrector=a", "--option=rho", "--option=a b=1", "--rho=x"],
)
def test_values_that_do_not_parse(capsys: pytest.CaptureFixture[str], words: str) -> None:
    code, _, err = call(capsys, "schedule", "show", "euler", words)
    assert (code, words.partition("=")[0] in err) == (2, True)


@pytest.mark.parametrize(
    "given",
    [
        {"rho": 1e9}, {"rho": [0.5]}, {"rho": {"a": 1}}, {"a" * 65: 1}, {"rho": None}, {"x": "y" * 65}, [1], "rho", 5,
        {str(i): 1 for i in range(33)}, {"disable_corrector": [1] * 65}, {"rho": 10**400},
    ],
)  # fmt: skip
def test_options_that_no_service_takes(given: Any) -> None:
    with pytest.raises(HttpError) as caught:
        CALLS.generation_from(parse_body(json.dumps({"prompt": "x", "sampler_options": given}).encode()))
    assert caught.value.status == 400
    for text in (json.dumps(given), "{", "[" * 50_000):
        with pytest.raises(HttpError):
            CALLS.edit_from({"prompt": "x", "sampler_options": text})


def test_names_of_other_programs(capsys: pytest.CaptureFixture[str]) -> None:
    """ComfyUI's nodes, Flax's classes, diffusers' algorithms: each does what it says, or is refused by its name."""
    for alias, name in SAMPLER_ALIASES.items():
        assert resolve_sampler(alias).name == name
        assert same(compiled(alias, None, {}), compiled(name, None, {}))
    for alias, name in SCHEDULE_ALIASES.items():
        assert resolve_schedule(alias) == name
    for name in CLASSES:
        if name == "EDMDPMSolverMultistepScheduler":  # of a checkpoint alone
            with pytest.raises(FewstepError, match="checkpoint's own scheduler"):
                resolve_sampler(f"Flax{name}")
        else:
            assert resolve_sampler(f"Flax{name}") == resolve_sampler(name)
        config = {"_class_name": name, "clip_sample": False, "skip_prk_steps": True}
        pair = [program_from_diffusers({**config, "_class_name": n}, steps=4) for n in (name, f"Flax{name}")]
        assert same(*pair)
    for name in ("FlaxKarrasVeScheduler", "FlaxScoreSdeVeScheduler", "dpmsolver", "SamplerDPMAdaptative"):
        with pytest.raises(FewstepError, match="See: fewstep samplers"):
            resolve_sampler(name)
    for name in ("LaplaceScheduler", "VPScheduler", "BasicScheduler", "OptimalStepsScheduler"):
        with pytest.raises(FewstepError, match=name):
            resolve_schedule(name)
    code, out, _ = call(capsys, "samplers", "--json")
    data = json.loads(out)
    assert code == 0
    listed = {a for s in (*data["samplers"], *data["schedules"]) for a in s["aliases"]}
    assert {*SAMPLER_ALIASES, *SCHEDULE_ALIASES} <= listed
