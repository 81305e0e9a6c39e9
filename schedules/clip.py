"""Clipping x0: the one nonlinear step of a sampler, which stands beside the table of a program's rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import CorruptError

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Clip:
    """What clipping adds to the rows of a program, with d_i = clip(x0_i, -limit, limit) - x0_i:

        H[write] += h[i] d_i
        x'       += x[i] d_i

    limit: the bound of x0's magnitude. h, x: float64 [n].
    """

    limit: float
    h: Array
    x: Array

    def check(self, count: int) -> None:
        """Raise `CorruptError` unless the limit is above 0 and both arrays are finite and `count` long."""
        if not 0 < self.limit < np.inf:
            raise CorruptError(f"program field 'clip' has the limit {self.limit}", expected="a finite number above 0")
        for name, value in (("h", self.h), ("x", self.x)):
            if value.shape != (count,) or not np.isfinite(value).all():
                raise CorruptError(f"program field 'clip.{name}' is {value}", expected=f"{count} finite numbers")
            value.setflags(write=False)

    def change(self, x0: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.floating[Any]]:
        """d for an x0 of any float type."""
        limit = x0.dtype.type(self.limit)
        change: npt.NDArray[np.floating[Any]] = np.clip(x0, -limit, limit) - x0
        return change

    def to_json(self) -> dict[str, Any]:
        return {"limit": self.limit, "h": self.h.tolist(), "x": self.x.tolist()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Clip:
        return cls(limit=float(data["limit"]), h=np.array(data["h"], np.float64), x=np.array(data["x"], np.float64))
