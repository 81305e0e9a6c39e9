"""What the options of diffusers' schedulers mean: the sampler, and the arguments to run it with, class by class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...errors import UnknownNameError, UnsupportedError
from ..names import resolve_sampler
from ..solvers import euler
from ..solvers import multistep as multistep_solvers
from ..solvers.registry import Sampler, find_sampler

Config = Mapping[str, Any]
Solved = tuple[Sampler, dict[str, Any]]
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "learned_range")
LEARNED = ("learned", "learned_range")
"""Networks that say their variance too: samplers with one of their own take the mean alone."""


def plain(name: str) -> Sampler:
    return find_sampler(resolve_sampler(name).name)


def churned_late(name: str, config: Config, options: Config) -> Solved:
    """Euler's classes draw the churn's noise after the network, not before it."""
    return replace(plain(name), solve=euler.euler_churned_late), dict(options)


def pndm(name: str, config: Config, options: Config) -> Solved:
    if not config.get("skip_prk_steps", False):
        return replace(plain(name), solve=multistep_solvers.pndm), dict(options)
    return plain(name), {**options, "mix_raw": True}


def ddpm(name: str, config: Config, options: Config) -> Solved:
    kind = str(config.get("variance_type") or "fixed_small")
    if kind not in VARIANCES:
        raise UnsupportedError(f"variance_type {kind!r}", expected=f"one of {', '.join(VARIANCES)}")
    own = {"large_variance": kind == "fixed_large", "learned_variance": kind == "learned_range"}
    return plain(name), {**options, **own, "variance_floor": 1e-20}


def lcm(name: str, config: Config, options: Config) -> Solved:
    return plain(name), {**options, "timestep_scaling": float(config.get("timestep_scaling", 10.0))}


def lms(name: str, config: Config, options: Config) -> Solved:
    return plain(name), {**options, "restart": False}


def unipc(name: str, config: Config, options: Config) -> Solved:
    if not config.get("predict_x0", True):
        raise UnsupportedError("predict_x0=False", expected="True")
    kind = config.get("solver_type", "bh2")
    kind = "bh2" if kind in ("midpoint", "heun", "logrho") else kind
    if kind not in ("bh1", "bh2"):
        raise UnknownNameError("solver_type", kind, ("bh1", "bh2"))
    return _ordered("unipc", config), {
        "solver_type": kind,
        "lower_order_final": bool(config.get("lower_order_final", True)),
        "disable_corrector": tuple(config.get("disable_corrector") or ()),
    }


def deis(name: str, config: Config, options: Config) -> Solved:
    return _ordered("deis", config), {"lower_order_final": bool(config.get("lower_order_final", True))}


def multistep(name: str, config: Config, options: Config) -> Solved:
    sampler, arguments = _dpm("m", config, lower_order_final=True)
    return sampler, {**arguments, "euler_at_final": bool(config.get("euler_at_final", False))}


def singlestep(name: str, config: Config, options: Config) -> Solved:
    return _dpm("s", config, lower_order_final=False)


def _dpm(form: str, config: Config, *, lower_order_final: bool) -> Solved:
    algorithm = config.get("algorithm_type", "dpmsolver++")
    algorithm = "dpmsolver++" if algorithm == "deis" else algorithm
    if algorithm not in ("dpmsolver++", "sde-dpmsolver++"):
        raise UnsupportedError(f"algorithm_type {algorithm!r}", expected="'dpmsolver++' or 'sde-dpmsolver++'")
    if config.get("variance_type") not in (None, *LEARNED):
        raise UnsupportedError(f"variance_type {config['variance_type']!r}", expected=f"none, {' or '.join(LEARNED)}")
    solver_type = config.get("solver_type", "midpoint")
    if solver_type in ("logrho", "bh1", "bh2"):
        solver_type = "midpoint"
    sampler = _ordered("dpmpp", config, form + ("_sde" if algorithm.startswith("sde") else ""))
    if solver_type not in ("midpoint", "heun"):
        raise UnknownNameError("solver_type", solver_type, ("midpoint", "heun"))
    lower_order_final = bool(config.get("lower_order_final", lower_order_final))
    return sampler, {"solver_type": solver_type, "lower_order_final": lower_order_final, "published": True}


def _ordered(family: str, config: Config, ending: str = "") -> Sampler:
    order = int(config.get("solver_order", 2))
    if order not in (1, 2, 3):
        raise UnsupportedError(f"solver_order {order}", expected="1, 2 or 3")
    return find_sampler(f"{family}_{order}{ending}")


def edm_multistep(name: str, config: Config, options: Config) -> Solved:
    """The multistep form on an EDM network's axis, where latents are x0 + sigma noise."""
    sampler, arguments = multistep(name, config, options)
    if sampler.presets["sde"] and sampler.presets["order"] == 3:
        raise UnsupportedError(
            f"{name} of solver_order 3 with algorithm_type 'sde-dpmsolver++', which diffusers fails at",
            remedy="Set solver_order to 2.",
        )
    return replace(sampler, latent_space="ve"), arguments
