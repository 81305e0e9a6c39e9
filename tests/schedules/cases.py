"""The configurations of the parity suite: every sampler with the options of its diffusers class."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

SD = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SPACINGS = [{"timestep_spacing": s, "steps_offset": o} for s, o in (("leading", 1), ("linspace", 0), ("trailing", 0))]
RESPACINGS: list[dict[str, Any]] = [
    {},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
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
    at random, from the `least` number of steps that diffusers' class takes on."""

    label: str
    config: dict[str, Any]
    predictions: tuple[str, ...] = ALL
    every: tuple[Choice, ...] = (SPACINGS, RESPACINGS)
    varied: tuple[Choice, ...] = ()
    step: dict[str, Any] = field(default_factory=dict)
    least: int = 1


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
    yield Family("pndm", {"_class_name": "PNDMScheduler"}, TWO, (SPACINGS, ends), least=4)
    yield from clipped_families()
    yield from thresholded_families()
    yield from multistep_families()
    yield from cosine_families()
    multi = {"_class_name": "DPMSolverMultistepScheduler"}
    yield Family("dpmpp_2m zero-snr", {**multi, **zero_snr}, ("v_prediction",))
    unipc = {"_class_name": "UniPCMultistepScheduler"}
    yield Family("unipc_2 zero-snr", {**unipc, **zero_snr}, ("v_prediction",))
    original = [{}, {"original_inference_steps": 100}]
    yield Family("lcm", {"_class_name": "LCMScheduler"}, every=(original,))
    for eta in (0.0, 0.3, 1.0):
        ignored = {"clip_sample": True, "thresholding": True}
        yield Family(f"tcd eta {eta}", {"_class_name": "TCDScheduler", **ignored}, every=(original,), step={"eta": eta})
    edm = {"_class_name": "EDMEulerScheduler"}
    ramps = [{"sigma_schedule": "karras"}, {"sigma_schedule": "exponential"}]
    yield Family("edm_euler", edm, TWO, (ramps, LASTS))
    yield Family("edm_euler s_churn", edm, TWO, (ramps, LASTS), step=churn)
    edm = {"_class_name": "EDMDPMSolverMultistepScheduler"}
    kinds = [{"solver_order": o, "algorithm_type": a} for o in (1, 2) for a in ("dpmsolver++", "sde-dpmsolver++")]
    kinds.append({"solver_order": 3})
    varied = ([{"solver_type": "midpoint"}, {"solver_type": "heun"}], [{}, {"euler_at_final": True}])
    yield Family("edm dpmpp", edm, TWO, (ramps, LASTS, kinds), varied)


def clipped_families() -> Iterator[Family]:
    """x0 clipped: where a class does so by default its config says nothing; most of the network's x0 lies beyond 1."""
    limits: Choice = [{}, {"clip_sample_range": 2.5}]
    yield Family("ddim clipped", {"_class_name": "DDIMScheduler"}, every=(SPACINGS, limits), step={"eta": 0.3})
    yield Family("ddpm clipped", {"_class_name": "DDPMScheduler"}, every=(SPACINGS, limits))
    clipped = {"clip_sample": True}
    yield Family("heun clipped", {"_class_name": "HeunDiscreteScheduler", **clipped}, every=(SPACINGS, limits))
    yield Family("lcm clipped", {"_class_name": "LCMScheduler", **clipped}, every=(limits,))
    zero_snr = {"rescale_betas_zero_snr": True}
    ddim = {"_class_name": "DDIMScheduler", **clipped, **zero_snr}
    yield Family("ddim clipped zero-snr", ddim, ("v_prediction",), (SPACINGS, limits))


def thresholded_families() -> Iterator[Family]:
    """x0 in bounds of each image's own, by every class that does so, and DeepFloyd's learned variance.

    Not under cosine betas, where float64 leaves 3e-12 open and these classes have no form in 40 digits;
    `tests/runtime/test_deepfloyd.py` has whole pictures under them.
    """
    own = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5}
    bounds: Choice = [
        own,
        {"thresholding": True},
        {**own, "sample_max_value": 100.0, "dynamic_thresholding_ratio": 0.73},
    ]
    for label, name in (("ddim", "DDIM"), ("ddpm", "DDPM"), ("lcm", "LCM")):
        spaced = () if name == "LCM" else (SPACINGS,)
        yield Family(f"{label} thresholded", {"_class_name": f"{name}Scheduler"}, every=(*spaced, bounds))
    yield Family("ddim eta thresholded", {"_class_name": "DDIMScheduler", **own}, every=(SPACINGS,), step={"eta": 0.6})
    orders = [{"solver_order": k} for k in (1, 2, 3)]
    kinds = [{"algorithm_type": a} for a in ("dpmsolver++", "sde-dpmsolver++")]
    for form in ("Multistep", "Singlestep"):
        solver = {"_class_name": f"DPMSolver{form}Scheduler"}
        yield Family(f"dpmpp {form} thresholded", solver, every=(bounds, orders), varied=(kinds,))
    for name in ("UniPC", "DEIS"):
        solver = {"_class_name": f"{name}MultistepScheduler"}
        yield Family(f"{name} thresholded", solver, every=(bounds, orders), varied=(SPACINGS,))
    learned = {"_class_name": "DDPMScheduler", "variance_type": "learned_range", "clip_sample": False}
    yield Family("ddpm learned", learned, every=(SPACINGS, [{}, own]))


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
    for label, name in (
        ("euler", "EulerDiscrete"),
        ("dpmpp_2m", "DPMSolverMultistep"),
        ("deis_2", "DEISMultistep"),
        ("dpmpp_2s", "DPMSolverSinglestep"),
        ("unipc_2", "UniPCMultistep"),
    ):
        yield Family(f"{label} cosine", {"_class_name": f"{name}Scheduler", **COSINE})
    yield Family("ddim cosine", {"_class_name": "DDIMScheduler", "clip_sample": False, **COSINE}, every=(SPACINGS,))


def explicit_cases() -> Iterator[Case]:
    """Explicit timesteps and sigmas, for the classes that take them."""
    lists = ((999, 850, 736, 645, 545, 455, 343, 233, 124, 24), (999, 845, 730, 587, 443, 310, 193, 116, 53, 13, 0))
    for name in (
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "DDPMScheduler",
        "DPMSolverSinglestepScheduler",
        "LCMScheduler",
        "TCDScheduler",
    ):
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
            for steps in range(family.least, 31):
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
            steps = rng.randint(family.least, 30)
            start = rng.choice([0, 0, rng.randrange(steps)])
            choices = [rng.choice(choice) for choice in (*family.every, *family.varied)]
            chosen.append(build(family, rng.choice(family.predictions), choices, steps, start))
    explicit = list(explicit_cases())
    return [*chosen, *rng.sample(explicit, max(1, len(explicit) // 10))]
