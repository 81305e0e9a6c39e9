"""Low-rank changes of torch modules, as inputs beside their own: what `engines/graph/low_rank.py` does to a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from ..engines.graph.low_rank import DOWN, EXTRA_WORDS, UP, Layer


class LowRankModule(torch.nn.Module):
    """A module whose layers are changed by rows: y + up (down x).

    lora_down: float32 [rows, I, rank], lora_up: float32 [rows, rank, O], packed as the layers say, and for a text
    encoder of a vocabulary extra_words: float32 [words, D]. The forward pass takes them beside the module's own
    arguments. Hooks on the layers hold what the pass was given, so that two threads must not run one module.
    """

    def __init__(self, module: torch.nn.Module, layers: Sequence[Layer], vocabulary: int | None = None) -> None:
        super().__init__()
        self.module = module
        self._down: Any = None
        self._up: Any = None
        self._words: Any = None
        self._ids: Any = None
        self._vocabulary = vocabulary
        if vocabulary is not None:
            table = next(m for n, m in module.named_modules() if n.endswith("token_embedding"))
            table.register_forward_pre_hook(lambda own, given: (given[0].clamp(max=vocabulary - 1),))
            table.register_forward_hook(self._look_up)
        for layer in layers:
            module.get_submodule(f"model.{layer.module}").register_forward_hook(self._change(layer))

    def forward(self, **given: Any) -> Any:
        self._down, self._up = given.pop(DOWN), given.pop(UP)
        self._words = given.pop(EXTRA_WORDS, None)
        self._ids = given.get("input_ids")
        return self.module(**given)

    def _look_up(self, module: torch.nn.Module, given: Any, own: Any) -> Any:
        """Rows of the words where ids are beyond the table."""
        behind = self._ids - self._vocabulary
        words = self._words.to(own.dtype)[behind.clamp(min=0)]
        return torch.where((behind >= 0)[..., None], words, own)

    def _change(self, layer: Layer) -> Callable[..., Any]:
        def hook(module: torch.nn.Module, given: tuple[Any, ...], own: Any) -> Any:
            x = given[0]
            down = self._down[:, layer.down : layer.down + layer.height].to(x.dtype)
            up = self._up[:, :, layer.up : layer.up + layer.width].to(x.dtype)
            if len(layer.shape) == 4:
                wide, high = layer.shape[2:], layer.shape[1]
                # rows of `down` are ordered by (kh, kw, in), what `unfold` gives by (in, kh, kw)
                down = down.unflatten(1, (*wide, high)).permute(0, 3, 1, 2, 4).flatten(1, 3)
                patches = functional.unfold(x, wide, padding=module.padding, stride=module.stride)
                change = up.transpose(1, 2) @ (down.transpose(1, 2) @ patches)
            elif x.ndim == 2:
                change = (x[:, None] @ down @ up)[:, 0]
            else:
                change = x @ down @ up
            return own + change.reshape(own.shape)

        return hook
