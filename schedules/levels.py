"""Where on the noise axis a sampler stands, and how a network's output is read there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import ArgumentError, UnknownNameError


@dataclass(frozen=True, slots=True)
class Level:
    """One noise level: x = alpha x0 + s noise in VP coordinates, x0 + sigma noise in VE ones.

    t: the timestep that the network is fed; sigma = s / alpha, infinite where no signal is left.
    data_std: the data's standard deviation that the network's input scaling assumes (1, or EDM's 0.5).
    """

    t: float
    sigma: float
    data_std: float = 1.0

    @property
    def alpha(self) -> float:
        return 0.0 if math.isinf(self.sigma) else 1.0 / math.sqrt(1.0 + self.sigma**2)

    @property
    def s(self) -> float:
        return 1.0 if math.isinf(self.sigma) else self.sigma / math.sqrt(1.0 + self.sigma**2)

    @property
    def scale(self) -> float:
        """The network's input over the VE state."""
        return 1.0 / math.sqrt(self.data_std**2 + self.sigma**2)

    @property
    def noise_scale(self) -> float:
        """The noise's factor in the network's input: `scale` times sigma, 1 where no signal is left."""
        return 1.0 if math.isinf(self.sigma) else self.sigma * self.scale

    @property
    def lam(self) -> float:
        """ln(alpha / s), the half-log signal-to-noise ratio; infinite where no noise is left."""
        return math.inf if self.sigma == 0.0 else -math.log(self.sigma)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """x0 and eps of one evaluation over its input and its raw output."""

    x0_x: float
    x0_out: float
    eps_x: float
    eps_out: float


EDM_PREDICTIONS = {"epsilon": "edm", "v_prediction": "edm_v"}
"""What an EDM config calls its two output signs, and what they are called here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preconditioning:
    """How x0 and eps are read from a network's output.

    prediction: "epsilon", "v_prediction" or "sample" on inputs of unit variance, or "edm" and "edm_v", the two
    signs of Karras et al. 2022 (arXiv 2206.00364, eq. 7), whose input scaling assumes data of std `Level.data_std`.
    """

    prediction: str

    def at(self, level: Level) -> Reading:
        alpha, s = level.alpha, level.s
        if self.prediction == "epsilon":
            if alpha == 0.0:
                raise ArgumentError(
                    "epsilon prediction says nothing of x0 where no signal is left (zero terminal SNR)",
                    remedy="Use prediction='v_prediction', or a schedule that starts below the last timestep.",
                )
            return Reading(x0_x=1 / alpha, x0_out=-s / alpha, eps_x=0.0, eps_out=1.0)
        if self.prediction == "v_prediction":
            return Reading(x0_x=alpha, x0_out=-s, eps_x=s, eps_out=alpha)
        if self.prediction == "sample":
            return Reading(x0_x=0.0, x0_out=1.0, eps_x=1 / s, eps_out=-alpha / s)
        if self.prediction in ("edm", "edm_v"):
            return self._edm(level)
        raise UnknownNameError("prediction", self.prediction, ("epsilon", "v_prediction", "sample", "edm", "edm_v"))

    def _edm(self, level: Level) -> Reading:
        sigma, std, scale = level.sigma, level.data_std, level.scale
        sign = 1.0 if self.prediction == "edm" else -1.0
        x0_x, x0_out = std**2 * scale, sign * sigma * std * scale
        return Reading(x0_x=x0_x, x0_out=x0_out, eps_x=(1 / scale - x0_x) / sigma, eps_out=-x0_out / sigma)


@dataclass(frozen=True, slots=True, kw_only=True)
class Path:
    """The levels that a sampler walks, one step a pair.

    pairs: (here, there) for each step from the start on; where clean, each `there` is the next `here`.
    skipped: steps left out before the first pair (img2img); total: steps of the whole schedule, those included.
    before: the skipped levels. calls: where the network is called in each pair, where that is not `here`.
    at_sigma: the level of a sigma between two steps, for samplers with a middle stage.
    at_timestep: the level of a training timestep, for samplers that walk timesteps. trained: how many there are.
    """

    pairs: Sequence[tuple[Level, Level]]
    skipped: int
    total: int
    at_sigma: Callable[[float], Level]
    at_timestep: Callable[[float], Level]
    trained: int
    before: Sequence[Level] = ()
    calls: Sequence[Level] | None = None

    @property
    def first(self) -> Level:
        return self.pairs[0][0]

    @property
    def last(self) -> Level:
        return self.pairs[-1][1]

    def __len__(self) -> int:
        return len(self.pairs)
