"""The bundle: a folder with graphs, weights, tokenizers, and `bundle.json`, which says what they are and whence."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from .agreement import check_graphs, check_tokenizers
from .errors import ArgumentError, CorruptError, FewstepError, MissingError, UnknownNameError, UnsafeFileError
from .families import Condition, Family, all_families, find_family
from .families.configs import check_config
from .families.decoders import TINY_DECODER
from .families.image_prompt import IMAGE_ENCODER
from .manifest import LOWERED as LOWERED
from .manifest import MANIFEST as MANIFEST
from .manifest import READING, SHA256, StoredSchedules, component_json, precision_json, read_component, read_precision
from .manifest import Component as Component
from .manifest import Defaults as Defaults
from .manifest import Latent as Latent
from .manifest import StoredPrecision as StoredPrecision
from .manifest import Tokenizer as Tokenizer
from .manifest import read_defaults as read_defaults
from .places import alone_with, put_back, write_whole, writing
from .precision import read_budget, split_budget
from .schedules.found import FoundSchedules, parse_schedules
from .schedules.keys import check_keys
from .schedules.noise import NoiseSchedule
from .tensors import TensorSpec as TensorSpec
from .tensors import resolve_dimension as resolve_dimension
from .values import MOST_BYTES, read_json

FORMAT = 1
USUAL_TOKENS = 77
OPTIONAL = "vae_encoder"
"""The component that a bundle can do without, where its family makes pictures."""
_NAME = re.compile(r"[A-Za-z0-9._-]{1,255}")
_OF_ONE_FILE = frozenset({"part", "files", "precision", "relative_l2"})
"""What the source of a component says to which nothing was added."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Bundle:
    """A bundle on disk. `scheduler` is the checkpoint's diffusers scheduler configuration, word for word.

    `pipeline` is diffusers' class that the checkpoint names; bundles of older exports do not state it. `noising` is the
    configuration of the scheduler that noises pictures which the UNet is told of. All text encoders may be absent.
    `precisions` are lowered components that it holds, and `lowered` those of them that `within` put in place.
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
    noising: Mapping[str, Any] = field(default_factory=dict)
    licence: str | None = None
    source: Mapping[str, Any] = field(default_factory=dict)
    gate: Mapping[str, Any] = field(default_factory=dict)
    schedules: tuple[StoredSchedules, ...] = ()
    precisions: tuple[StoredPrecision, ...] = ()
    lowered: StoredPrecision | None = None

    def __repr__(self) -> str:
        size = f"{self.defaults.width}x{self.defaults.height}"
        return f"<Bundle {self.name!r}: {self.model.title}, {size}, in {str(self.folder)!r}>"

    def __post_init__(self) -> None:
        families = [f.name for f in all_families()]
        if self.family not in families:
            raise CorruptError(f"{MANIFEST} names the family {self.family!r}", expected=f"one of {', '.join(families)}")
        encoders = {e.name for e in self.model.text_encoders}
        for required in self.model.components:
            if required in encoders and not encoders & self.components.keys():
                continue
            if required not in self.components and (required != OPTIONAL or self.model.clips):
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
        samplers = [s.sampler for s in self.schedules]
        if len(set(samplers)) != len(samplers):
            raise READING.wrong("the schedules", samplers, "one for each sampler")
        for stored in self.precisions:
            for name in stored.components.keys() - self.components.keys():
                raise READING.wrong("a lowered component", name, f"of {', '.join(self.components)}")
        check_keys(READING.mapping("the noising", self.noising), READING)
        if self.model.noise_level is not None and not self.noising:
            raise READING.wrong("the noising", {}, f"a scheduler's configuration, which {self.model.title} has")
        tokenizers = [(t.length, t.ids) for t in self.tokenizers]
        check_tokenizers(self.components, self.text_encoders, tokenizers, READING)

    def check_agreement(self) -> None:
        """Raise `CorruptError` where configurations or graphs are not what the rest of the manifest says they are."""
        lowered = [item for stored in self.precisions for item in stored.components.items()]
        for name, component in (*self.components.items(), *lowered):
            check_config(name, component.config, READING)
        try:
            NoiseSchedule.from_diffusers(self.noise_config)
            if self.noising:
                NoiseSchedule.from_diffusers(self.noising)
        except FewstepError as error:
            raise CorruptError(f"the scheduler in {MANIFEST} is none: {error}", remedy=READING.remedy) from error
        latent = self.latent.channels, self.latent.factor, self.latent.frames
        for replaced in ({}, *(stored.components for stored in self.precisions)):
            components = {**self.components, **replaced}
            check_graphs(components, self.model, latent, self.guidance_embedding, READING)

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
        known = {IMAGE_ENCODER, TINY_DECODER, *(c for f in all_families() for c in f.components)}
        if name not in self.components and name not in known:
            raise UnknownNameError("component", name, self.components)
        if name not in self.components:
            raise MissingError(
                f"the bundle {self.name!r} has no component {name!r}",
                expected=f"one of {', '.join(self.components)}",
                remedy="Export the checkpoint again with this component.",
            )
        return self.components[name]

    def within(self, budget: str) -> Bundle:
        """The bundle with the lowered components whose pictures are within a budget like `psnr>=30`.

        Of several those with the least PSNR within it, or of the precision that is named: `int8-weights psnr>=30`.
        `ArgumentError` for other words, `MissingError` where there are none, with what those that it has reached.
        """
        precision, words = split_budget(budget, LOWERED)
        least = read_budget(words)
        fitting = [s for s in self.precisions if s.psnr >= least and precision in (None, s.precision)]
        if not fitting:
            had = ", ".join(f"{s.precision} at {s.psnr:.1f} dB" for s in self.precisions) or "none"
            raise MissingError(
                f"the bundle {self.name!r} has no components within {budget}",
                expected=f"some; it has {had}",
                remedy=f'Find {precision or "some"} with: fewstep quantize {self.folder.name} --budget "{words}"',
            )
        stored = min(fitting, key=lambda s: s.psnr)
        return replace(self, components={**self.components, **stored.components}, lowered=stored)

    def searched(self, sampler: str) -> FoundSchedules:
        """The schedules that were found for it with a sampler (its canonical name), which it holds.

        Raises `ArgumentError` where it holds none, or none for that sampler, `CorruptError` for a file that is not
        the one that the manifest states.
        """
        stored = next((s for s in self.schedules if s.sampler == sampler), None)
        if stored is None:
            held = [s.sampler for s in self.schedules]
            raise ArgumentError(
                f"the bundle {self.name!r} holds no searched schedule{f' for {sampler}' if held else ''}",
                expected=f"sampler {' or '.join(held)}" if held else "another schedule",
                remedy="Pass the file of one (--schedule FILE.json), or store it: fewstep schedule store BUNDLE FILE",
            )
        return _read_stored(self.path(stored.file), stored)

    @property
    def unet_digest(self) -> str:
        """The SHA-256 of its UNet, by which found schedules know it: of the two texts `graph_sha256` and
        `weights_sha256`, one after the other."""
        unet = self.component("unet")
        return hashlib.sha256((unet.graph_sha256 + unet.weights_sha256).encode()).hexdigest()

    @property
    def checkpoint_sha256(self) -> str | None:
        """The SHA-256 of the one checkpoint file that all components are of, with nothing fused or traced with them.

        `None` where they are of several files, were replaced, or do not say.
        """
        if "replaced" in self.source:
            return None
        digests: set[str] = set()
        for component in self.components.values():
            files = component.source.get("files")
            if set(component.source) - _OF_ONE_FILE or not isinstance(files, list) or len(files) != 1:
                return None
            digests.add(str(files[0].get("sha256") if isinstance(files[0], Mapping) else None))
        digest = digests.pop() if len(digests) == 1 else ""
        return digest if SHA256.fullmatch(digest) else None

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
        """The names of its text encoders, in the order in which their outputs are joined; none where it has none."""
        return tuple(e.name for e in self.model.text_encoders if e.name in self.components)

    @property
    def tokens(self) -> int:
        """Of a prompt that one pass of its text encoders takes, or that its embeddings usually have."""
        return self.tokenizers[0].length if self.tokenizers else USUAL_TOKENS

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
        held = {"schedules": [{k: getattr(s, k) for k in StoredSchedules.__slots__} for s in self.schedules]}
        return {
            "format": FORMAT,
            "name": self.name,
            "family": self.family,
            "components": {n: component_json(c) for n, c in self.components.items()},
            "tokenizers": [{k: getattr(t, k) for k in Tokenizer.__slots__} for t in self.tokenizers],
            "latent": self.latent.to_json(),
            "scheduler": {k: v for k, v in self.scheduler.items() if not _is_infinite(v)},
            "defaults": {k: getattr(self.defaults, k) for k in Defaults.__slots__},
            "force_zeros": self.force_zeros,
            "guidance_embedding": self.guidance_embedding,
            "pipeline": self.pipeline,
            "licence": self.licence,
            "source": dict(self.source),
            "gate": dict(self.gate),
            **({"noising": dict(self.noising)} if self.noising else {}),
            **(held if self.schedules else {}),
            **({"precisions": [precision_json(s) for s in self.precisions]} if self.precisions else {}),
        }


def _check_gate(gate: object) -> None:
    """What is read of the gate's findings: a status, and numbers by component."""
    stated = READING.mapping("the gate", gate)
    READING.text("the gate's status", stated.get("status", "unknown"))
    if "reference_sha256" in stated:
        READING.text("the gate's reference_sha256", stated["reference_sha256"], SHA256)
    for name, found in READING.mapping("the gate's components", stated.get("components", {})).items():
        error = READING.mapping(f"the gate's {name}", found).get("worst_relative_l2")
        if error is not None:
            READING.number(f"the gate's worst_relative_l2 of {name}", error)


def _is_infinite(value: object) -> bool:
    """diffusers writes "no clipping" as -Infinity, which is not JSON; left out, it is the default it stands for."""
    return isinstance(value, float) and not math.isfinite(value)


def _checkpoint(root: Path) -> str:
    """A checkpoint's folder that stands where a bundle was expected, as a shell takes it."""
    return shlex.quote(str(root)) if (root / "model_index.json").is_file() else "CHECKPOINT"


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
            remedy=f"Make one with: fewstep export {_checkpoint(root)} FOLDER",
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
            components={n: read_component(c) for n, c in READING.mapping("the components", data["components"]).items()},
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
            noising=data.get("noising", {}),
            licence=data["licence"],
            source=data["source"],
            gate=data["gate"],
            schedules=tuple(
                StoredSchedules(**READING.mapping("a schedule", s))
                for s in READING.array("the schedules", data.get("schedules", ()), 0, 256)
            ),
            precisions=tuple(
                read_precision(s) for s in READING.array("the precisions", data.get("precisions", ()), 0, 64)
            ),
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


def add_schedules(folder: str | os.PathLike[str], found: FoundSchedules) -> Bundle:
    """Store found schedules in a bundle, instead of those of the same sampler that it holds; the bundle then.

    Killed at any moment it leaves the bundle with the old ones, with none for that sampler, or with the new ones; an
    error leaves it as it was. Raises `MismatchError` for those of another model, forced or not, what compiling them
    raises, and `WriteError`.
    """
    found = replace(found, forced=False)
    with alone_with(Path(folder)):
        bundle = read_bundle(folder)
        found.check(model=bundle.unet_digest, sampler=None)
        noise = NoiseSchedule.from_diffusers(bundle.noise_config)
        for steps in found.steps:
            found.program(steps, noise=noise)
        text = found.to_text()
        name = f"searched_{found.sampler}.json"
        stated = StoredSchedules(sampler=found.sampler, file=name, sha256=hashlib.sha256(text.encode()).hexdigest())
        others = tuple(s for s in bundle.schedules if s.sampler != found.sampler)
        made = replace(bundle, schedules=tuple(sorted((*others, stated), key=lambda s: s.sampler)))
        file = bundle.folder / name
        before = file.read_bytes() if file.is_file() and not file.is_symlink() else None
        changed = False
        try:
            with writing("the bundle's schedules", bundle.folder):
                if len(others) < len(bundle.schedules):
                    write_manifest(replace(bundle, schedules=others))
                write_whole(file, text)
                changed = True
                write_manifest(made)
        except BaseException:
            with contextlib.suppress(OSError, FewstepError):
                if changed:
                    file.unlink() if before is None else write_whole(file, before)
                write_manifest(bundle)
            raise
    return made


@lru_cache(maxsize=64)
def _read_stored(path: Path, stored: StoredSchedules) -> FoundSchedules:
    """The schedules in a file of a bundle, whose digest is compared; read once."""
    remedy = "Store them again: fewstep schedule store BUNDLE FILE"
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise CorruptError(f"{stored.file} cannot be read ({type(error).__name__})", remedy=remedy) from error
    if hashlib.sha256(data).hexdigest() != stored.sha256:
        raise CorruptError(f"{stored.file} is not the file that {MANIFEST} states", remedy=remedy)
    found = parse_schedules(data, stored.file)
    if found.sampler != stored.sampler:
        raise CorruptError(
            f"{stored.file} holds schedules for {found.sampler}", expected=f"for {stored.sampler}", remedy=remedy
        )
    return found
