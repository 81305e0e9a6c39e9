"""How diffusers 0.42 lays out its levels, class by class: timesteps, sigmas, and which is paired with which.

diffusers rounds or truncates timesteps after using them, so the float32 tables of `compat_tables` come first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import ArgumentError, UnknownNameError
from ..levels import Level, Path
from ..solvers.multistep import RUNGE_KUTTA
from ..spacing import beta as beta_spacing
from ..spacing import exponential, karras
from .tables import Array, Tables


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A path, and the factor of the Gaussian at its start in the coordinates of diffusers' latents."""

    path: Path
    init_noise: float


def spaced_timesteps(config: Mapping[str, Any], count: int, steps: int, *, default: str, extra: int = 0) -> Array:
    """`timestep_spacing` in float64, unrounded for linspace. extra = 1: one more point, the last one dropped."""
    spacing = config.get("timestep_spacing", default)
    stated = config.get("steps_offset", 0)
    if stated is None:  # which diffusers' pipelines correct, and its schedulers do not take
        raise ArgumentError("steps_offset is null", expected="an integer", remedy="Leave it out.")
    offset = float(stated)
    points = steps + extra
    if spacing == "linspace":
        return np.asarray(np.linspace(0, count - 1, points)[::-1][:steps])
    if spacing == "leading":
        return (np.arange(points) * (count // points)).astype(np.float64)[::-1][:steps] + offset
    if spacing == "trailing":
        return np.asarray(np.arange(count, 0, -count / steps).round() - 1, np.float64)
    raise UnknownNameError("timestep_spacing", spacing, ("leading", "linspace", "trailing"))


def respacing(config: Mapping[str, Any]) -> str | None:
    """Which of the respacings a config asks for; diffusers allows one."""
    names = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
    chosen = [name for name in names if config.get(name)]
    if len(chosen) > 1:
        raise ArgumentError(f"{' and '.join(chosen)} together", expected="one of them")
    return chosen[0].removeprefix("use_").removesuffix("_sigmas").removesuffix("_lambdas") if chosen else None


def respaced(name: str, high: float, low: float, steps: int) -> Array:
    """`steps` sigmas from high to low."""
    if name == "lu":
        return np.asarray(np.exp(math.log(high) + np.linspace(0, 1, steps) * (math.log(low) - math.log(high))))
    return {"karras": karras, "exponential": exponential, "beta": beta_spacing}[name](low, high, steps)


def final_sigma(config: Mapping[str, Any], minimum: float, default: str = "zero") -> float:
    kind = config.get("final_sigmas_type", default)
    if kind not in ("zero", "sigma_min"):
        raise UnknownNameError("final_sigmas_type", kind, ("zero", "sigma_min"))
    return 0.0 if kind == "zero" else minimum


def chain(levels: Sequence[Level], start: int, tables: Tables) -> Path:
    """The path in which each step ends where the next begins."""
    total = len(levels) - 1
    check_start(start, total)
    return Path(
        pairs=list(itertools.pairwise(levels))[start:],
        skipped=start,
        total=total,
        before=levels[:start],
        at_sigma=tables.at_sigma,
        at_timestep=tables.at_timestep,
        trained=tables.count,
    )


def check_start(start: int, total: int) -> None:
    if start >= total:
        raise ArgumentError(
            f"start={start} leaves none of the {total} steps",
            expected=f"at most {total - 1}",
            remedy="Use a higher strength or more steps.",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GridRequest:
    """What is asked of a scheduler: its config's levels, or explicit ones, and how many steps to skip.

    takes: the explicit levels, `timesteps` and `sigmas`, that its class's `set_timesteps` has arguments for. strength:
    of a picture, for the classes that space all steps anew by it.
    """

    tables: Tables
    steps: int | None
    timesteps: Sequence[float] | None
    sigmas: Sequence[float] | None
    start: int
    options: Mapping[str, Any]
    takes: tuple[str, ...] = ()
    strength: float = 1.0

    @property
    def config(self) -> Mapping[str, Any]:
        return self.tables.config

    def refuse_explicit(self) -> None:
        """Raise ArgumentError for explicit levels that this class's `set_timesteps` does not take."""
        for name in ("timesteps", "sigmas"):
            if getattr(self, name) is not None:
                if name not in self.takes:
                    raise ArgumentError(
                        f"{self.config.get('_class_name', 'this scheduler')} takes no explicit {name} in diffusers",
                        remedy="Use compat=None, which takes them with every sampler.",
                    )
                if respacing(self.config):
                    raise ArgumentError(f"explicit {name} with {respacing(self.config)} sigmas", expected="one of both")


def k_family(request: GridRequest) -> Grid:
    """Euler, Heun, LMS, KDPM2 and DPM SDE: n float32 points; respacing spans the range of the spacing's sigmas."""
    tables, config = request.tables, request.config
    kind = str(config.get("_class_name"))
    request.refuse_explicit()
    table = tables.sigmas.astype(np.float64)
    if request.sigmas is not None:
        sigmas = tables.rounded(np.array(request.sigmas, np.float64))
        t = np.array([tables.timestep_of(float(s)) for s in sigmas[:-1]])
        return _k_grid(request, t, sigmas)
    if request.timesteps is not None:
        t = tables.rounded(np.array(request.timesteps, np.float64))
    else:
        t = tables.rounded(spaced_timesteps(config, tables.count, int(request.steps or 0), default="linspace"))
    steps = len(t)
    sigmas = np.interp(t, np.arange(len(table)), table)
    if kind == "EulerDiscreteScheduler" and config.get("interpolation_type", "linear") == "log_linear":
        sigmas = np.exp(np.linspace(math.log(table[-1]), math.log(table[0]), steps + 1))
    name = respacing(config)
    if name and name != "lu":
        bounds = config if kind == "EulerDiscreteScheduler" else {}
        high, low = bounds.get("sigma_max"), bounds.get("sigma_min")
        high, low = sigmas[0] if high is None else high, sigmas[-1] if low is None else low
        sigmas = respaced(name, float(high), float(low), steps)
        t = np.array([tables.timestep_of(float(s)) for s in sigmas])
        if name == "karras" and kind.startswith("KDPM2"):
            t = t.round()
    end = final_sigma(config, float(table[0])) if kind == "EulerDiscreteScheduler" else 0.0
    return _k_grid(request, t, tables.rounded(np.append(sigmas, end)))


def _k_grid(request: GridRequest, t: Array, sigmas: Array) -> Grid:
    config = request.config
    if config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction":
        t = 0.25 * np.log(sigmas[: len(t)])
    t = request.tables.rounded(t)
    levels = [Level(float(ti), float(si)) for ti, si in zip(t, sigmas, strict=False)]
    top = float(sigmas.max())
    plain = config.get("timestep_spacing", "linspace") in ("linspace", "trailing")
    path = chain([*levels, Level(0.0, float(sigmas[len(t)]))], request.start, request.tables)
    return Grid(path=path, init_noise=top if plain else math.sqrt(top**2 + 1))


def multistep_family(request: GridRequest) -> Grid:
    """DPM-Solver, DEIS and UniPC: n of n + 1 int64 points; respacing spans the whole range of the noise schedule."""
    tables, config = request.tables, request.config
    kind = str(config.get("_class_name"))
    dpm = kind.startswith("DPMSolver")
    request.refuse_explicit()
    table = tables.sigmas.astype(np.float64)
    t = _multistep_timesteps(request, kind)
    steps = len(t)
    name = respacing(config)
    if name == "lu" and kind != "DPMSolverMultistepScheduler":
        name = None
    minimum = float(table[0])
    if name:
        bounds = config if kind == "UniPCMultistepScheduler" else {}
        high, low = bounds.get("sigma_max"), bounds.get("sigma_min")
        sigmas = respaced(
            name, float(table[-1]) if high is None else high, float(table[0]) if low is None else low, steps
        )
        t = np.array([tables.timestep_of(float(s)) for s in sigmas])
        rounds = name in ("karras", "lu")
        if kind == "DPMSolverMultistepScheduler" and config.get("beta_schedule") == "squaredcos_cap_v2":
            rounds = False
        t = t.round() if rounds else t
        minimum = minimum if dpm else float(sigmas[-1])
    else:
        sigmas = np.interp(t, np.arange(len(table)), table)
    end = minimum if kind == "DEISMultistepScheduler" else final_sigma(config, minimum)
    values = tables.rounded(np.append(sigmas, end))
    levels = [Level(float(math.trunc(ti)), float(si)) for ti, si in zip(t, values, strict=False)]
    path = chain([*levels, Level(0.0, float(values[-1]))], request.start, tables)
    return Grid(path=path, init_noise=1.0)


def _multistep_timesteps(request: GridRequest, kind: str) -> Array:
    tables, config = request.tables, request.config
    if request.timesteps is not None:
        return np.trunc(np.array(request.timesteps, np.float64))
    steps = int(request.steps or 0)
    clipped = 0
    if kind.startswith("DPMSolver"):
        ab = tables.alpha_bar.astype(np.float64)
        lambdas = 0.5 * (np.log(ab) - np.log1p(-ab))
        clipped = int(np.searchsorted(lambdas[::-1], float(config.get("lambda_min_clipped", -math.inf))))
    if kind == "DPMSolverSinglestepScheduler":
        return np.linspace(0, tables.count - 1 - clipped, steps + 1).round()[::-1][:-1]
    last = tables.count - clipped
    if config.get("timestep_spacing", "linspace") == "trailing":
        return np.asarray(np.arange(last, 0, -tables.count / steps).round() - 1, np.float64)
    return np.trunc(spaced_timesteps(config, last, steps, default="linspace", extra=1).round())


def ddim_family(request: GridRequest) -> Grid:
    """DDIM: each step ends 1000 // n below its timestep, wherever the next one begins."""
    request.refuse_explicit()
    tables = request.tables
    t = _int_timesteps(request)
    ratio = tables.count // len(t) if request.steps is None else tables.count // int(request.steps)
    pairs = [(tables.at_timestep(ti), or_end(request, ti - ratio, keep=False)) for ti in t]
    return vp_grid(request, pairs)


def ddpm_family(request: GridRequest) -> Grid:
    """DDPM: each step ends where the next begins, the last one at alpha_bar 1."""
    request.refuse_explicit()
    return vp_grid(request, next_pairs(request, _int_timesteps(request), Level(-1.0, 0.0)))


def lcm_family(request: GridRequest) -> Grid:
    """LCM and TCD: picked from the timesteps of the distillation, of which a strength keeps the lowest."""
    request.refuse_explicit()
    tables, config = request.tables, request.config
    if request.timesteps is not None:
        t = _int_timesteps(request)
    else:
        steps, taught = int(request.steps or 0), int(config.get("original_inference_steps", 50))
        if not 1 <= taught <= tables.count:
            raise ArgumentError(f"original_inference_steps={taught}", expected=f"an integer from 1 to {tables.count}")
        if steps > taught:
            raise ArgumentError(f"steps={steps}", expected=f"at most original_inference_steps={taught}")
        kept = int(taught * request.strength)
        if steps > kept:
            raise ArgumentError(
                f"strength {request.strength:g} leaves {kept} of the {taught} timesteps of the distillation",
                expected=f"at least one for each of the {steps} steps",
                remedy="Use fewer steps, or a higher strength.",
            )
        origin = np.arange(kept, 0, -1) * (tables.count // taught) - 1
        t = origin[np.floor(np.linspace(0, kept, steps, endpoint=False)).astype(int)].astype(np.float64)
    return vp_grid(request, next_pairs(request, t, end_of_lcm(request)))


def end_of_lcm(request: GridRequest) -> Level:
    """Where the last step of LCM and TCD ends."""
    return request.tables.at_timestep(0) if request.config.get("_class_name") == "TCDScheduler" else Level(0.0, 0.0)


def pndm_family(request: GridRequest) -> Grid:
    """PNDM, with or without its Runge-Kutta steps."""
    request.refuse_explicit()
    t = list(_int_timesteps(request))
    check_start(request.start, len(t))
    return (_plms_grid if request.config.get("skip_prk_steps", False) else _prk_grid)(request, t)


def _prk_grid(request: GridRequest, t: list[float]) -> Grid:
    """Three Runge-Kutta steps of four calls each, their middles half of 1000 // n above the lower end; PLMS from there.

    Where a step begins is told by how many calls there were, and where it ends by the timestep that was called: with
    calls left out at the start the two are apart, in diffusers too.
    """
    tables, steps = request.tables, len(t)
    if steps < 4:
        raise ArgumentError(f"{steps} steps of PNDM with Runge-Kutta steps", expected="at least 4")
    ratio = tables.count // steps
    half = ratio // 2
    stages = [[top, low + half, low + half, low] for top, low in itertools.pairwise(t[:4])]
    calls = [*itertools.chain(*stages), *t[3:]]
    pairs = []
    for count, ti in enumerate(calls[request.start :]):
        if count < RUNGE_KUTTA:
            here, there = calls[count // 4 * 4], ti if count % 2 else ti - half
        else:
            here, there = ti, ti - ratio
        pairs.append((tables.at_timestep(here), or_end(request, there, keep=True)))
    return _called(request, pairs, calls[request.start :], steps)


def _plms_grid(request: GridRequest, t: list[float]) -> Grid:
    """The second timestep twice, steps of 1000 // n as in DDIM.

    The second call is taken for the end of a step that began 1000 // n above it, whatever the first call's was.
    """
    tables = request.tables
    ratio = tables.count // len(t)
    calls = (t[:2] + t[1:] if len(t) > 1 else t)[request.start :]
    pairs = []
    for count, ti in enumerate(calls):
        if count == 1:
            pairs.append((tables.at_timestep(ti + ratio), tables.at_timestep(ti)))
        else:
            pairs.append((tables.at_timestep(ti), or_end(request, ti - ratio, keep=True)))
    return _called(request, pairs, calls, len(t))


def _called(request: GridRequest, pairs: list[tuple[Level, Level]], calls: list[float], steps: int) -> Grid:
    """A grid of steps from pair to pair in which the network is called elsewhere."""
    tables = request.tables
    path = Path(
        pairs=pairs,
        skipped=request.start,
        total=steps,
        calls=[tables.at_timestep(ti) for ti in calls],
        at_sigma=tables.at_sigma,
        at_timestep=tables.at_timestep,
        trained=tables.count,
    )
    return Grid(path=path, init_noise=1.0)


def edm_family(request: GridRequest) -> Grid:
    """EDM Euler: Karras or exponential sigmas over its own range; the network is fed ln(sigma) / 4."""
    request.refuse_explicit()
    config, steps = request.config, int(request.steps or 0)
    low, high = float(config.get("sigma_min", 0.002)), float(config.get("sigma_max", 80.0))
    kind = config.get("sigma_schedule", "karras")
    if kind not in ("karras", "exponential"):
        raise UnknownNameError("sigma_schedule", kind, ("karras", "exponential"))
    if kind == "karras":
        sigmas = karras(low, high, steps, rho=float(config.get("rho", 7.0)))
    else:
        # Counted up from sigma_min and turned round, so that a single step is taken at sigma_min.
        sigmas = exponential(high, low, steps)[::-1]
    sigmas = request.tables.rounded(sigmas)
    std = float(config.get("sigma_data", 0.5))
    levels = [Level(0.25 * math.log(sigma), float(sigma), std) for sigma in sigmas]
    end = final_sigma(config, float(sigmas[-1]))
    path = chain([*levels, Level(0.0, end, std)], request.start, request.tables)
    return Grid(path=path, init_noise=math.sqrt(high**2 + 1))


def _int_timesteps(request: GridRequest) -> Array:
    """n int64 points, as DDIM, DDPM and PNDM take them."""
    if request.timesteps is not None:
        t = np.trunc(np.array(request.timesteps, np.float64))
        if np.any(np.diff(t) >= 0):
            raise ArgumentError(f"timesteps {list(request.timesteps)}", expected="falling numbers")
        return t
    steps = int(request.steps or 0)
    spaced = spaced_timesteps(request.config, request.tables.count, steps, default="leading")
    return np.trunc(spaced.round())


def or_end(request: GridRequest, t: float, *, keep: bool) -> Level:
    """The level of a timestep, or beyond the last: sigma 0, or the least one if the config says so."""
    if t >= 0:
        return request.tables.at_timestep(t)
    to_one = bool(request.config.get("set_alpha_to_one", not keep))
    return Level(t, 0.0) if to_one else request.tables.at_timestep(0)


def next_pairs(request: GridRequest, t: Iterable[float], end: Level) -> list[tuple[Level, Level]]:
    levels = [*(request.tables.at_timestep(ti) for ti in t), end]
    return list(itertools.pairwise(levels))


def vp_grid(request: GridRequest, pairs: list[tuple[Level, Level]]) -> Grid:
    check_start(request.start, len(pairs))
    path = Path(
        pairs=pairs[request.start :],
        skipped=request.start,
        total=len(pairs),
        at_sigma=request.tables.at_sigma,
        at_timestep=request.tables.at_timestep,
        trained=request.tables.count,
    )
    return Grid(path=path, init_noise=1.0)
