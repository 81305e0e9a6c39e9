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

from .agreement import check_graphs, check_tokenizers
from .errors import CorruptError, FewstepError, MissingError, UnknownNameError, UnsafeFileError
from .families import Condition, Family, all_families, find_family
from .families.configs import check_config
from .families.image_prompt import IMAGE_ENCODER
from .places import put_back
from .schedules.keys import check_keys
from .schedules.noise import NoiseSchedule
from .tensors import TensorSpec as TensorSpec
from .tensors import resolve_dimension as resolve_dimension
from .values import Reader, read_json

FORMAT = 1
MANIFEST = "bundle.json"
OPTIONAL = "vae_encoder"
PRECISIONS = ("float32", "float16", "bfloat16")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9._-]{1,255}")


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
        READING.choice("a component's dtype", self.dtype, PRECISIONS)
        for name in ("graph_sha256", "weights_sha256"):
            READING.text(f"a component's {name}", getattr(self, name), _SHA256)
        for name in ("config", "operators", "source"):
            READING.mapping(f"a component's {name}", getattr(self, name))
        for name, count in self.operators.items():
            READING.integer(f"a component's operators of kind {name}", count)


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
        READING.text("a tokenizer's file", self.file)
        READING.integer("a tokenizer's length", self.length, 3, 2**16)
        for name in ("pad_id", "bos_id", "eos_id"):
            READING.integer(f"a tokenizer's {name}", getattr(self, name))
        if self.sha256 is not None:
            READING.text("a tokenizer's sha256", self.sha256, _SHA256)


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
            READING.integer(f"the latent's {name}", getattr(self, name), 1, 2**16)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A bundle on disk. `scheduler` is the checkpoint's diffusers scheduler configuration, word for word.

    `pipeline` is diffusers' class that the checkpoint names; bundles of older exports do not state it.
    """

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
    pipeline: str | None = None
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
        check_keys(READING.mapping("the scheduler", self.scheduler), READING)
        READING.text("the scheduler's _class_name", self.scheduler.get("_class_name"), most=64)
        READING.text("the name", self.name)
        READING.flag("force_zeros", self.force_zeros)
        READING.integer("guidance_embedding", self.guidance_embedding, 0, 2**16)
        if self.pipeline is not None:
            READING.choice("the pipeline", self.pipeline, self.model.pipelines)
        if self.licence is not None:
            READING.text("the licence", self.licence)
        READING.mapping("the source", self.source)
        _check_gate(self.gate)
        tokenizers = [(t.length, {k: getattr(t, k) for k in ("pad_id", "bos_id", "eos_id")}) for t in self.tokenizers]
        check_tokenizers(self.components, self.text_encoders, tokenizers, READING)

    def check_agreement(self) -> None:
        """Raise `CorruptError` where configurations or graphs are not what the rest of the manifest says they are."""
        for name, component in self.components.items():
            check_config(name, component.config, READING)
        try:
            NoiseSchedule.from_diffusers(self.noise_config)
        except FewstepError as error:
            raise CorruptError(f"the scheduler in {MANIFEST} is none: {error}", remedy=READING.remedy) from error
        latent = self.latent.channels, self.latent.factor
        check_graphs(self.components, self.model, latent, self.guidance_embedding, READING)

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

    def read_graph(self, component: Component) -> bytes:
        """The bytes of a component's graph, as they are."""
        return self.path(component.graph).read_bytes()

    def component(self, name: str) -> Component:
        """The component of this name; `UnknownNameError` for a word that is none, `MissingError` where it is absent."""
        known = {IMAGE_ENCODER, *(c for f in all_families() for c in f.components)}
        if name not in self.components and name not in known:
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
    def respaces(self) -> bool:
        """Whether diffusers' pipeline for it spaces the steps from a picture anew by its strength.

        Of a bundle that does not state its pipeline, the UNet's embedding of guidance tells.
        """
        if self.pipeline is None:
            return bool(self.guidance_embedding and self.model.respacing)
        return self.pipeline in self.model.respacing

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
            "pipeline": self.pipeline,
            "licence": self.licence,
            "source": dict(self.source),
            "gate": dict(self.gate),
        }


def _check_gate(gate: object) -> None:
    """What is read of the gate's findings: a status, and numbers by component."""
    stated = READING.mapping("the gate", gate)
    READING.text("the gate's status", stated.get("status", "unknown"))
    if "reference_sha256" in stated:
        READING.text("the gate's reference_sha256", stated["reference_sha256"], _SHA256)
    for name, found in READING.mapping("the gate's components", stated.get("components", {})).items():
        error = READING.mapping(f"the gate's {name}", found).get("worst_relative_l2")
        if error is not None:
            READING.number(f"the gate's worst_relative_l2 of {name}", error)


def _is_infinite(value: object) -> bool:
    """diffusers writes "no clipping" as -Infinity, which is not JSON; left out, it is the default it stands for."""
    return isinstance(value, float) and not math.isfinite(value)


def _component_json(component: Component) -> dict[str, Any]:
    data = {k: getattr(component, k) for k in Component.__slots__}
    data["inputs"] = [s.to_json() for s in component.inputs]
    data["outputs"] = [s.to_json() for s in component.outputs]
    return data


def _component(data: Any) -> Component:
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
    data = read_json(manifest, MANIFEST, remedy=READING.remedy, finite=True)
    if not isinstance(data, dict) or type(data.get("format")) is not int or data["format"] != FORMAT:
        stated = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise READING.wrong("format", stated, str(FORMAT))
    try:
        bundle = Bundle(
            folder=root,
            name=data["name"],
            family=READING.text("the family", data["family"], most=64),
            components={n: _component(c) for n, c in READING.mapping("the components", data["components"]).items()},
            tokenizers=tuple(
                Tokenizer(**READING.mapping("a tokenizer", t))
                for t in READING.array("the tokenizers", data["tokenizers"], 0, 8)
            ),
            latent=Latent(**READING.mapping("the latent", data["latent"])),
            scheduler=data["scheduler"],
            defaults=read_defaults(data["defaults"]),
            force_zeros=data["force_zeros"],
            guidance_embedding=data["guidance_embedding"],
            pipeline=data.get("pipeline"),
            licence=data["licence"],
            source=data["source"],
            gate=data["gate"],
        )
        bundle.check_agreement()
    except (KeyError, TypeError) as error:
        raise CorruptError(f"{MANIFEST} lacks or misstates {error}", remedy=READING.remedy) from error
    return bundle


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
