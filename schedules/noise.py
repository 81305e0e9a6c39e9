"""The noise schedule of a model: how much signal is left at each training timestep."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError, UnknownNameError, UnsupportedError
from ..values import Reader, parse_json
from .keys import MOST_TIMESTEPS, check_keys

Array = npt.NDArray[np.float64]

PREDICTIONS = ("epsilon", "v_prediction", "sample")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")

ZERO_SNR_FLOOR = 2.0**-24
"""What stands for alpha_bar = 0 where sigma has to be finite (about 4096)."""

_BETA_DEFAULTS = (1e-4, 0.02, "linear")
_BETA_DEFAULTS_OF_CLASS = {
    "HeunDiscreteScheduler": (0.00085, 0.012, "linear"),
    "KDPM2DiscreteScheduler": (0.00085, 0.012, "linear"),
    "KDPM2AncestralDiscreteScheduler": (0.00085, 0.012, "linear"),
    "DPMSolverSDEScheduler": (0.00085, 0.012, "linear"),
    "LCMScheduler": (0.00085, 0.012, "scaled_linear"),
    "TCDScheduler": (0.00085, 0.012, "scaled_linear"),
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NoiseSchedule:
    """What a checkpoint was trained with: x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) noise.

    alpha_bar: float64 [T], falling; exactly 0 at the end for zero terminal SNR.
    prediction: what the network returns, one of "epsilon", "v_prediction", "sample".
    timestep_type: "discrete" (the network is fed t in 0..T-1) or "continuous" (it is fed ln(sigma) / 4).
    config: the diffusers scheduler config this was read from; it is what `to_json` writes.
    """

    alpha_bar: Array
    prediction: str
    timestep_type: str
    config: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise UnknownNameError("prediction", self.prediction, PREDICTIONS)
        if self.timestep_type not in ("discrete", "continuous"):
            raise UnknownNameError("timestep_type", self.timestep_type, ("discrete", "continuous"))
        a = self.alpha_bar
        if a.ndim != 1 or len(a) < 2 or not (np.all(np.diff(a) < 0) and a[0] < 1 and a[-1] >= 0):
            raise ArgumentError(
                "alpha_bar does not fall from below 1 to 0 or more",
                remedy="Check the beta_start, beta_end, beta_schedule or trained_betas of the scheduler config.",
            )
        a.setflags(write=False)

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Read the noise schedule out of a diffusers scheduler config (the parsed `scheduler_config.json`).

        Raises UnsupportedError for flow matching and for beta schedules that no supported scheduler has, CorruptError
        for values of another type than their keys have.
        """
        check_keys(config, Reader(place="the scheduler's configuration"))
        if (
            config.get("use_flow_sigmas")
            or "shift_terminal" in config
            or config.get("prediction_type")
            in (
                "flow_prediction",
                "flow",
            )
        ):
            raise UnsupportedError(
                "a flow-matching scheduler config", expected="a noise schedule of DDPM's kind, with betas"
            )
        prediction = config.get("prediction_type", "epsilon")
        return cls(
            alpha_bar=_alpha_bar(config, rescale=config.get("rescale_betas_zero_snr", False)),
            prediction="sample" if prediction == "original_sample" else prediction,
            timestep_type=config.get("timestep_type", "discrete"),
            config=dict(config),
        )

    @classmethod
    def scaled_linear(
        cls, beta_start: float = 0.00085, beta_end: float = 0.012, prediction: str = "epsilon"
    ) -> NoiseSchedule:
        """The schedule of latent diffusion (Rombach et al., arXiv:2112.10752), as published checkpoints have it."""
        return cls.from_diffusers(
            {
                "num_train_timesteps": 1000,
                "beta_start": beta_start,
                "beta_end": beta_end,
                "beta_schedule": "scaled_linear",
                "prediction_type": prediction,
                "clip_sample": False,
                "set_alpha_to_one": False,
                "steps_offset": 1,
            }
        )

    def __len__(self) -> int:
        return len(self.alpha_bar)

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the last training timestep is pure noise."""
        return bool(self.alpha_bar[-1] == 0.0)

    @property
    def sigmas(self) -> Array:
        """float64 [T], rising: sqrt((1 - alpha_bar) / alpha_bar), finite even for zero terminal SNR."""
        a = np.maximum(self.alpha_bar, ZERO_SNR_FLOOR)
        return np.asarray(np.sqrt((1 - a) / a))

    def sigma_at(self, t: float | Array) -> Array:
        """Sigma at a timestep, linear in sigma between training timesteps (the convention of k-diffusion's port)."""
        s = self.sigmas
        return np.asarray(np.interp(t, np.arange(len(s)), s))

    def timestep_at(self, sigma: float | Array) -> Array:
        """The timestep that a network is fed for a sigma: the inverse table in ln(sigma), or ln(sigma) / 4."""
        log_sigma = np.log(np.maximum(sigma, 1e-10))
        if self.timestep_type == "continuous":
            return np.asarray(log_sigma / 4)
        s = self.sigmas
        t = np.interp(log_sigma, np.log(s), np.arange(len(s)))
        whole = np.round(t)
        return np.where(np.abs(t - whole) < 1e-9, whole, t)

    def to_json(self) -> str:
        """The config as JSON text; `from_json` gives the same schedule back, bit for bit."""
        return json.dumps(self.config, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> NoiseSchedule:
        return cls.from_diffusers(parse_json(text, "a noise schedule"))


def _alpha_bar(config: Mapping[str, Any], *, rescale: bool) -> Array:
    """The cumulative signal in float64, as the config means it rather than as float32 arithmetic leaves it."""
    alpha_bar = np.cumprod(1.0 - _betas(config))
    if rescale:
        root = np.sqrt(alpha_bar)
        alpha_bar = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    return np.asarray(alpha_bar)


def _betas(config: Mapping[str, Any]) -> Array:
    trained, count, start, end, name = beta_fields(config)
    if trained is not None:
        return np.asarray(trained, np.float64)
    if name == "linear":
        return np.asarray(np.linspace(start, end, count))
    if name == "scaled_linear":
        return np.asarray(np.linspace(start**0.5, end**0.5, count) ** 2)
    return cosine_betas(count)


def beta_fields(config: Mapping[str, Any]) -> tuple[list[float] | None, int, float, float, str]:
    """trained_betas, num_train_timesteps, beta_start, beta_end and beta_schedule, with the class's own defaults."""
    start, end, name = _BETA_DEFAULTS_OF_CLASS.get(config.get("_class_name", ""), _BETA_DEFAULTS)
    name = config.get("beta_schedule", name)
    if name not in BETA_SCHEDULES:
        raise UnknownNameError("beta_schedule", name, BETA_SCHEDULES)
    count = config.get("num_train_timesteps", 1000)
    trained = config.get("trained_betas")
    start, end = float(config.get("beta_start", start)), float(config.get("beta_end", end))
    if isinstance(count, bool) or not isinstance(count, int) or not 2 <= count <= MOST_TIMESTEPS:
        raise ArgumentError(f"num_train_timesteps is {count!r}", expected=f"an integer from 2 to {MOST_TIMESTEPS}")
    if trained is None and name != "squaredcos_cap_v2" and not 0 < start <= end < 1:
        raise ArgumentError(f"beta_start {start} and beta_end {end}", expected="0 < beta_start <= beta_end < 1")
    if trained is not None and not all(0 < b <= 1 for b in trained):
        raise ArgumentError("alpha_bar does not fall: trained_betas are not all above 0 and at most 1")
    return (None if trained is None else [float(b) for b in trained]), count, start, end, name


def cosine_betas(count: int) -> Array:
    """squaredcos_cap_v2 (Nichol & Dhariwal 2021, arXiv 2102.09672), betas capped at 0.999."""

    def signal(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    return np.array([min(1 - signal((i + 1) / count) / signal(i / count), 0.999) for i in range(count)])
