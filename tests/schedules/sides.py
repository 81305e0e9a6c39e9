"""Both sides of a parity case, in float32 or float64: diffusers' scheduler as its pipelines drive it, and our rows."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import warnings
from collections.abc import Iterator
from typing import Any

import diffusers
import numpy as np
import torch
from cases import Case
from fewstep.schedules import program_from_diffusers

diffusers.utils.logging.set_verbosity_error()


class Doubled:
    """A module in which float32 means float64."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.float32 = module.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@contextlib.contextmanager
def scheduler_module(name: str, draws: Iterator[np.ndarray], *, double: bool) -> Iterator[Any]:
    """The diffusers module of a class, drawing from `draws`; computing in float64 if `double`."""
    module = importlib.import_module(getattr(diffusers, name).__module__)
    saved = {key: getattr(module, key) for key in ("torch", "np", "randn_tensor") if hasattr(module, key)}
    dtype = torch.float64 if double else torch.float32
    if "randn_tensor" in saved:
        module.randn_tensor = lambda *_, **__: torch.from_numpy(next(draws)).to(dtype)  # type: ignore[attr-defined]
    if double:
        module.torch, module.np = Doubled(torch), Doubled(np)  # type: ignore[attr-defined]
        torch.set_default_dtype(torch.float64)
    try:
        yield module
    finally:
        torch.set_default_dtype(torch.float32)
        for key, value in saved.items():
            setattr(module, key, value)


class BrownianIncrements:
    """DPMSolverSDE's noise sampler over given unit increments: one to the middle of a step, one on from there."""

    def __init__(self, draws: Iterator[np.ndarray], dtype: torch.dtype) -> None:
        self.draws, self.dtype = draws, dtype
        self.first: tuple[float, float, torch.Tensor] | None = None

    def __call__(self, sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
        fresh = torch.from_numpy(next(self.draws)).to(self.dtype)
        here, there = float(sigma), float(sigma_next)
        if self.first is None:
            self.first = (here, there, fresh)
            return fresh
        top, middle, before = self.first
        self.first = None
        return ((top - middle) ** 0.5 * before + (middle - there) ** 0.5 * fresh) / (top - there) ** 0.5


def network(x: np.ndarray, t: float) -> np.ndarray:
    """A smooth non-linear stand-in for the network, elementwise, in the float type of x."""
    one = x.dtype.type
    return np.tanh(one(0.9) * x + one(t / 1500)) * one(0.8) + one(0.15) * np.sin(one(2.0) * x)


def variance(x: np.ndarray, t: float) -> np.ndarray:
    """What the stand-in says of its variance, mostly from -1 to 1."""
    one = x.dtype.type
    return np.sin(one(3.0) * x + one(t / 300)) * one(1.1)


@functools.lru_cache(maxsize=8)
def made(cls: Any, config: str, double: bool) -> Any:
    """A scheduler; the latest few are kept, since some take a tenth of a second to make."""
    return cls.from_config(json.loads(config))


def prepared(case: Case, module: Any, *, double: bool) -> Any:
    """The scheduler of a case with its timesteps set; `module` is the one of its class."""
    name = case.config["_class_name"]
    config = {k: v for k, v in case.config.items() if k != "_class_name"}
    scheduler = made(getattr(module, name), json.dumps(config, sort_keys=True), double)
    given = {"timesteps": case.timesteps and list(case.timesteps), "sigmas": case.sigmas and list(case.sigmas)}
    given["num_inference_steps"] = case.steps
    if name == "DPMSolverSinglestepScheduler":
        scheduler.register_to_config(lower_order_final=config.get("lower_order_final", False))
    scheduler.set_timesteps(**{key: value for key, value in given.items() if value is not None})
    return scheduler


def with_diffusers(case: Case, gaussian: np.ndarray, latent: np.ndarray, draws: list[np.ndarray]) -> np.ndarray:
    """What a pipeline does with this scheduler, in gaussian's float type.

    The begin index is set even from the start, as the img2img pipelines do: without it diffusers looks the first
    timestep up and, where rounding has made two of it, begins at the second and runs out of levels.
    """
    double = gaussian.dtype == np.float64
    dtype = torch.float64 if double else torch.float32
    source = iter(draws)
    with scheduler_module(case.config["_class_name"], source, double=double) as module, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = prepared(case, module, double=double)
        if case.config["_class_name"] == "DPMSolverSDEScheduler":
            scheduler.noise_sampler = BrownianIncrements(source, dtype)
        order = getattr(scheduler, "order", 1)
        timesteps = scheduler.timesteps[case.start * order :]
        noise = torch.from_numpy(gaussian)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(case.start * order)
        if case.start:
            x = scheduler.add_noise(torch.from_numpy(latent), noise, timesteps[:1].repeat(len(noise)))
        else:
            x = noise * scheduler.init_noise_sigma
        for t in timesteps:
            scaled = scheduler.scale_model_input(x, t)
            given = scaled.to(dtype).numpy()
            out = torch.from_numpy(network(given, float(t)))
            if case.config.get("variance_type") == "learned_range":
                out = torch.cat([out, torch.from_numpy(variance(given, float(t)))], 1)
            x = scheduler.step(out, t, x.to(dtype), return_dict=False, **case.step)[0]
    return np.asarray(x.to(dtype).numpy())


def with_program(case: Case, gaussian: np.ndarray, latent: np.ndarray, draws: list[np.ndarray]) -> np.ndarray:
    program = program_from_diffusers(
        case.config,
        steps=case.steps,
        timesteps=case.timesteps,
        sigmas=case.sigmas,
        start=case.start,
        single=gaussian.dtype == np.float32,
        **case.step,
    )
    images = [slice(i, i + 1) for i in range(len(gaussian))] if program.clip is not None else [slice(None)]
    made = []
    for image in images:
        source = (noise[image].astype(gaussian.dtype) for noise in draws)
        network_of = network if program.spread is None else lambda x, t: (network(x, t), variance(x, t))
        made.append(program.run(network_of, gaussian[image], lambda s=source: next(s), latent[image]))  # type: ignore[misc]
    return np.concatenate(made)
