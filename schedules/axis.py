"""The noise axis that sampling walks in fewstep's own conventions: a network's, or EDM's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ArgumentError
from .levels import EDM_PREDICTIONS, Level
from .noise import NoiseSchedule
from .options import check_spacing_option
from .solvers.registry import Sampler
from .spacing import sigma_range


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """The noise axis of one network: the range it was trained on, and both directions between t and sigma."""

    noise: NoiseSchedule
    sigma_min: float
    sigma_max: float
    edm_std: float | None
    infinite_top: bool

    def at_sigma(self, sigma: float) -> Level:
        if self.edm_std is not None:
            return Level(0.25 * math.log(max(sigma, 1e-10)), sigma, self.edm_std)
        return Level(float(self.noise.timestep_at(sigma)), sigma)

    def training_timestep(self, sigma: float) -> float:
        """Where among the training timesteps a sigma lies, whatever the network is fed for it."""
        s = np.log(self.noise.sigmas)
        return float(np.interp(math.log(max(sigma, 1e-10)), s, np.arange(len(s))))

    def at_timestep(self, t: float) -> Level:
        if self.infinite_top and t == len(self.noise) - 1:
            return Level(float(t), math.inf)
        sigma = float(self.noise.sigma_at(t))
        if self.noise.timestep_type == "continuous":
            return self.at_sigma(sigma)
        return Level(float(t), sigma)


def own_axis(noise: NoiseSchedule, sampler: Sampler) -> Axis:
    """The network's own axis, as far as a sampler can walk it."""
    low, high = sigma_range(noise)
    infinite = noise.zero_terminal_snr and sampler.infinite_top
    return Axis(noise=noise, sigma_min=low, sigma_max=high, edm_std=None, infinite_top=infinite)


def edm_axis(layout: dict[str, Any]) -> Axis:
    """EDM networks have no training timesteps: sigma ranges over [0.002, 80] unless told otherwise."""
    for name in ("sigma_min", "sigma_max", "sigma_data"):
        check_spacing_option(name, layout.get(name, 1.0))
    low, high = float(layout.get("sigma_min", 0.002)), float(layout.get("sigma_max", 80.0))
    std = float(layout.pop("sigma_data", 0.5))
    return Axis(noise=NoiseSchedule.scaled_linear(), sigma_min=low, sigma_max=high, edm_std=std, infinite_top=False)


def edm_prediction(prediction: str) -> str:
    """A configuration's word for what an EDM network returns in this package's."""
    if prediction not in EDM_PREDICTIONS:
        raise ArgumentError(f"edm_euler with prediction {prediction!r}", expected=" or ".join(EDM_PREDICTIONS))
    return EDM_PREDICTIONS[prediction]
