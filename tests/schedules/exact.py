"""Both sides of a parity case in 40 decimal digits: diffusers' scheduler code, and our rows.

Where float64 too is lost to cancellation, this tells whose rounding it is. The levels are taken as both sides hold
them in float64; from there on nothing is rounded. diffusers' classes run as they are, on NumPy arrays of mpmath numbers
in place of tensors; our samplers run as they are on an ordinary tape, and their rows without being laid out in float64.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mpmath
import numpy as np
import torch
from cases import Case
from fewstep.errors import FewstepError
from fewstep.schedules import levels
from fewstep.schedules.algebra import Recorded, Symbol, Tape
from fewstep.schedules.compat import classes as compat
from fewstep.schedules.levels import Level, Path, Preconditioning
from fewstep.schedules.solvers import dpmpp, euler, multistep
from fewstep.schedules.solvers.registry import Sampler
from sides import network, prepared, scheduler_module

DIGITS = 40
LEVELS_LIMIT = 1e-13
REAL = mpmath.MPContext()
REAL.dps = DIGITS
FUNCTIONS = ("log", "exp", "sqrt", "expm1", "sin", "tanh")


def give_method(name: str) -> None:
    """Add a function to the numbers as a method, which NumPy calls on each element of an array of objects."""
    function = getattr(REAL, name)
    setattr(REAL.mpf, name, lambda self: function(self))


for _name in FUNCTIONS:
    give_method(_name)


class Exact(np.ndarray):
    """An array of mpmath numbers with the few methods of a tensor that the schedulers call."""

    device = torch.device("cpu")

    def to(self, *_: Any, **__: Any) -> Exact:
        return self

    def unsqueeze(self, axis: int) -> Exact:
        return np.expand_dims(self, axis).view(Exact)


def exact(values: Any) -> Exact:
    """The values, as they are in float64."""
    array = np.asarray(values, np.float64)
    result = np.empty(array.shape, object)
    result.ravel()[:] = [REAL.mpf(float(value)) for value in array.ravel()]
    return result.view(Exact)


def distance(a: np.ndarray, b: np.ndarray, scale: float) -> float:
    """The largest difference over `scale`."""
    a, b = (array if array.dtype == object else exact(array) for array in (a, b))
    return float(max(abs(d) for d in (a - b).ravel())) / scale


class Functions:
    """A module (torch or math) whose elementary functions take mpmath numbers too."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        if name not in FUNCTIONS:
            return getattr(self._module, name)

        def function(x: Any) -> Any:
            if isinstance(x, REAL.mpf):
                return getattr(REAL, name)(x)
            return getattr(np if isinstance(x, np.ndarray) else self._module, name)(x)

        return function


def with_diffusers(case: Case, gaussian: np.ndarray, latent: np.ndarray, draws: Sequence[np.ndarray]) -> Exact:
    """What diffusers' own code gives."""
    source = iter(draws)
    with scheduler_module(case.config["_class_name"], source, double=True) as module, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = prepared(case, module, double=True)
        scheduler.sigmas = exact(scheduler.sigmas.numpy())
        module.torch = Functions(module.torch)
        if hasattr(module, "randn_tensor"):
            module.randn_tensor = lambda *_, **__: exact(next(source))
        timesteps = scheduler.timesteps[case.start * scheduler.order :]
        scheduler.set_begin_index(case.start * scheduler.order)
        x = exact(gaussian) * scheduler.init_noise_sigma
        if case.start:
            x = scheduler.add_noise(exact(latent), exact(gaussian), timesteps[:1].repeat(len(gaussian)))
        for t in timesteps:
            out = network(scheduler.scale_model_input(x, t), float(t))
            x = scheduler.step(out, t, x, return_dict=False, **case.step)[0]
    return x


def sigmas_of(case: Case) -> np.ndarray:
    """The levels of diffusers' scheduler in float64, the last one included."""
    with scheduler_module(case.config["_class_name"], iter(()), double=True) as module, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.array(prepared(case, module, double=True).sigmas)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactRows:
    """Recorded rows whose coefficients are mpmath numbers, and the factors of latent and Gaussian at their start."""

    rows: Sequence[Recorded]
    init: tuple[Any, Any]

    def run(self, gaussian: Exact, latent: Exact, draws: Iterator[Exact]) -> Exact:
        x = self.init[0] * latent + self.init[1] * gaussian
        known: dict[Symbol, Exact] = {}
        for i, row in enumerate(self.rows):
            known[Symbol("state", i)] = x
            known[Symbol("history", i)] = row.h_x * x + row.h_out * network(x, row.level.t)
            if row.draws:
                known[Symbol("noise", i)] = next(draws)
            x = sum((c * known[symbol] for symbol, c in row.after.terms.items()), start=0 * x)
        return x


def lifted(path: Path, sigmas: np.ndarray) -> Path:
    """The path on diffusers' own float64 sigmas, which ours have to be but for their last digits."""

    def lift(level: Level, sigma: float) -> Level:
        if abs(level.sigma - sigma) > LEVELS_LIMIT * sigma:
            raise FewstepError(f"level {level.sigma} in float64, where diffusers has {sigma}")
        return replace(level, sigma=REAL.mpf(float(sigma)))

    own = sigmas[path.skipped :]
    pairs = [(lift(h, own[i]), lift(t, own[i + 1])) for i, (h, t) in enumerate(path.pairs)]
    return replace(path, pairs=pairs, before=[lift(level, sigmas[i]) for i, level in enumerate(path.before)])


def assemble_exactly(
    sampler: Sampler,
    path: Path,
    sigmas: np.ndarray,
    prediction: str,
    init: tuple[float, float],
    options: Mapping[str, Any],
) -> ExactRows:
    """What `schedules.assemble.assemble` does, up to the recorded rows and without rounding them."""
    path = lifted(path, sigmas)
    tape = Tape(Preconditioning(prediction=prediction), space=sampler.space)
    result = sampler.solve(tape, path, tape.start(path.first), **{**sampler.presets, **options})
    if sampler.space == "ve" and sampler.latent_space == "vp":
        result = path.last.alpha * result
    first = path.first
    return ExactRows(rows=tape.finish(result), init=(first.scale, first.noise_scale) if path.skipped else init)


@contextlib.contextmanager
def exact_compiler(sigmas: np.ndarray) -> Iterator[None]:
    """Let programs be compiled on `sigmas` with mpmath's functions for math's, and not laid out in float64."""

    def assemble(sampler: Sampler, path: Path, *, prediction: str, init: Any, options: Any, **_: Any) -> ExactRows:
        return assemble_exactly(sampler, path, sigmas, prediction, init, options)

    saved = compat.assemble
    users = (levels, euler, dpmpp, multistep)
    compat.assemble = assemble  # type: ignore[assignment]
    for user in users:
        user.math = Functions(math)  # type: ignore[assignment]
    try:
        yield
    finally:
        compat.assemble = saved
        for user in users:
            user.math = math


def with_rows(case: Case, gaussian: np.ndarray, latent: np.ndarray, draws: Sequence[np.ndarray]) -> Exact:
    """What our rows give, compiled and run without rounding."""
    with exact_compiler(sigmas_of(case)):
        rows: Any = compat.program_from_diffusers(
            case.config,
            steps=case.steps,
            timesteps=case.timesteps,
            sigmas=case.sigmas,
            start=case.start,
            single=False,
            **case.step,
        )
        result: Exact = rows.run(exact(gaussian), exact(latent), (exact(noise) for noise in draws))
        return result
