"""Memory a bundle needs, by stage: predicted from its configuration before anything is loaded, and the largest batch.

A stage holds its weights, its inputs and outputs, and at its peak some intermediate results. For those a simple count
is made of the largest tensors that must be alive at once: at the UNet's first level all skip connections and a few
working copies or what a transformer block has, at the decoder's last level a few copies of its widest picture.

The rest is ONNX Runtime on the CPU as it was measured: weights are held twice, as they came and packed for products;
while an engine is opened there are more copies; and an arena plans as much memory again as is used at once. Attention
works by blocks of scores, except where the bundle's default size has so few that writing all is faster: those scores
are there at any size. The estimate is within `WITHIN` of what `fewstep memory` measures beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..bundle import LOWERED, Bundle, Component
from ..families.control import controls_of
from ..families.image_prompt import IMAGE_ENCODER
from .base import TensorSpec
from .graph.low_rank import RANK
from .graph.rewrite import FEW_SCORES
from .low_rank import bucket, with_low_rank
from .profile import profiles_for

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "uint8": 1, "bool": 1}
WITHIN = 1.6
"""How far an estimate for the CPU and a measurement may lie apart, as a factor: of any stage, in the tests."""
WORKING_COPIES = 4
"""Copies of the widest tensor that are alive at once: input, normalised, convolved, and the residual."""
BLOCK_COPIES = 30
"""Of a transformer block's states: residual, queries, keys, values, their heads, the wide unit and its halves."""
PLANNED = 2
"""Times what is used at once, on the CPU: what the arena got on the first run, and the plan made from that."""
SCORES = 2
"""Matrices of attention scores alive at once: before the softmax, and after it."""
HELD, OPENING = 2, 4
"""Copies of the weights on the CPU: while an engine runs, and while it is opened."""
ADAPTED = "unet with LoRAs"
"""The stage of images with LoRAs: another engine of the UNet, beside the plain one (`engines/low_rank.py`)."""
LIBRARY = 30_000_000
"""Bytes that ONNX Runtime takes for itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """Bytes of one stage for one batch: of weights, of inputs and outputs, and of intermediate results at the peak.

    opening: of what is there while its engine is opened, instead of these. library: of the backend's own, once a
    process.
    """

    component: str
    weights: int
    buffers: int
    activations: int
    opening: int = 0
    library: int = 0

    @property
    def total(self) -> int:
        return self.library + max(self.opening, self.weights + self.buffers + self.activations)

    def to_json(self) -> dict[str, int | str]:
        return {
            n: getattr(self, n)
            for n in ("component", "weights", "buffers", "activations", "opening", "library", "total")
        }


def dims_for(bundle: Bundle, size: tuple[int, int], batch: int) -> dict[str, int]:
    """The dimensions of an evaluation for so many images of (width, height) pixels, with guidance if it is usual."""
    factor = bundle.latent.factor
    rows = 2 * batch if bundle.defaults.guidance > 1 else batch
    dims = {"rows": rows, "prompts": rows, "batch": batch, "tokens": bundle.tokens}
    dims |= {"height": size[1] // factor, "width": size[0] // factor}
    frames = bundle.latent.frames
    return dims | ({"frames": frames, "chunk": frames} if frames else {})


def stages_of(bundle: Bundle) -> list[str]:
    """The components that every request runs, in their order."""
    optional = () if bundle.model.clips else ("vae_encoder",)
    return [n for n in bundle.model.components if n in bundle.components and n not in optional]


def predict_stage(bundle: Bundle, name: str, dims: Mapping[str, int], *, on_cpu: bool = True) -> StageMemory:
    """The estimate for one component."""
    part = bundle.component(name)
    stored = bundle.path(part.weights).stat().st_size
    scores = _written_scores(bundle, name, dims) if on_cpu else 0
    elements = _activations(name, part, dims) * (PLANNED if on_cpu else 1) + SCORES * scores
    return StageMemory(
        component=name,
        weights=stored * (HELD if on_cpu else 1),
        buffers=sum(_bytes(s, dims) for s in (*part.inputs, *part.outputs)),
        activations=elements * BYTES["float32" if part.dtype in LOWERED else part.dtype],
        opening=stored * OPENING if on_cpu else 0,
        library=LIBRARY if on_cpu else 0,
    )


def predict_adapted(bundle: Bundle, dims: Mapping[str, int], rank: int, *, on_cpu: bool = True) -> StageMemory:
    """The estimate for the engine of images with LoRAs of this rank, filled up as evaluations have it."""
    adapted = with_low_rank(bundle, "unet", kernels=False)
    stage = predict_stage(adapted, "unet", {**dims, RANK: bucket(rank)}, on_cpu=on_cpu)
    return replace(stage, component=ADAPTED)


def predict(
    bundle: Bundle, size: tuple[int, int], batch: int, *, on_cpu: bool = True, lora_rank: int | None = None
) -> list[StageMemory]:
    """The estimate for each stage of making images; with that of LoRAs of a rank, where there are any."""
    dims = dims_for(bundle, size, batch)
    stages = [predict_stage(bundle, n, dims, on_cpu=on_cpu) for n in stages_of(bundle)]
    return stages if lora_rank is None else [*stages, predict_adapted(bundle, dims, lora_rank, on_cpu=on_cpu)]


def predicted_peak(
    bundle: Bundle,
    size: tuple[int, int],
    batch: int,
    *,
    loaded: bool = False,
    on_cpu: bool = True,
    lora_rank: int | None = None,
) -> int:
    """All weights and buffers, and the intermediate results of the stage that has most.

    loaded: without what there is already: the library and the weights.
    """
    stages = predict(bundle, size, batch, on_cpu=on_cpu, lora_rank=lora_rank)
    lasting = sum(s.buffers for s in stages)
    if not loaded:
        lasting += max(s.library for s in stages) + sum(s.weights for s in stages)
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


def _activations(name: str, part: Component, dims: Mapping[str, int]) -> int:
    """Elements of intermediate results that are alive at once, without attention's scores."""
    config: Mapping[str, Any] = part.config
    if name.startswith("text_encoder"):
        length, width = int(config["max_position_embeddings"]), int(config["hidden_size"])
        inner = int(config.get("intermediate_size", 4 * width))
        heads = int(config.get("num_attention_heads", 1))
        return dims["prompts"] * (length * (inner + WORKING_COPIES * width) + heads * length * length)
    if name == IMAGE_ENCODER:
        length, width = 1 + (int(config["image_size"]) // int(config["patch_size"])) ** 2, int(config["hidden_size"])
        inner, heads = int(config.get("intermediate_size", 4 * width)), int(config.get("num_attention_heads", 1))
        return dims["batch"] * (length * (inner + WORKING_COPIES * width) + heads * length * length)
    channels = _channels(config)
    levels = _levels(channels, dims)
    if name != "unet":
        pixels = levels[0] << 2 * (len(channels) - 1)
        widest = pixels * channels[min(1, len(channels) - 1)]  # the last level but one is upsampled before it narrows
        return _pictures(name, dims) * WORKING_COPIES * widest
    layers = int(config.get("layers_per_block", 1))
    skips = sum((layers + 1) * c * levels[i] for i, c in enumerate(channels))
    # what controls add is as large as what is skipped; of several, the sum so far and one more are alive
    skips *= 1 + min(2, len(controls_of(config)))
    widest = max((c + channels[max(i - 1, 0)]) * levels[i] for i, c in enumerate(channels))
    states = max((channels[i] * levels[i] for i in _attending(config)), default=0)
    return _pictures(name, dims) * (skips + max(WORKING_COPIES * widest, BLOCK_COPIES * states))


def _pictures(name: str, dims: Mapping[str, int]) -> int:
    """How many pictures, or frames, a network works on at once."""
    if name == "unet":
        return dims["rows"] * dims.get("frames", 1)
    return dims["chunk"] if name == "vae_decoder" and "chunk" in dims else dims["batch"]


def _written_scores(bundle: Bundle, name: str, dims: Mapping[str, int]) -> int:
    """Elements of the largest matrix of scores, of all rows and heads, that attention writes to memory whole."""
    config: Mapping[str, Any] = bundle.component(name).config
    if name.startswith("text_encoder") or name == IMAGE_ENCODER:
        return 0  # a part of its activations
    channels, usual = _channels(config), profiles_for(bundle)[name][0].optimum
    asked, default = _levels(channels, dims), _levels(channels, usual)
    if name != "unet":
        return _written(_pictures(name, usual) * default[0] ** 2, _pictures(name, dims) * asked[0] ** 2)
    heads = config.get("num_attention_heads") or config.get("attention_head_dim") or 1
    of_usual, of_asked = _pictures(name, usual), _pictures(name, dims)
    by_level = [int(h) for h in heads] if isinstance(heads, (list, tuple)) else [int(heads)] * len(channels)
    return max(
        (
            _written(of_usual * by_level[i] * default[i] ** 2, of_asked * by_level[i] * asked[i] ** 2)
            for i in _attending(config)
        ),
        default=0,
    )


def _written(usual: int, asked: int) -> int:
    return asked if usual <= FEW_SCORES else 0


def _channels(config: Mapping[str, Any]) -> list[int]:
    return [int(c) for c in config["block_out_channels"]]


def _levels(channels: list[int], dims: Mapping[str, int]) -> list[int]:
    """Cells of each level of a UNet, the latent's first; of a decoder the first alone is meant."""
    return [-(-dims["height"] >> i) * -(-dims["width"] >> i) for i in range(len(channels))]


def _attending(config: Mapping[str, Any]) -> list[int]:
    """The levels of a UNet that have attention; the middle's cells are the last level's."""
    kinds = list(config.get("down_block_types", ()))
    middle = [len(kinds) - 1] if config.get("mid_block_type", "Attn") else []
    return sorted({i for i, kind in enumerate(kinds) if "Attn" in kind} | set(middle))
