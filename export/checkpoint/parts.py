"""A checkpoint's parts: records of what was found on disk. Nothing is loaded here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...families import Family
from ...families.base import TextEncoder
from ...families.decoders import TINY_DECODER
from ...families.image_prompt import IMAGE_ENCODER
from ...weights.delta import LoraFile
from ...weights.embeddings import Word
from ...weights.stored import Stored, open_tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One component of a checkpoint: its class, its configuration, the folder of that, and its weight files.

    `layout` says how the files name their tensors: `folder` as the library that saved the folder does, `diffusers`,
    `original` and `open_clip` as `singlefile.py` tells them, behind `prefix`. words: what a text encoder learns
    besides.
    """

    name: str
    class_name: str
    config: Mapping[str, Any]
    place: Path
    files: tuple[Path, ...]
    layout: str = "folder"
    prefix: str = ""
    words: tuple[Word, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class IpAdapter:
    """An adapter's file and its image encoder, with what decides their graphs.

    of_unet, projection: as `_ip_adapter` of the UNet's configuration and `_projection` of the encoder's state it.
    """

    file: Path
    encoder: Part
    of_unet: Mapping[str, int]
    projection: Mapping[str, Any]

    def tensors(self) -> dict[str, Stored]:
        return open_tensors([self.file])


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A diffusers folder, understood, with whatever replaces its parts.

    `scheduler` and the parts' configurations are as diffusers' pipeline leaves them once it is made.
    `controls` are the networks that look at a picture beside its UNet, by the names that requests know them by;
    `adapter` is what takes pictures as prompts. `noising` is the configuration of the scheduler that noises pictures
    which the UNet is told of.
    `options` are the arguments that, given to `compose_checkpoint` with `path`, make the same checkpoint again.
    """

    folder: Path
    source: str
    model: Family
    pipeline: str
    parts: Mapping[str, Part]
    tokenizers: tuple[Path, ...]
    scheduler: Mapping[str, Any]
    force_zeros: bool = False
    licence: str | None = None
    revision: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    file: Path | None = None
    loras: tuple[LoraFile, ...] = ()
    controls: Mapping[str, Part] = field(default_factory=dict)
    adapter: IpAdapter | None = None
    tiny: Part | None = None
    noising: Mapping[str, Any] = field(default_factory=dict)

    @property
    def family(self) -> str:
        return self.model.name

    @property
    def components(self) -> tuple[str, ...]:
        """What its bundle holds, in the order of an export."""
        absent = {e.name for e in self.model.text_encoders} - self.parts.keys()
        beside = (*((IMAGE_ENCODER,) if self.adapter else ()), *((TINY_DECODER,) if self.tiny else ()))
        return (*(c for c in self.model.components if c not in absent), *beside)

    @property
    def text_encoders(self) -> tuple[TextEncoder, ...]:
        """Those that it has: none where they are left out."""
        return tuple(e for e in self.model.text_encoders if e.name in self.parts)

    @property
    def path(self) -> Path:
        """What was opened: the single file, or the folder."""
        return self.file or self.folder
