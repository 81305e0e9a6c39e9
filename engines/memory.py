"""Memory a bundle needs, by stage: predicted from its configuration before anything is loaded, and the largest batch.

A stage holds its weights, its inputs and outputs, and at its peak some intermediate results. For those a simple count
is made of the largest tensors that must be alive at once: at the UNet's first level all skip connections and a few
working copies, at the decoder's last level a few copies of its widest picture; and on the CPU, where attention writes
its scores out and convolutions unfold their input, these too. It is an estimate; `fewstep memory` measures beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..bundle import Bundle, Component
from .base import TensorSpec

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "uint8": 1, "bool": 1}
WORKING_COPIES = 4
"""Copies of the widest tensor that are alive at once: input, normalised, convolved, and the residual."""
UNFOLDED = 9
"""Values for each input of a 3x3 convolution when its input is unfolded."""
SCORES = 2
"""Matrices of attention scores alive at once: before the softmax, and after it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """Bytes of one stage for one batch: of weights, of inputs and outputs, and of intermediate results at the peak."""

    component: str
    weights: int
    buffers: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.buffers + self.activations

    def to_json(self) -> dict[str, int | str]:
        return {n: getattr(self, n) for n in ("component", "weights", "buffers", "activations", "total")}


def dims_for(bundle: Bundle, size: tuple[int, int], batch: int) -> dict[str, int]:
    """The dimensions of an evaluation for so many images of (width, height) pixels, with guidance if it is usual."""
    factor = bundle.latent.factor
    rows = 2 * batch if bundle.defaults.guidance > 1 else batch
    dims = {"rows": rows, "prompts": rows, "batch": batch, "tokens": bundle.tokenizers[0].length}
    return dims | {"height": size[1] // factor, "width": size[0] // factor}


def stages_of(bundle: Bundle) -> list[str]:
    """The components that every request runs, in their order."""
    return [n for n in bundle.model.components if n in bundle.components and n != "vae_encoder"]


def predict_stage(bundle: Bundle, name: str, dims: Mapping[str, int], *, on_cpu: bool = True) -> StageMemory:
    """The estimate for one component."""
    part = bundle.component(name)
    return StageMemory(
        component=name,
        weights=bundle.path(part.weights).stat().st_size,
        buffers=sum(_bytes(s, dims) for s in (*part.inputs, *part.outputs)),
        activations=_activations(name, part, dims, on_cpu) * BYTES[part.dtype],
    )


def predict(bundle: Bundle, size: tuple[int, int], batch: int, *, on_cpu: bool = True) -> list[StageMemory]:
    """The estimate for each stage of making images."""
    dims = dims_for(bundle, size, batch)
    return [predict_stage(bundle, n, dims, on_cpu=on_cpu) for n in stages_of(bundle)]


def predicted_peak(
    bundle: Bundle, size: tuple[int, int], batch: int, *, loaded: bool = False, on_cpu: bool = True
) -> int:
    """All weights and buffers, and the intermediate results of the stage that has most; `loaded`: without weights."""
    stages = predict(bundle, size, batch, on_cpu=on_cpu)
    lasting = sum(s.buffers + (0 if loaded else s.weights) for s in stages)
    return lasting + max(s.activations for s in stages)


def largest_batch(
    bundle: Bundle,
    size: tuple[int, int],
    *,
    free_bytes: int,
    loaded: bool = False,
    on_cpu: bool = True,
    most: int = 1024,
) -> int:
    """How many images at once fit into so much memory by the estimate; 0 when not even one does."""
    fitting = 0
    while fitting < most:
        if predicted_peak(bundle, size, fitting + 1, loaded=loaded, on_cpu=on_cpu) > free_bytes:
            break
        fitting += 1
    return fitting


def _bytes(spec: TensorSpec, dims: Mapping[str, int]) -> int:
    count = BYTES[spec.dtype]
    for size in spec.resolve(dims):
        count *= size
    return count


def _activations(name: str, part: Component, dims: Mapping[str, int], on_cpu: bool) -> int:
    """Elements of intermediate results at the peak."""
    config: Mapping[str, Any] = part.config
    if name.startswith("text_encoder"):
        length, width = int(config["max_position_embeddings"]), int(config["hidden_size"])
        inner = int(config.get("intermediate_size", 4 * width))
        heads = int(config.get("num_attention_heads", 1))
        return dims["prompts"] * (length * (inner + WORKING_COPIES * width) + heads * length * length)
    channels = [int(c) for c in config["block_out_channels"]]
    layers = int(config.get("layers_per_block", 1))
    cells = dims["height"] * dims["width"]
    levels = [-(-dims["height"] >> i) * -(-dims["width"] >> i) for i in range(len(channels))]
    if name == "unet":
        skips = sum((layers + 1) * c * levels[i] for i, c in enumerate(channels))
        widest = max((c + channels[max(i - 1, 0)]) * levels[i] for i, c in enumerate(channels))
        written = max(UNFOLDED * widest, SCORES * _scores(config, levels)) if on_cpu else 0
        return dims["rows"] * (skips + WORKING_COPIES * widest + written)
    pixels = cells << 2 * (len(channels) - 1)
    widest = pixels * channels[min(1, len(channels) - 1)]  # the last level but one is upsampled before it is narrowed
    written = max(UNFOLDED * widest, SCORES * cells * cells) if on_cpu else 0
    return dims["batch"] * (WORKING_COPIES * widest + written)


def _scores(config: Mapping[str, Any], levels: list[int]) -> int:
    """Elements of the largest matrix of attention scores, of all heads."""
    heads = config.get("num_attention_heads") or config.get("attention_head_dim") or 1
    by_level = [int(h) for h in heads] if isinstance(heads, (list, tuple)) else [int(heads)] * len(levels)
    kinds = list(config.get("down_block_types", ()))
    return max((by_level[i] * n * n for i, n in enumerate(levels) if i < len(kinds) and "Attn" in kinds[i]), default=0)
