"""Spacings: how many noise levels, and where. One function each; clean conventions, in float64.

A spacing returns sigmas, float64 [n + 1], falling, the last one being the level where the sampling ends. Those that
pick training timesteps also return these, float64 [n]; for the others the timesteps follow from the sigmas.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .beta import beta_quantile
from .noise import NoiseSchedule
from .tables import load_table

Array = npt.NDArray[np.float64]
FIRST = ("first_timestep", "first_sigma")
"""Options that name the level where sampling begins, in one way or the other."""
TimestepSpacing = Callable[..., Array]
SigmaSpacing = Callable[..., Array]


def leading(count: int, steps: int, *, steps_offset: int = 1) -> Array:
    """Whole multiples of T // n, shifted up by `steps_offset` (SD checkpoints: 1). Never starts at pure noise."""
    t = np.arange(steps)[::-1] * float(count // steps)
    return np.asarray(t + min(steps_offset, count - 1 - t[0]))


def linspace(count: float, steps: int) -> Array:
    """n timesteps from T - 1 down to 0, both included, not rounded."""
    return np.linspace(count - 1, 0, steps)


def trailing(count: float, steps: int) -> Array:
    """Rounded multiples of T / n counted back from T - 1 (Lin et al. 2023, arXiv 2305.08891, Table 2)."""
    return np.asarray(np.round(count - np.arange(steps) * (count / steps)) - 1)


def sgm_uniform(count: float, steps: int) -> Array:
    """The first n of n + 1 equally spaced timesteps from T - 1 to 0 (the spacing of Stability's generative-models)."""
    return np.linspace(count - 1, 0, steps + 1)[:-1]


def simple(count: float, steps: int) -> Array:
    """Every (T / n)-th training timestep from T - 1 down (ComfyUI's "simple")."""
    return np.asarray(count - 1 - np.floor(np.arange(steps) * (count / steps)))


def lcm_timesteps(count: int, steps: int, *, original_steps: int = 50) -> Array:
    """n of the `original_steps` timesteps a consistency model was distilled at (Luo et al. 2023, arXiv 2310.04378)."""
    taught = np.arange(original_steps, 0, -1) * float(count // original_steps) - 1
    picked = np.floor(np.linspace(0, original_steps, steps, endpoint=False)).astype(int)
    return np.asarray(taught[picked], np.float64)


def turbo_tenths(count: int, steps: int) -> Array:
    """The first n of ten timesteps, T - 1, 9 T / 10 - 1, ..., as ComfyUI's node for turbo models picks them."""
    return np.asarray(np.arange(10, 10 - steps, -1) * (count / 10) - 1, np.float64)


def karras(sigma_min: float, sigma_max: float, steps: int, *, rho: float = 7.0) -> Array:
    """Equal steps in sigma^(1/rho) (Karras et al. 2022, arXiv 2206.00364, eq. 5)."""
    ramp = np.linspace(0, 1, steps)
    return np.asarray((sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho)


def exponential(sigma_min: float, sigma_max: float, steps: int) -> Array:
    """Equal steps in ln(sigma)."""
    return np.asarray(np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), steps)))


def beta(sigma_min: float, sigma_max: float, steps: int, *, alpha: float = 0.6, beta: float = 0.6) -> Array:
    """Sigmas at the quantiles of a beta distribution (Lee et al. 2024, arXiv 2407.12173)."""
    quantiles = [beta_quantile(p, alpha, beta) for p in 1 - np.linspace(0, 1, steps)]
    return sigma_min + np.array(quantiles, np.float64) * (sigma_max - sigma_min)


def lu(sigma_min: float, sigma_max: float, steps: int, *, rho: float = 1.0) -> Array:
    """Equal steps in lambda^(1/rho), lambda = -ln(sigma) (Lu et al. 2022, DPM-Solver, arXiv 2206.00927)."""
    high, low = math.log(sigma_max), math.log(sigma_min)
    return np.asarray(np.exp(high + np.linspace(0, 1, steps) ** rho * (low - high)))


def kl_optimal(sigma_min: float, sigma_max: float, steps: int) -> Array:
    """Equal steps in atan(sigma), optimal for Gaussian data (arXiv 2404.14507, eq. 20)."""
    return np.asarray(np.tan(np.linspace(math.atan(sigma_max), math.atan(sigma_min), steps)))


def from_table(name: str, steps: int) -> Array:
    """A published table at any step count: n + 1 points, linear in ln(sigma) over the index, both ends kept."""
    sigmas = np.log(load_table(name).sigmas)
    index = np.linspace(0, len(sigmas) - 1, steps + 1)
    return np.asarray(np.exp(np.interp(index, np.arange(len(sigmas)), sigmas)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Spacing:
    """A spacing as the compiler sees it: exactly one of the three ways to make levels, and how many it has.

    begins: whether it can begin below the greatest level, its n levels being spread from there on.
    """

    name: str
    summary: str
    source: str
    timesteps: TimestepSpacing | None = None
    sigmas: SigmaSpacing | None = None
    table: str | None = None
    most_steps: int | None = None
    begins: bool = False

    @property
    def options(self) -> tuple[str, ...]:
        """The keyword options that a caller may set."""
        function = self.timesteps or self.sigmas
        if function is None:
            return ()
        own = tuple(p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY)
        return own + (("sigma_min", "sigma_max") if self.sigmas else ()) + (FIRST if self.begins else ())


def _summary(function: Callable[..., Array]) -> str:
    return (function.__doc__ or "").split("\n")[0].rstrip(".")


_BY_TIMESTEP: dict[str, tuple[TimestepSpacing, str]] = {
    "leading": (leading, "Ho et al. 2020, arXiv 2006.11239, as in the first SD releases"),
    "linspace": (linspace, "k-diffusion"),
    "trailing": (trailing, "arXiv 2305.08891"),
    "sgm_uniform": (sgm_uniform, "Stability-AI generative-models"),
    "simple": (simple, "ComfyUI"),
    "lcm": (lcm_timesteps, "arXiv 2310.04378"),
    "turbo_tenths": (turbo_tenths, "ComfyUI"),
}
_MOST_STEPS = {"turbo_tenths": 10}
_BEGINNING = ("linspace", "trailing", "sgm_uniform", "simple")
_BY_SIGMA: dict[str, tuple[SigmaSpacing, str]] = {
    "karras": (karras, "arXiv 2206.00364"),
    "exponential": (exponential, "k-diffusion"),
    "beta": (beta, "arXiv 2407.12173"),
    "lu": (lu, "arXiv 2206.00927"),
    "kl_optimal": (kl_optimal, "arXiv 2404.14507"),
}
_TABLES = ("ays_sd", "ays_sdxl", "ays_deepfloyd", "ays_svd", "gits")

SPACINGS: dict[str, Spacing] = {
    **{
        k: Spacing(
            name=k, summary=_summary(f), source=s, timesteps=f, most_steps=_MOST_STEPS.get(k), begins=k in _BEGINNING
        )
        for k, (f, s) in _BY_TIMESTEP.items()
    },
    **{k: Spacing(name=k, summary=_summary(f), source=s, sigmas=f, begins=True) for k, (f, s) in _BY_SIGMA.items()},
    **{k: Spacing(name=k, summary=load_table(k).title, source=load_table(k).source, table=k) for k in _TABLES},
}
"""Every spacing by its name. Alias "ays" means the table of the checkpoint's own family, "ays_sd" where unknown."""


def sigma_range(noise: NoiseSchedule) -> tuple[float, float]:
    """The least and greatest sigma a network was trained at.

    Of one that is fed ln(sigma) / 4 the scheduler's configuration states them, and its betas mean nothing.
    """
    s = noise.sigmas
    own = noise.config if noise.timestep_type == "continuous" else {}
    low, high = own.get("sigma_min"), own.get("sigma_max")
    return float(s[0] if low is None else low), float(s[-1] if high is None else high)
