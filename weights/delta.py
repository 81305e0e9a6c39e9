"""Changes of one weight, as adapter files of different kinds state them.

    LoRA   s up (mid) down             Hu et al. 2021, arXiv:2106.09685; LoCon's middle matrix is Tucker's core
    LoHa   s (a1 b1) * (a2 b2)         Hyeon-Woo et al. 2021, arXiv:2108.06098, element by element
    LoKr   s w1 (x) w2                 Yeh et al. 2023, arXiv:2309.14859, Kronecker's product
    diff   s (difference)              what is left of a fine-tune
    DoRA   m (W + D) / |W + D|         Liu et al. 2024, arXiv:2402.09353, over any D of the above

The factor s is the scale that is asked for times alpha / rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import CorruptError
from .stored import Stored, convert

Float32 = npt.NDArray[np.float32]
PARTS = {
    "LoRA": frozenset({"down", "up", "mid"}),
    "LoHa": frozenset({"w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"}),
    "LoKr": frozenset({"w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"}),
    "diff": frozenset({"diff"}),
}
"""The tensors that a change of each kind may have, beside DoRA's magnitude."""
NEEDED = {
    "LoRA": ({"down", "up"},),
    "LoHa": ({"w1_a", "w1_b", "w2_a", "w2_b"},),
    "LoKr": tuple(a | b for a in ({"w1"}, {"w1_a", "w1_b"}) for b in ({"w2"}, {"w2_a", "w2_b"})),
    "diff": ({"diff"},),
}
"""Those of which one set must be there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraFile:
    """An adapter's safetensors file and the factor it is fused with."""

    path: Path
    scale: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """One adapter's change of one weight: of a kind, its tensors by part, the factor, and DoRA's magnitude if any."""

    lora: LoraFile
    name: str
    kind: str
    parts: Mapping[str, Stored]
    factor: float
    magnitude: Stored | None = None

    @property
    def where(self) -> str:
        return f"{self.name} in {self.lora.path.name}"

    @property
    def rank(self) -> int:
        """Columns between the matrices; 0 where there are none."""
        inner = {"LoRA": "down", "LoHa": "w1_b"}.get(self.kind)
        if inner is None:
            inner = next((p for p in ("w1_b", "w2_b") if self.kind == "LoKr" and p in self.parts), None)
        return 0 if inner is None else self.parts[inner].shape[0]

    @property
    def is_low_rank(self) -> bool:
        """Whether it is up @ down and nothing else, whatever the weight."""
        return self.kind == "LoRA" and "mid" not in self.parts and self.magnitude is None

    @property
    def title(self) -> str:
        """What it is called."""
        if self.magnitude is not None:
            return "DoRA"
        if self.kind == "diff":
            return "a full difference of weights"
        return "a LoRA with a middle matrix" if "mid" in self.parts else f"a {self.kind}"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the change, as far as the tensors tell: without trailing ones."""
        part = {n: t.shape for n, t in self.parts.items()}
        if self.kind == "diff":
            return part["diff"]
        if self.kind == "LoRA":
            kernel = part["mid"][2:] if "mid" in part else part["down"][2:]
            return (part["up"][0], part["down"][1], *kernel)
        if self.kind == "LoHa":
            if "t1" in part:
                return (part["w1_a"][1], part["w1_b"][1], *part["t1"][2:])
            return (part["w1_a"][0], part["w1_b"][1])
        first = part.get("w1") or (part["w1_a"][0], part["w1_b"][1])
        if "w2" in part:
            second = part["w2"]
        elif "t2" in part:
            second = (part["w2_a"][1], part["w2_b"][1], *part["t2"][2:])
        else:
            second = (part["w2_a"][0], math.prod(part["w2_b"][1:]))
        return (first[0] * second[0], first[1] * second[1], *second[2:])

    def matrices(self) -> tuple[Float32, Float32]:
        """`down` [r, in * kh * kw] and `up` [out, r] of a LoRA in float32, without the factor."""
        down, up = self._array("down"), self._array("up")
        return down.reshape(len(down), -1), up.reshape(up.shape[0], -1)

    def value(self) -> Float32:
        """The change in float32, with its factor; DoRA's apart."""
        change: Float32 = (self._change() * np.float32(self.factor)).astype(np.float32, copy=False)
        return change

    def added(self, weight: Float32) -> Float32:
        """A weight, float32 of its own shape, with the change: W + D, or with a magnitude m (W + D) / |W + D|."""
        if self.is_low_rank:
            down, up = self.matrices()
            # W + (s up) down, with one array of W's size
            product: Float32 = np.matmul(up * np.float32(self.factor), down)
            np.add(product, weight.reshape(product.shape), out=product)
            whole: Float32 = product.reshape(weight.shape)
            return whole
        total: Float32 = weight + self.value().reshape(weight.shape)
        if self.magnitude is None:
            return total
        magnitude = self._array_of(self.magnitude)
        axes = tuple(range(1, total.ndim))
        if magnitude.size != len(total):  # by input: the norm is over all other axes
            axes = (0, *range(2, total.ndim))
        norm = np.sqrt(np.square(total, dtype=np.float64).sum(axis=axes, keepdims=True))
        scaled: Float32 = (total * (magnitude.reshape(norm.shape) / norm)).astype(np.float32)
        return scaled

    def _change(self) -> Float32:
        if self.kind == "diff":
            return self._array("diff")
        if self.kind == "LoHa":
            return self._product("w1_a", "w1_b", "t1") * self._product("w2_a", "w2_b", "t2")
        if self.kind == "LoKr":
            first = self._array("w1") if "w1" in self.parts else self._product("w1_a", "w1_b")
            second = self._array("w2") if "w2" in self.parts else self._product("w2_a", "w2_b", "t2")
            first = first.reshape(*first.shape, *(1,) * (second.ndim - first.ndim))
            product: Float32 = np.kron(first, second)
            return product
        down, up = self.matrices()
        # W[o, i, k, l] = sum_rs up[o, r] mid[r, s, k, l] down[s, i]
        change: Float32 = (
            np.einsum("or,rskl,si->oikl", up, self._array("mid"), down, optimize=True)
            if "mid" in self.parts
            else up @ down
        )
        return change

    def _product(self, a: str, b: str, core: str = "") -> Float32:
        """a b, or with Tucker's core t: W[p, r, k, l] = sum_ij t[i, j, k, l] a[i, p] b[j, r]."""
        first, second = self._array(a), self._array(b)
        if core in self.parts:
            tucker: Float32 = np.einsum("ijkl,ip,jr->prkl", self._array(core), first, second, optimize=True)
            return tucker
        product: Float32 = first @ second.reshape(len(second), -1)
        return product

    def _array(self, part: str) -> Float32:
        return self._array_of(self.parts[part])

    def _array_of(self, stored: Stored) -> Float32:
        values: Float32 = convert(stored, "float32", self.name).astype(np.float32).reshape(stored.shape)
        return values

    def check(self, shape: tuple[int, ...] | None) -> None:
        """Raise `CorruptError` unless the tensors fit each other and, where it is known, the weight's shape."""
        try:
            own = self.shape
            fits = math.isfinite(self.factor) and all(0 not in t.shape for t in self.parts.values())
            low = self.kind != "LoRA" or self._matrices_fit()
        except (IndexError, TypeError):
            own, fits, low = (), False, False
        if not (fits and low):
            shapes = ", ".join(f"{n} {list(t.shape)}" for n, t in sorted(self.parts.items()))
            raise CorruptError(f"the matrices of {self.where} have shapes {shapes}", expected="[r, in] and [out, r]")
        if (shape is not None and math.prod(own) != math.prod(shape)) or (shape is not None and own[0] != shape[0]):
            raise CorruptError(
                f"{self.where} changes a weight of shape {own}",
                expected=str(tuple(shape)),
                remedy="Take the LoRA that was made for this base.",
            )
        if shape is not None and self.kind in ("LoRA", "diff") and _plain(own) != _plain(shape):
            raise CorruptError(
                f"{self.where} changes a weight of shape {own}",
                expected=str(tuple(shape)),
                remedy="Take the LoRA that was made for this base.",
            )
        if self.magnitude is not None and shape is not None and math.prod(self.magnitude.shape) not in shape[:2]:
            raise CorruptError(
                f"the magnitude of {self.where} has shape {self.magnitude.shape}", expected=f"{shape[0]} numbers"
            )

    def _matrices_fit(self) -> bool:
        down, up = self.parts["down"].shape, self.parts["up"].shape
        if len(down) < 2 or len(up) < 2 or math.prod(up[2:]) != 1:
            return False
        if "mid" in self.parts:
            mid = self.parts["mid"].shape
            return len(mid) == 4 and mid[0] == up[1] and mid[1] == down[0] and math.prod(down[2:]) == 1
        return up[1] == down[0]


def _plain(shape: tuple[int, ...]) -> list[int]:
    return [d for d in shape if d != 1]
