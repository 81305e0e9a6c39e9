"""What each precision does to a layer, and in which steps a search goes down to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..engines.graph.quantized import IntegerLayer
from ..engines.graph.weight_only import BLOCK, takes_blocks

Lowered = Sequence[tuple[str, IntegerLayer]]
"""Layers with the form that each is to have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerForm:
    """What becomes of a layer: bits of its weights, whether what it reads is lowered too, and whether to floats."""

    name: str
    bits: int
    activations: bool = False
    floating: bool = False

    def takes(self, layer: IntegerLayer) -> bool:
        return self.bits == 8 or takes_blocks(layer)

    def stored_bytes(self, layer: IntegerLayer) -> float:
        """Of its weight with the scales."""
        weights = float(math.prod(layer.shape))
        return weights + 4.0 * layer.shape[0] if self.bits == 8 else weights * (0.5 + 4.0 / BLOCK)


INT8 = IntegerForm(name="int8", bits=8, activations=True)
FP8 = IntegerForm(name="fp8", bits=8, activations=True, floating=True)
INT8_WEIGHTS = IntegerForm(name="int8-weights", bits=8)
INT4_WEIGHTS = IntegerForm(name="int4-weights", bits=4)
FORMS = {f.name: f for f in (INT8, FP8, INT8_WEIGHTS, INT4_WEIGHTS)}
STEPS = {
    INT8.name: (INT8,),
    FP8.name: (FP8,),
    INT8_WEIGHTS.name: (INT8_WEIGHTS,),
    INT4_WEIGHTS.name: (INT8_WEIGHTS, INT4_WEIGHTS),
}
"""The forms that a search for a precision gives layers, the milder first."""


def bytes_saved(form: IntegerForm, steps: Sequence[IntegerForm], layer: IntegerLayer) -> float:
    """By this form, beside the step before it: float32 before the first."""
    at = steps.index(form)
    before = 4.0 * math.prod(layer.shape) if at == 0 else steps[at - 1].stored_bytes(layer)
    return before - form.stored_bytes(layer)
