"""Every sampler against diffusers, on a small non-linear network: prints the worst relative error of each.

    python tests/schedules/parity.py                  all configurations (minutes)
    python tests/schedules/parity.py --sample 300     a seeded sample
    python tests/schedules/parity.py --only unipc     samplers whose label holds the word

Each configuration runs diffusers' scheduler the way its pipelines do, in float32, against the compiled program in
float32. Where that differs by more than 1e-5, both are computed again in float64 (diffusers with every float32 of its
module replaced): what remains then is a difference of method, what has gone was diffusers' rounding. In float64 the
limit is 1e-12; a case above it passes only if its error fell by the ratio of both types' precision, which shows that
float64 too is lost to cancellation in diffusers' formulas. Such cases are counted in a column of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import itertools
import json
import random
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import torch
from fewstep.errors import FewstepError
from fewstep.schedules import program_from_diffusers

diffusers.utils.logging.set_verbosity_error()

FLOAT32_LIMIT, FLOAT64_LIMIT = 1e-5, 1e-12
ROUNDING_RATIO = 1e-7
"""A float64 error that is this much smaller than the float32 one is rounding (the precisions' ratio is 2e-9)."""

SHAPE = (2, 3, 4, 5)

SD = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SPACINGS = [{"timestep_spacing": s, "steps_offset": o} for s, o in (("leading", 1), ("linspace", 0), ("trailing", 0))]
RESPACINGS: list[dict[str, Any]] = [
    {}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}
]
LU: list[dict[str, Any]] = [{"use_lu_lambdas": True}]
ALL, TWO = ("epsilon", "v_prediction", "sample"), ("epsilon", "v_prediction")
LASTS = [{"final_sigmas_type": "zero"}, {"final_sigmas_type": "sigma_min"}]
NOISES: list[dict[str, Any]] = [{}, {"beta_schedule": "linear"}]
COSINE = {"beta_schedule": "squaredcos_cap_v2"}


@dataclass(frozen=True)
class Case:
    """One configuration: a label for the sampler, a scheduler config, counts, and arguments of `step`."""

    label: str
    config: dict[str, Any]
    steps: int | None = None
    start: int = 0
    step: dict[str, Any] = field(default_factory=dict)
    timesteps: tuple[int, ...] | None = None
    sigmas: tuple[float, ...] | None = None

    def __str__(self) -> str:
        extra = {k: v for k, v in self.config.items() if k not in SD or v != SD[k]}
        return f"{self.label} {json.dumps(extra)} steps={self.steps} start={self.start} {self.step}"


Choice = list[dict[str, Any]]


@dataclass(frozen=True)
class Family:
    """One sampler's configurations: every prediction with every combination of `every`, and of each of `varied` one
    at random."""

    label: str
    config: dict[str, Any]
    predictions: tuple[str, ...] = ALL
    every: tuple[Choice, ...] = (SPACINGS, RESPACINGS)
    varied: tuple[Choice, ...] = ()
    step: dict[str, Any] = field(default_factory=dict)


def families() -> Iterator[Family]:
    euler = {"_class_name": "EulerDiscreteScheduler"}
    churn = {"s_churn": 3.0, "s_tmin": 0.1, "s_tmax": 10.0, "s_noise": 1.01}
    zero_snr = {"rescale_betas_zero_snr": True}
    yield Family("euler", euler, varied=(LASTS, NOISES))
    yield Family("euler s_churn", euler, varied=(LASTS,), step=churn)
    yield Family("euler zero-snr", {**euler, **zero_snr}, ("v_prediction",))
    yield Family("euler log-linear", {**euler, "interpolation_type": "log_linear"}, TWO, (SPACINGS,))
    ancestral = {"_class_name": "EulerAncestralDiscreteScheduler"}
    yield Family("euler_ancestral", ancestral, TWO, (SPACINGS,), (NOISES,))
    yield Family("heun", {"_class_name": "HeunDiscreteScheduler"})
    yield Family("kdpm2", {"_class_name": "KDPM2DiscreteScheduler"}, TWO)
    yield Family("kdpm2_ancestral", {"_class_name": "KDPM2AncestralDiscreteScheduler"}, TWO)
    yield Family("lms", {"_class_name": "LMSDiscreteScheduler"})
    yield Family("lms order 2", {"_class_name": "LMSDiscreteScheduler"}, TWO, step={"order": 2})
    yield Family("dpmpp_sde", {"_class_name": "DPMSolverSDEScheduler"}, TWO, step={"s_noise": 1.02})
    ddim = {"_class_name": "DDIMScheduler", "clip_sample": False}
    ends = [{"set_alpha_to_one": True}, {"set_alpha_to_one": False}]
    yield Family("ddim", ddim, every=(SPACINGS, ends), varied=(NOISES,))
    yield Family("ddim eta", ddim, every=(SPACINGS, ends), step={"eta": 0.7})
    yield Family("ddim zero-snr", {**ddim, **zero_snr}, ("v_prediction",), (SPACINGS, ends))
    variances = [{"variance_type": v} for v in ("fixed_small", "fixed_small_log", "fixed_large")]
    yield Family("ddpm", {"_class_name": "DDPMScheduler", "clip_sample": False}, every=(SPACINGS, variances))
    yield Family("plms", {"_class_name": "PNDMScheduler", "skip_prk_steps": True}, TWO, (SPACINGS, ends))
    yield from multistep_families()
    yield from cosine_families()
    multi = {"_class_name": "DPMSolverMultistepScheduler"}
    yield Family("dpmpp_2m zero-snr", {**multi, **zero_snr}, ("v_prediction",))
    unipc = {"_class_name": "UniPCMultistepScheduler"}
    yield Family("unipc_2 zero-snr", {**unipc, **zero_snr}, ("v_prediction",))
    original = [{}, {"original_inference_steps": 100}]
    yield Family("lcm", {"_class_name": "LCMScheduler"}, every=(original,))
    for eta in (0.0, 0.3, 1.0):
        yield Family(f"tcd eta {eta}", {"_class_name": "TCDScheduler"}, every=(original,), step={"eta": eta})
    edm = {"_class_name": "EDMEulerScheduler"}
    ramps = [{"sigma_schedule": "karras"}, {"sigma_schedule": "exponential"}]
    yield Family("edm_euler", edm, TWO, (ramps, LASTS))
    yield Family("edm_euler s_churn", edm, TWO, (ramps, LASTS), step=churn)


def multistep_families() -> Iterator[Family]:
    types = [{"solver_type": "midpoint"}, {"solver_type": "heun"}]
    tails = [{"lower_order_final": True}, {"lower_order_final": False}]
    forms = [{"solver_type": "bh1"}, {"solver_type": "bh2"}, {"solver_type": "bh2", "disable_corrector": [0, 2]}]
    multi, single = ({"_class_name": f"DPMSolver{kind}Scheduler"} for kind in ("Multistep", "Singlestep"))
    for order in (1, 2, 3):
        for suffix, algorithm in (("", "dpmsolver++"), ("_sde", "sde-dpmsolver++")):
            kind = {"solver_order": order, "algorithm_type": algorithm}
            ends = [*tails, {"euler_at_final": True}]
            every = (SPACINGS, [*RESPACINGS, *LU])
            yield Family(f"dpmpp_{order}m{suffix}", {**multi, **kind}, every=every, varied=(types, LASTS, ends, NOISES))
            every = (RESPACINGS, types)
            yield Family(f"dpmpp_{order}s{suffix}", {**single, **kind}, every=every, varied=(LASTS, tails, NOISES))
        deis = {"_class_name": "DEISMultistepScheduler", "solver_order": order}
        yield Family(f"deis_{order}", deis, varied=(tails, NOISES))
        unipc = {"_class_name": "UniPCMultistepScheduler", "solver_order": order}
        yield Family(f"unipc_{order}", unipc, varied=(forms, LASTS, tails, NOISES))


def cosine_families() -> Iterator[Family]:
    """The squared-cosine schedule, whose sigma goes up to 20000: what float32 and float64 lose grows with it."""
    for label, name in (("euler", "EulerDiscrete"), ("dpmpp_2m", "DPMSolverMultistep"), ("deis_2", "DEISMultistep"),
                        ("dpmpp_2s", "DPMSolverSinglestep"), ("unipc_2", "UniPCMultistep")):
        yield Family(f"{label} cosine", {"_class_name": f"{name}Scheduler", **COSINE})
    yield Family("ddim cosine", {"_class_name": "DDIMScheduler", "clip_sample": False, **COSINE}, every=(SPACINGS,))


def explicit_cases() -> Iterator[Case]:
    """Explicit timesteps and sigmas, for the classes that take them."""
    lists = ((999, 850, 736, 645, 545, 455, 343, 233, 124, 24), (999, 845, 730, 587, 443, 310, 193, 116, 53, 13, 0))
    for name in ("EulerDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler", "DDPMScheduler",
                 "DPMSolverSinglestepScheduler", "LCMScheduler", "TCDScheduler"):
        for prediction, timesteps, start in itertools.product(TWO, lists, (0, 3)):
            config = {**SD, "_class_name": name, "prediction_type": prediction, "clip_sample": False}
            yield Case(f"{name} timesteps", config, timesteps=timesteps, start=start)
    config = {**SD, "_class_name": "EulerDiscreteScheduler"}
    yield Case("euler sigmas", config, sigmas=(14.6146, 6.4746, 2.6946, 0.9643, 0.1515, 0.0))
    yield Case("euler sigmas", config, sigmas=(14.6146, 6.4746, 2.6946, 0.9643, 0.1515, 0.0292), start=2)


def build(family: Family, prediction: str, choices: Iterable[dict[str, Any]], steps: int, start: int) -> Case:
    config = {**SD, **family.config, "prediction_type": prediction}
    for choice in choices:
        config.update(choice)
    return Case(family.label, config, steps=steps, start=start, step=family.step)


def cases(seed: int = 0) -> Iterator[Case]:
    """Every sampler x prediction x spacing x respacing x steps 1..30, whole and from a start on."""
    rng = random.Random(seed)
    for family in families():
        for prediction, *chosen in itertools.product(family.predictions, *family.every):
            for steps in range(1, 31):
                for start in {0, rng.randrange(steps)}:
                    varied = [rng.choice(choice) for choice in family.varied]
                    yield build(family, prediction, [*chosen, *varied], steps, start)
    yield from explicit_cases()


def sampled(per_family: int, seed: int = 0) -> list[Case]:
    """A seeded sample: `per_family` cases of each sampler, and a tenth of those with explicit levels."""
    rng = random.Random(seed)
    chosen = []
    for family in families():
        for _ in range(per_family):
            steps = rng.randint(1, 30)
            start = rng.choice([0, 0, rng.randrange(steps)])
            choices = [rng.choice(choice) for choice in (*family.every, *family.varied)]
            chosen.append(build(family, rng.choice(family.predictions), choices, steps, start))
    explicit = list(explicit_cases())
    return [*chosen, *rng.sample(explicit, max(1, len(explicit) // 10))]


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


@functools.lru_cache(maxsize=8)
def made(cls: Any, config: str, double: bool) -> Any:
    """A scheduler; the latest few are kept, since some take a tenth of a second to make."""
    return cls.from_config(json.loads(config))


def with_diffusers(case: Case, gaussian: np.ndarray, latent: np.ndarray, draws: list[np.ndarray]) -> np.ndarray:
    """What a pipeline does with this scheduler, in gaussian's float type.

    The begin index is set even from the start, as the img2img pipelines do: without it diffusers looks the first
    timestep up and, where rounding has made two of it, begins at the second and runs out of levels.
    """
    double = gaussian.dtype == np.float64
    dtype = torch.float64 if double else torch.float32
    config = {k: v for k, v in case.config.items() if k != "_class_name"}
    source = iter(draws)
    with scheduler_module(case.config["_class_name"], source, double=double) as module, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = made(getattr(module, case.config["_class_name"]), json.dumps(config, sort_keys=True), double)
        given = {"timesteps": case.timesteps and list(case.timesteps), "sigmas": case.sigmas and list(case.sigmas)}
        given["num_inference_steps"] = case.steps
        if case.config["_class_name"] == "DPMSolverSinglestepScheduler":
            scheduler.register_to_config(lower_order_final=config.get("lower_order_final", False))
        scheduler.set_timesteps(**{key: value for key, value in given.items() if value is not None})
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
            out = torch.from_numpy(network(scaled.to(dtype).numpy(), float(t)))
            x = scheduler.step(out, t, x.to(dtype), return_dict=False, **case.step)[0]
    return np.asarray(x.to(dtype).numpy())


def with_program(case: Case, gaussian: np.ndarray, latent: np.ndarray, draws: list[np.ndarray]) -> np.ndarray:
    program = program_from_diffusers(
        case.config, steps=case.steps, timesteps=case.timesteps, sigmas=case.sigmas, start=case.start,
        single=gaussian.dtype == np.float32, **case.step,
    )
    source = (noise.astype(gaussian.dtype) for noise in draws)
    return program.run(network, gaussian, lambda: next(source), latent)


def relative_error(case: Case, dtype: Any) -> float:
    """The largest difference over the largest value.

    NaN where diffusers fails or gives what is not finite, infinity where the program does.
    """
    rng = np.random.default_rng(7)
    gaussian, latent = (rng.standard_normal(SHAPE) for _ in range(2))
    draws = [rng.standard_normal(SHAPE) for _ in range(2 * (case.steps or 20) + 2)]
    ours = with_program(case, gaussian.astype(dtype), latent.astype(dtype), draws)
    if not np.isfinite(ours).all():
        return float("inf")
    try:
        reference = with_diffusers(case, gaussian.astype(dtype), latent.astype(dtype), draws)
    except (AssertionError, IndexError, ValueError, RuntimeError):
        return float("nan")
    if not np.isfinite(reference).all():
        return float("nan")
    return float(np.abs(ours - reference).max() / np.abs(reference).max())


@dataclass
class Worst:
    """The worst of one sampler: in float32, and in float64 over the cases where float32 was not enough."""

    cases: int = 0
    single: float = 0.0
    beyond: int = 0
    double: float = 0.0
    lost: int = 0
    wrong: int = 0
    not_finite: int = 0
    at: str = ""


def measure(chosen: Iterator[Case] | list[Case], progress: bool = False) -> dict[str, Worst]:
    """The worst relative error of each label over the cases."""
    table: dict[str, Worst] = {}
    for count, case in enumerate(chosen):
        worst = table.setdefault(case.label, Worst())
        worst.cases += 1
        try:
            error = relative_error(case, np.float32)
        except FewstepError:
            raise RuntimeError(f"refused: {case}") from None
        if np.isnan(error):
            worst.not_finite += 1
        elif error <= FLOAT32_LIMIT:
            worst.single = max(worst.single, error)
        else:
            worst.beyond += 1
            exact = relative_error(case, np.float64)
            if exact > FLOAT64_LIMIT:
                worst.lost += 1
                worst.wrong += not exact <= ROUNDING_RATIO * error or error == float("inf")
            if exact >= worst.double:
                worst.double, worst.at = exact, f"{case} (float32 {error:.1e})"
        if progress and count % 500 == 0:
            print(f"{count} cases, at {case.label}", file=sys.stderr)
    return table


def report(table: dict[str, Worst]) -> tuple[str, bool]:
    """The table as text, and whether every sampler is within its limits."""
    lines = [f"{'sampler':36} {'cases':>6} {'float32':>8} {'beyond':>7} {'float64':>8} {'lost':>5} {'fails there':>12}"]
    good = True
    for label, worst in table.items():
        double = f"{worst.double:.1e}" if worst.beyond else "-"
        lines.append(
            f"{label:36} {worst.cases:6} {worst.single:8.1e} {worst.beyond:7} {double:>8} {worst.lost:5} "
            f"{worst.not_finite:12}"
        )
        if worst.lost:
            lines.append(f"    worst: {worst.at}")
        good = good and not worst.wrong
    return "\n".join(lines), good


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sample", type=int, default=0, help="cases a sampler, instead of all")
    parser.add_argument("--only", default="", help="samplers whose label holds this")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chosen = sampled(arguments.sample, arguments.seed) if arguments.sample else cases()
    begun = time.perf_counter()
    text, good = report(measure((case for case in chosen if arguments.only in case.label), progress=True))
    print(text)
    print(f"{time.perf_counter() - begun:.0f} s; limits {FLOAT32_LIMIT} in float32, {FLOAT64_LIMIT} in float64")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
