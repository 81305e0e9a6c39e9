"""Clipping x0: the one nonlinear step of a sampler, which stands beside the table of a program's rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import CorruptError

Array = npt.NDArray[np.float64]
Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """How far x0 may reach. limit: the bound of its magnitude, the same for every image,

        clip(x0) = min(max(x0, -limit), limit)

    ratio: where it is given, each image has a bound of its own, and what is clipped is divided by it (dynamic
    thresholding, Saharia et al. 2022, arXiv 2205.11487, section 2.3; as diffusers' `_threshold_sample` does):

        s = min(max(quantile(|x0|, ratio), 1), limit)
        clip(x0) = min(max(x0, -s), s) / s
    """

    limit: float
    ratio: float | None = None

    def clipped(self, x0: Floats) -> Floats:
        """x0 of one image, of any float type and shape, clipped."""
        limit = x0.dtype.type(self.limit)
        if self.ratio is None:
            plain: Floats = np.clip(x0, -limit, limit)
            return plain
        s = np.minimum(np.maximum(np.quantile(np.abs(x0), self.ratio).astype(x0.dtype), x0.dtype.type(1.0)), limit)
        divided: Floats = np.clip(x0, -s, s) / s
        return divided


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Clip:
    """What clipping adds to the rows of a program, with d_i = clip(x0_i) - x0_i, as the bound says:

        H[write] += h[i] d_i
        x'       += x[i] d_i

    h, x: float64 [n].
    """

    bound: Bound
    h: Array
    x: Array

    def check(self, count: int) -> None:
        """Raise `CorruptError` unless the bound is one and both arrays are finite and `count` long."""
        limit, ratio = self.bound.limit, self.bound.ratio
        if not 0 < limit < np.inf:
            raise CorruptError(f"program field 'clip' has the limit {limit}", expected="a finite number above 0")
        if ratio is not None and not 0 <= ratio <= 1:
            raise CorruptError(f"program field 'clip' has the ratio {ratio}", expected="a number from 0 to 1")
        for name, value in (("h", self.h), ("x", self.x)):
            if value.shape != (count,) or not np.isfinite(value).all():
                raise CorruptError(f"program field 'clip.{name}' is {value}", expected=f"{count} finite numbers")
            value.setflags(write=False)

    def change(self, x0: Floats) -> Floats:
        """d for an x0 of any float type."""
        change: Floats = self.bound.clipped(x0) - x0
        return change

    def to_json(self) -> dict[str, Any]:
        own = {} if self.bound.ratio is None else {"ratio": self.bound.ratio}
        return {"limit": self.bound.limit, **own, "h": self.h.tolist(), "x": self.x.tolist()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Clip:
        ratio = None if data.get("ratio") is None else float(data["ratio"])
        bound = Bound(limit=float(data["limit"]), ratio=ratio)
        return cls(bound=bound, h=np.array(data["h"], np.float64), x=np.array(data["x"], np.float64))
