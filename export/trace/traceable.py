"""What is traced: a module with the names and shapes of its tensors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ...engines.base import TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Traceable:
    """A module with example inputs (batch 2) and the names of its tensors and of their dimensions."""

    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    example: dict[str, int]
