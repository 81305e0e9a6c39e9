"""Learned variance: what a network's second output does to the noise of a program's rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import CorruptError

Array = npt.NDArray[np.float64]
Floats = npt.NDArray[np.floating[Any]]
MOST = 64.0
"""Of the logarithm: no two variances of a schedule lie further apart."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Spread:
    """What a network that says its variance makes of the rows' noise, with v_i its second output, by element:

        c[i] n_i  becomes  c[i] exp(log[i] v_i) n_i

    v is -1 at the least variance of a step (the posterior's) and 1 at the greatest (beta), between which its logarithm
    is linear (Nichol and Dhariwal 2021, arXiv 2102.09672, eq. 15); c[i] is the deviation in the middle, the geometric
    mean of both ends'. log: float64 [n], 0 in a row that draws no noise.
    """

    log: Array

    def check(self, count: int) -> None:
        """Raise `CorruptError` unless the logarithms are `count` numbers of a schedule's magnitude."""
        if self.log.shape != (count,) or not (np.abs(self.log) <= MOST).all():
            raise CorruptError(f"program field 'spread' is {self.log}", expected=f"{count} numbers of at most {MOST:g}")
        self.log.setflags(write=False)

    def factor(self, i: int, variance: Floats) -> Floats:
        """What row i's unit noise is multiplied by, of the variance's shape and float type."""
        factor: Floats = np.exp(variance.dtype.type(self.log[i]) * variance)
        return factor
