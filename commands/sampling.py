"""The options of samplers and of schedules, each by a name of its own; `--option NAME=VALUE` gives any other."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from ..errors import CorruptError
from ..values import parse_json


def switch(text: str) -> bool:
    """`true` or `false`, in any case."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def integers(text: str) -> list[int]:
    """`0,1` as a list of whole numbers."""
    try:
        return [int(v) for v in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of step numbers, like 0,1") from error


def sigma(text: str) -> float | str:
    """A number, or a word for one."""
    try:
        return float(text)
    except ValueError:
        return text


def option(text: str) -> tuple[str, Any]:
    """`NAME=VALUE`; what is no JSON is a text."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE, like rho=5")
    try:
        return name, parse_json(value, name)
    except CorruptError:
        return name, value


OPTIONS: dict[str, tuple[Callable[[str], Any], str, str]] = {
    "eta": (float, "N", "stochasticity of samplers that have one (DDIM, TCD)"),
    "s_churn": (float, "N", "noise that Euler adds before each evaluation, over all steps"),
    "s_tmin": (float, "S", "sigma above which churn is added"),
    "s_tmax": (float, "S", "sigma below which churn is added"),
    "s_noise": (float, "N", "factor of the noise that is added"),
    "order": (int, "N", "history of LMS, 1 to 4"),
    "solver_type": (str, "NAME", "midpoint or heun (DPM++), bh1 or bh2 (UniPC)"),
    "lower_order_final": (switch, "BOOL", "whether the last steps of few are of lower order"),
    "euler_at_final": (switch, "BOOL", "whether the last step is of order 1"),
    "disable_corrector": (integers, "I,I,...", "steps that UniPC does not correct"),
    "large_variance": (switch, "BOOL", "DDPM with beta as its variance"),
    "learned_variance": (switch, "BOOL", "DDPM with the variance that the network says"),
    "thresholding": (switch, "BOOL", "whether x0 is thresholded by a quantile of each image"),
    "dynamic_thresholding_ratio": (float, "Q", "the quantile, 0 to 1"),
    "sample_max_value": (float, "N", "the most that it may be"),
    "timestep_scaling": (float, "N", "of LCM's boundary condition"),
    "shifted_timestep": (int, "N", "what LCM's network is told for the greatest timestep, as NitroFusion's"),
    "first_timestep": (float, "T", "where sampling begins, the steps being spread from there"),
    "first_sigma": (float, "S", "the same by its sigma"),
    "last_sigma": (sigma, "S", "where sampling ends: zero, sigma_min, own (of a table or list), or a number"),
    "sigma_min": (float, "S", "least sigma of schedules that space sigmas"),
    "sigma_max": (float, "S", "greatest sigma of schedules that space sigmas"),
    "sigma_data": (float, "S", "deviation of the data that an EDM network was trained on"),
    "rho": (float, "N", "exponent of karras and lu"),
    "alpha": (float, "N", "of the beta schedule"),
    "beta": (float, "N", "of the beta schedule"),
    "steps_offset": (int, "N", "shift of leading timesteps"),
    "original_steps": (int, "N", "steps that a consistency model was distilled at"),
}


def add_sampler_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("options of samplers and schedules (whose: fewstep samplers --json)")
    for name, (kind, shown, words) in OPTIONS.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=shown, help=words)
    group.add_argument(
        "--option",
        type=option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any of these, or in diffusers' conventions a key of the scheduler's configuration; repeatable",
    )


def sampler_options(options: argparse.Namespace) -> dict[str, Any]:
    """Those that were given."""
    named = {k: v for k in OPTIONS if (v := getattr(options, k, None)) is not None}
    return named | dict(options.option)
