"""The bundle: a folder with graphs, weights, tokenizers, and `bundle.json`, which says what they are and whence."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import ArgumentError, CorruptError, MissingError, UnknownNameError, UnsafeFileError
from .families import Condition, Family, all_families, find_family
from .places import put_back

FORMAT = 1
MANIFEST = "bundle.json"
OPTIONAL = "vae_encoder"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9._-]+")


DTYPES = ("float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One input or output: its name, its dtype, and its shape.

    A dimension is a number, a name (`"rows"`), or a multiple of a name (`"height*8"`).
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ArgumentError(
                f"tensor {self.name!r} has dtype {self.dtype!r}", expected=f"one of {', '.join(DTYPES)}"
            )

    def resolve(self, dims: Mapping[str, int]) -> tuple[int, ...]:
        """The shape in numbers, given a number for each named dimension; `ArgumentError` if one is missing."""
        return tuple(resolve_dimension(d, dims, self.name) for d in self.shape)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TensorSpec:
        return cls(name=str(data["name"]), dtype=str(data["dtype"]), shape=tuple(data["shape"]))


def resolve_dimension(dimension: int | str, dims: Mapping[str, int], tensor: str) -> int:
    """A dimension in numbers: `3`, `"rows"` or `"height*8"`."""
    if isinstance(dimension, int):
        return dimension
    name, _, factor = dimension.partition("*")
    if name not in dims:
        raise ArgumentError(
            f"no size is given for dimension {name!r} of tensor {tensor!r}", expected=f"{name}=<integer>"
        )
    return dims[name] * (int(factor) if factor else 1)


def _require(ok: bool, field: str, value: object, expected: str) -> None:
    if not ok:
        raise CorruptError(
            f"{MANIFEST} states {field} = {str(value)[:80]!r}", expected=expected, remedy="Export the checkpoint again."
        )


def _count(field: str, value: object, low: int = 1) -> None:
    ok = isinstance(value, int) and not isinstance(value, bool) and low <= value < 2**31
    _require(ok, field, value, f"an integer of at least {low}")


def _text(field: str, value: object, pattern: re.Pattern[str] | None = None) -> None:
    _require(isinstance(value, str) and bool(value), field, value, "a text")
    if pattern is not None:
        _require(bool(pattern.fullmatch(str(value))), field, value, f"a text like {pattern.pattern}")


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
        for name in ("graph", "weights", "graph_key", "dtype"):
            _text(f"a component's {name}", getattr(self, name))
        for name in ("graph_sha256", "weights_sha256"):
            _text(f"a component's {name}", getattr(self, name), _SHA256)
        for name in ("config", "operators", "source"):
            _require(
                isinstance(getattr(self, name), Mapping), f"a component's {name}", getattr(self, name), "an object"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizer:
    """A `tokenizer.json` in the bundle, the length its encoder takes, and the token that fills the rest.

    Bundles of older exports do not state its SHA-256.
    """

    file: str
    length: int
    pad_id: int
    bos_id: int
    eos_id: int
    sha256: str | None = None

    def __post_init__(self) -> None:
        _text("a tokenizer's file", self.file)
        _count("a tokenizer's length", self.length, 3)
        for name in ("pad_id", "bos_id", "eos_id"):
            _count(f"a tokenizer's {name}", getattr(self, name), 0)
        if self.sha256 is not None:
            _text("a tokenizer's sha256", self.sha256, _SHA256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Latent:
    """The latent's geometry: channels, pixels per cell, and the multiple that the UNet asks of height and width.

    The multiple is 1 where the UNet's graph interpolates to whatever size its skip connections have.
    """

    channels: int
    factor: int
    multiple: int

    @property
    def unit(self) -> int:
        """Pixels of which a picture's width and height are multiples."""
        return self.factor * self.multiple

    def __post_init__(self) -> None:
        for name in ("channels", "factor", "multiple"):
            _count(f"the latent's {name}", getattr(self, name))


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
            _count(f"the default {name}", getattr(self, name))
        number = isinstance(self.guidance, (int, float)) and not isinstance(self.guidance, bool)
        _require(number and math.isfinite(self.guidance), "the default guidance", self.guidance, "a finite number")
        for name in ("sampler", "schedule", "preset"):
            if getattr(self, name) is not None:
                _text(f"the default {name}", getattr(self, name))
        _require(isinstance(self.options, Mapping), "the default options", self.options, "an object")
        for name, value in self.options.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            _require(number, f"the sampler's default {name}", value, "a finite number")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A bundle on disk. `scheduler` is the checkpoint's diffusers scheduler configuration, word for word."""

    folder: Path
    name: str
    family: str
    components: Mapping[str, Component]
    tokenizers: tuple[Tokenizer, ...]
    latent: Latent
    scheduler: Mapping[str, Any]
    defaults: Defaults
    force_zeros: bool = False
    guidance_embedding: int = 0
    licence: str | None = None
    source: Mapping[str, Any] = field(default_factory=dict)
    gate: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        families = [f.name for f in all_families()]
        if self.family not in families:
            raise CorruptError(f"{MANIFEST} names the family {self.family!r}", expected=f"one of {', '.join(families)}")
        for required in self.model.components:
            if required not in self.components and required != OPTIONAL:
                raise CorruptError(f"{MANIFEST} has no component {required!r}", remedy="Export the checkpoint again.")
        _require(isinstance(self.scheduler, Mapping), "the scheduler", self.scheduler, "a scheduler's configuration")
        _text("the scheduler's _class_name", self.scheduler.get("_class_name"))
        encoders = [self.components[n] for n in self.text_encoders]
        lengths = [e.inputs[0].shape[-1] for e in encoders if e.inputs]
        stated = [t.length for t in self.tokenizers]
        _require(stated == lengths, "the tokenizers' lengths", stated, f"{lengths}, as the text encoders take")

    def path(self, name: str) -> Path:
        """The path of a file that the manifest names; `UnsafeFileError` if it leaves the folder or is a link."""
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name in {".", ".."}:
            raise UnsafeFileError(f"{MANIFEST} names the file {name!r}", expected="a plain name inside the bundle")
        path = self.folder / name
        if path.is_symlink():
            raise UnsafeFileError(
                f"{name} in the bundle is a link", expected="a regular file", remedy="Copy the file there."
            )
        if not path.is_file():
            raise MissingError(f"the bundle has no file {name!r}", remedy="Export the checkpoint again.")
        return path

    def component(self, name: str) -> Component:
        """The component of this name; `UnknownNameError` for a word that is none, `MissingError` where it is absent."""
        if name not in self.components and not any(name in f.components for f in all_families()):
            raise UnknownNameError("component", name, self.components)
        if name not in self.components:
            raise MissingError(
                f"the bundle {self.name!r} has no component {name!r}",
                expected=f"one of {', '.join(self.components)}",
                remedy="Export the checkpoint again with this component.",
            )
        return self.components[name]

    @property
    def model(self) -> Family:
        """What its family says of itself."""
        return find_family(self.family)

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """The names of its text encoders, in the order in which their outputs are joined."""
        return tuple(e.name for e in self.model.text_encoders)

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """What its UNet is told besides latent and timestep."""
        return self.model.conditions(self.component("unet").config)

    @property
    def noise_config(self) -> Mapping[str, Any]:
        """The scheduler's configuration, with what the preset says the network predicts."""
        own = self.defaults.prediction
        return {**self.scheduler, "prediction_type": own} if own else self.scheduler

    def to_json(self) -> dict[str, Any]:
        """The manifest as JSON data; the folder is left out."""
        return {
            "format": FORMAT,
            "name": self.name,
            "family": self.family,
            "components": {n: _component_json(c) for n, c in self.components.items()},
            "tokenizers": [{k: getattr(t, k) for k in Tokenizer.__slots__} for t in self.tokenizers],
            "latent": {k: getattr(self.latent, k) for k in Latent.__slots__},
            "scheduler": {k: v for k, v in self.scheduler.items() if not _is_infinite(v)},
            "defaults": {k: getattr(self.defaults, k) for k in Defaults.__slots__},
            "force_zeros": self.force_zeros,
            "guidance_embedding": self.guidance_embedding,
            "licence": self.licence,
            "source": dict(self.source),
            "gate": dict(self.gate),
        }


def _is_infinite(value: object) -> bool:
    """diffusers writes "no clipping" as -Infinity, which is not JSON; left out, it is the default it stands for."""
    return isinstance(value, float) and not math.isfinite(value)


def _component_json(component: Component) -> dict[str, Any]:
    data = {k: getattr(component, k) for k in Component.__slots__}
    data["inputs"] = [s.to_json() for s in component.inputs]
    data["outputs"] = [s.to_json() for s in component.outputs]
    return data


def _component(data: Mapping[str, Any]) -> Component:
    fields = {k: data[k] for k in Component.__slots__ if k in data}
    fields["inputs"] = tuple(TensorSpec.from_json(s) for s in data["inputs"])
    fields["outputs"] = tuple(TensorSpec.from_json(s) for s in data["outputs"])
    return Component(**fields)


def read_defaults(data: Mapping[str, Any]) -> Defaults:
    """Defaults from JSON, where timesteps are a list of whole numbers."""
    timesteps, prediction = data.get("timesteps"), data.get("prediction")
    if timesteps is not None and not (
        isinstance(timesteps, (list, tuple))
        and timesteps
        and all(isinstance(t, int) and not isinstance(t, bool) and t >= 0 for t in timesteps)
    ):
        raise CorruptError(f"the default timesteps are {str(timesteps)[:60]}", expected="a list of whole numbers")
    if prediction not in (None, "epsilon", "v_prediction", "sample"):
        raise CorruptError(
            f"the default prediction is {str(prediction)[:60]!r}", expected="epsilon, v_prediction or sample"
        )
    unknown = sorted(set(data) - set(Defaults.__slots__))
    if unknown:
        raise CorruptError(f"the defaults state {', '.join(unknown)}", expected=f"only {', '.join(Defaults.__slots__)}")
    return Defaults(**{**data, "timesteps": None if timesteps is None else tuple(timesteps)})


def read_bundle(folder: str | os.PathLike[str]) -> Bundle:
    """Read `bundle.json`.

    A bundle that a killed export had put aside is put back first (`places.py`). Raises `MissingError` when there is
    none, `CorruptError` when it is not a manifest of this format.
    """
    root = Path(folder)
    manifest = root / MANIFEST
    if not manifest.is_file() and not put_back(root.absolute()):
        raise MissingError(
            f"no bundle in {str(folder)!r}",
            expected=f"a folder with {MANIFEST}",
            remedy="Make one with: fewstep export CHECKPOINT FOLDER",
        )
    try:
        data = json.loads(manifest.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise CorruptError(f"{MANIFEST} is not JSON: {error}", remedy="Export the checkpoint again.") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        stated = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise CorruptError(
            f"{MANIFEST} has format {stated!r}", expected=str(FORMAT), remedy="Export the checkpoint again."
        )
    try:
        return Bundle(
            folder=root,
            name=str(data["name"]),
            family=data["family"],
            components={n: _component(c) for n, c in data["components"].items()},
            tokenizers=tuple(Tokenizer(**t) for t in data["tokenizers"]),
            latent=Latent(**data["latent"]),
            scheduler=data["scheduler"],
            defaults=read_defaults(data["defaults"]),
            force_zeros=bool(data["force_zeros"]),
            guidance_embedding=int(data["guidance_embedding"]),
            licence=data["licence"],
            source=data["source"],
            gate=data["gate"],
        )
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, RecursionError, ArgumentError) as error:
        raise CorruptError(f"{MANIFEST} lacks or misstates {error}", remedy="Export the checkpoint again.") from error


def write_manifest(bundle: Bundle) -> None:
    """Write `bundle.json` into the bundle's folder, whole or not at all."""
    path = bundle.folder / MANIFEST
    part = path.with_name(f".{MANIFEST}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            json.dump(bundle.to_json(), file, indent=1, ensure_ascii=False, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
