"""What is lowered together: each layer for itself where there is time to try them all, else a block's, or all."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..engines.graph.quantized import IntegerLayer
from .forms import IntegerForm

SIZES = ("layer", "block", "component")
_BLOCK = re.compile(r"(.*?\b(?:resnets|attentions|downsamplers|upsamplers)\.\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGroup:
    """Layers of a component that are lowered together."""

    component: str
    name: str
    form: IntegerForm
    layers: tuple[IntegerLayer, ...]


def group_layers(
    layers: Mapping[str, Sequence[IntegerLayer]], *, by: str, steps: Sequence[IntegerForm]
) -> list[LayerGroup]:
    """The groups of all components, in the order of their graphs, for each form those layers that it takes.

    by: of `SIZES`.
    """
    groups: dict[tuple[IntegerForm, str, str], list[IntegerLayer]] = {}
    for form in steps:
        for component, own in layers.items():
            for layer in own:
                if form.takes(layer):
                    groups.setdefault((form, component, _name(layer, by)), []).append(layer)
    return [LayerGroup(form=f, component=c, name=n, layers=tuple(own)) for (f, c, n), own in groups.items()]


def _name(layer: IntegerLayer, by: str) -> str:
    if by == "component":
        return "all"
    block = _BLOCK.match(layer.module) if by == "block" else None
    return layer.module if block is None else f"{block[1]} {layer.kind}"
