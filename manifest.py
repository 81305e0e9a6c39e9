"""The parts of a bundle's manifest: components, tokenizers, geometry, defaults, and what was found for a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .tensors import TensorSpec
from .values import Reader

MANIFEST = "bundle.json"
MOST_FRAMES = 1024
PRECISIONS = ("float32", "float16", "bfloat16")
LOWERED = ("int8", "fp8", "int8-weights", "int4-weights")
"""Of some layers of a component, found under a budget: weights and activations, or weights alone."""
SHA256 = re.compile(r"[0-9a-f]{64}")


READING = Reader(place=MANIFEST, remedy="Export the checkpoint again.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """One exported part: its graph and weights (file names in the bundle), their SHA-256, its tensors.

    `graph_key` names the traced graph (a hash of the configuration), `dtype` is the precision it computes in;
    inputs and outputs are float32 whatever that is. `operators` counts the nodes of the graph by operator.
    """

    graph: str
    weights: str
    graph_sha256: str
    weights_sha256: str
    graph_key: str
    dtype: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    operators: Mapping[str, int] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("graph", "weights", "graph_key"):
            READING.text(f"a component's {name}", getattr(self, name))
        READING.choice("a component's dtype", self.dtype, (*PRECISIONS, *LOWERED))
        for name in ("graph_sha256", "weights_sha256"):
            READING.text(f"a component's {name}", getattr(self, name), SHA256)
        for name in ("config", "operators", "source"):
            READING.mapping(f"a component's {name}", getattr(self, name))
        for name, count in self.operators.items():
            READING.integer(f"a component's operators of kind {name}", count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizer:
    """A `tokenizer.json` in the bundle, the length its encoder takes, and the token that fills the rest.

    T5's have no token for the beginning. Bundles of older exports do not state its SHA-256.
    """

    file: str
    length: int
    pad_id: int
    bos_id: int | None
    eos_id: int
    sha256: str | None = None

    def __post_init__(self) -> None:
        READING.text("a tokenizer's file", self.file)
        READING.integer("a tokenizer's length", self.length, 3, 2**16)
        for name in self.ids:
            READING.integer(f"a tokenizer's {name}", getattr(self, name))
        if self.sha256 is not None:
            READING.text("a tokenizer's sha256", self.sha256, SHA256)

    @property
    def ids(self) -> dict[str, int]:
        """The tokens beside a prompt's own, by what they are for."""
        begin = {} if self.bos_id is None else {"bos_id": self.bos_id}
        return {"pad_id": self.pad_id, **begin, "eos_id": self.eos_id}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSchedules:
    """Found schedules that a bundle holds: their sampler, the file in the bundle, and its SHA-256."""

    sampler: str
    file: str
    sha256: str

    def __post_init__(self) -> None:
        READING.text("a schedule's sampler", self.sampler, most=64)
        READING.text("a schedule's file", self.file, most=255)
        READING.text("a schedule's sha256", self.sha256, SHA256)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPrecision:
    """Components with some layers in fewer bits, instead of those of the same names, where a budget allows them.

    precision: of these layers. budget: what was asked for. psnr: what pictures that were not searched on reached, in
    dB, to those of the plain components; worst: the farthest of them. file: the table of what was found, in the
    bundle, and its SHA-256.
    """

    precision: str
    budget: str
    psnr: float
    worst: float
    file: str
    sha256: str
    components: Mapping[str, Component]

    def __post_init__(self) -> None:
        READING.choice("a lowered precision", self.precision, LOWERED)
        READING.text("a precision's budget", self.budget, most=64)
        for name in ("psnr", "worst"):
            READING.number(f"a precision's {name}", getattr(self, name))
        READING.text("a precision's file", self.file, most=255)
        READING.text("a precision's sha256", self.sha256, SHA256)
        for name, component in self.components.items():
            READING.choice(f"the precision of a lowered {name}", component.dtype, (self.precision,))


@dataclass(frozen=True, slots=True, kw_only=True)
class Latent:
    """The latent's geometry: channels, pixels per cell, and the multiple that the UNet asks of height and width.

    The multiple is 1 where the UNet's graph interpolates to whatever size its skip connections have. frames: how many
    a clip has at most, and by default; 0 where pictures are made.
    """

    channels: int
    factor: int
    multiple: int
    frames: int = 0

    @property
    def unit(self) -> int:
        """Pixels of which a picture's width and height are multiples."""
        return self.factor * self.multiple

    def __post_init__(self) -> None:
        for name in ("channels", "factor", "multiple"):
            READING.integer(f"the latent's {name}", getattr(self, name), 1, 2**16)
        READING.integer("the latent's frames", self.frames, 0, MOST_FRAMES)

    def to_json(self) -> dict[str, int]:
        stated = {k: getattr(self, k) for k in Latent.__slots__}
        return stated if self.frames else {k: v for k, v in stated.items() if k != "frames"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What a request without options gets; `None` for sampler and schedule means the checkpoint's own scheduler.

    `timesteps` are fed for as many steps where no others are asked for; `prediction`, if given, replaces what the
    scheduler's configuration says the network returns. `options` are the sampler's, like `{"eta": 1.0}` for TCD; what
    a request asks for goes before them.
    """

    width: int
    height: int
    steps: int
    guidance: float
    sampler: str | None = None
    schedule: str | None = None
    preset: str | None = None
    timesteps: tuple[int, ...] | None = None
    prediction: str | None = None
    options: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("width", "height", "steps"):
            READING.integer(f"the default {name}", getattr(self, name), 1)
        READING.number("the default guidance", self.guidance)
        for name in ("sampler", "schedule", "preset"):
            if getattr(self, name) is not None:
                READING.text(f"the default {name}", getattr(self, name), most=256)
        if self.prediction is not None:
            READING.choice("the default prediction", self.prediction, ("epsilon", "v_prediction", "sample"))
        if self.timesteps is not None:
            for timestep in READING.array("the default timesteps", self.timesteps, 1, 1000):
                READING.integer("a default timestep", timestep)
        for name, value in READING.mapping("the default options", self.options).items():
            READING.number(f"the sampler's default {name}", value)


def component_json(component: Component) -> dict[str, Any]:
    """A component as JSON data."""
    data = {k: getattr(component, k) for k in Component.__slots__}
    data["inputs"] = [s.to_json() for s in component.inputs]
    data["outputs"] = [s.to_json() for s in component.outputs]
    return data


def precision_json(stored: StoredPrecision) -> dict[str, Any]:
    """Lowered components as JSON data."""
    data = {k: getattr(stored, k) for k in StoredPrecision.__slots__}
    return {**data, "components": {n: component_json(c) for n, c in stored.components.items()}}


def read_precision(data: Any) -> StoredPrecision:
    """Lowered components from JSON; `CorruptError`."""
    data = READING.mapping("a precision", data)
    components = READING.mapping("a precision's components", data.get("components"))
    return StoredPrecision(**{**data, "components": {n: read_component(c) for n, c in components.items()}})


def read_component(data: Any) -> Component:
    """A component from JSON; `CorruptError`."""
    data = READING.mapping("a component", data)
    fields = {k: data[k] for k in Component.__slots__ if k in data}
    for side in ("inputs", "outputs"):
        stated = READING.array(f"a component's {side}", data.get(side), 1, 64)
        fields[side] = tuple(TensorSpec.from_json(s, READING) for s in stated)
    return Component(**fields)


def read_defaults(data: Mapping[str, Any]) -> Defaults:
    """Defaults from JSON, where timesteps are a list of whole numbers."""
    unknown = sorted(set(READING.mapping("the defaults", data)) - set(Defaults.__slots__))
    if unknown:
        raise READING.wrong("the defaults", unknown, f"only {', '.join(Defaults.__slots__)}")
    timesteps = data.get("timesteps")
    if timesteps is not None:
        timesteps = tuple(READING.array("the default timesteps", timesteps, 1, 1000))
    return Defaults(**{**data, "timesteps": timesteps})
