"""LoRAs at run time: found by name, read once, and packed as arrays for the rows of the images that ask for them.

A change of weights is data of an image here, as its prompt is (`engines/graph/low_rank.py` has the equation): images
with different LoRAs, several, or none share an evaluation, and another scale is another array.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import Bundle
from ..engines.graph.low_rank import DOWN, UP, Layer
from ..errors import ArgumentError, MissingError, UnknownNameError, UnsupportedError
from ..weights.delta import Delta, LoraFile
from ..weights.lora import Fusion, match_loras
from ..weights.stored import open_tensors
from .conditioning import Arrays
from .prompts.lora_tags import Uses

SUFFIX = ".safetensors"
_PREFIX, _TEXT = "model.", "text_model."
_SHOWN = 12

Shapes = Mapping[str, tuple[int, ...]]
Stamped = tuple[Path, int, int]
"""A file as it was when it was found: with its size and its time of change in nanoseconds."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoraChange:
    """The sum of some LoRAs' changes of one network: by module, their matrices, each with its whole factor.

    rank: the largest of a module, over the LoRAs that change it. kernels: whether it changes convolutions of larger
    kernels.
    """

    deltas: Mapping[str, tuple[tuple[Delta, float], ...]]
    rank: int
    kernels: bool
    _packed: dict[tuple[int, int], Arrays] = field(default_factory=dict, repr=False)

    def packed(self, layers: Sequence[Layer], rank: int) -> Arrays:
        """`lora_down` [I, rank] and `lora_up` [rank, O]; zeros where nothing changes. The same arrays each time.

        Raises `UnsupportedError` for a module that is none of the layers.
        """
        key = (len(layers), rank)
        if key not in self._packed:
            self._packed[key] = self._pack(layers, rank)
        return self._packed[key]

    @property
    def bytes(self) -> int:
        return sum(a.nbytes for arrays in list(self._packed.values()) for a in arrays.values())

    def _pack(self, layers: Sequence[Layer], rank: int) -> Arrays:
        places = {layer.module.removeprefix(_TEXT): layer for layer in layers}
        last = layers[-1]
        down = np.zeros((last.down + last.height, rank), np.float32)
        up = np.zeros((rank, last.up + last.width), np.float32)
        for module, changes in self.deltas.items():
            layer = places.get(module)
            if layer is None:
                raise UnsupportedError(
                    f"a LoRA changes {module}, which is no linear layer or convolution of this graph",
                    remedy="Fuse it at export: fewstep export CHECKPOINT BUNDLE --lora FILE",
                )
            at = 0
            for delta, scale in changes:
                low, high = delta.matrices()
                end = at + low.shape[0]
                # rows of `down` go by (kh, kw, in), as an image's patches do
                low = np.moveaxis(low.reshape(end - at, layer.shape[1], -1), 1, 2).reshape(end - at, -1)
                down[layer.down : layer.down + layer.height, at:end] = low.T
                up[at:end, layer.up : layer.up + layer.width] = high.T * np.float32(scale)
                at = end
        return {DOWN: down, UP: up}


class LoraLibrary:
    """The LoRAs of a bundle: files in a folder by name, or by path where no folder is given. Thread-safe.

    keep_bytes: of packed arrays that are kept for the next image that asks for the same, the longest unused go first.
    """

    def __init__(self, bundle: Bundle, folder: Path | None = None, *, keep_bytes: int = 1 << 30) -> None:
        self._bundle, self._keep = bundle, keep_bytes
        self.folder = None if folder is None else Path(folder)
        self._read: OrderedDict[tuple[Any, ...], Fusion] = OrderedDict()
        self._changes: OrderedDict[tuple[Any, ...], dict[str, LoraChange]] = OrderedDict()
        self._networks: dict[str, tuple[Mapping[str, Any], Shapes]] | None = None
        self._lock = threading.Lock()
        self.hits = self.misses = 0

    @property
    def components(self) -> tuple[str, ...]:
        """Those that a LoRA may change."""
        return ("unet", *self._bundle.text_encoders)

    @property
    def names(self) -> list[str]:
        """What the folder has, without suffixes."""
        return [] if self.folder is None else sorted(p.stem for p in self.folder.glob(f"*{SUFFIX}"))

    def find(self, name: str) -> Path:
        """The file of a name; `MissingError` without one, `ArgumentError` for a path where names are asked for."""
        if self.folder is None:
            path = Path(name)
        elif os.sep in name or "/" in name or "\\" in name or name in (".", "..") or "\0" in name:
            raise ArgumentError(f"the LoRA {name[:80]!r} is a path", expected="the name of a file in their folder")
        else:
            path = self.folder / name
        if path.suffix != SUFFIX:
            path = path.with_name(path.name + SUFFIX)
        if path.is_file():
            return path
        known = self.names
        shown = f"one of {', '.join(known[:_SHOWN])}{' ...' if len(known) > _SHOWN else ''}" if known else ""
        raise MissingError(
            f"no LoRA {name[:80]!r}",
            expected=shown or "a .safetensors file",
            remedy="Put its file into the folder of LoRAs." if self.folder else "Give the path of its file.",
        )

    def changes(self, asked: Uses) -> Mapping[str, LoraChange]:
        """What some LoRAs change together, by component; the same objects for the same files and scales.

        Raises `UnknownNameError` for a component that the bundle has not, `MissingError`, `CorruptError`, and
        `UnsupportedError` for kinds of adapters that are no plain LoRA.
        """
        if not asked:
            return {}
        for _, component, _ in asked:
            if component and component not in self.components:
                raise UnknownNameError("component with LoRAs", component, self.components)
        with self._lock:
            files = [(self._stamped(self.find(name)), component, scale) for name, component, scale in asked]
            key = tuple(files)
            known = self._changes.get(key)
            if known is None:
                self.misses += 1
                known = self._changes[key] = self._together(files)
            else:
                self.hits += 1
            self._changes.move_to_end(key)
            while len(self._changes) > 1 and self._bytes() > self._keep:
                self._changes.popitem(last=False)
            return known

    def fusion(self, asked: Uses) -> Fusion:
        """The changes of some LoRAs of any kind by component and weight, with their scales, to merge into the weights.

        Raises as `changes` does, but for the kinds of adapters.
        """
        deltas: dict[str, dict[str, tuple[Delta, ...]]] = {}
        for name, only, scale in asked:
            if only and only not in self.components:
                raise UnknownNameError("component with LoRAs", only, self.components)
            with self._lock:
                read = match_loras([LoraFile(path=self.find(name), scale=scale)], self._known_networks())
            for component, by_key in read.deltas.items():
                if only in ("", component):
                    own = deltas.setdefault(component, {})
                    for key, several in by_key.items():
                        own[key] = (*own.get(key, ()), *several)
        return Fusion(deltas=deltas)

    @property
    def bytes(self) -> int:
        """Memory of the packed arrays that are kept."""
        with self._lock:
            return self._bytes()

    def _bytes(self) -> int:
        return sum(c.bytes for by_component in self._changes.values() for c in by_component.values())

    def _stamped(self, path: Path) -> Stamped:
        status = path.stat()
        return path.absolute(), status.st_size, status.st_mtime_ns

    def _together(self, files: Sequence[tuple[Stamped, str, float]]) -> dict[str, LoraChange]:
        by_component: dict[str, dict[str, list[tuple[Delta, float]]]] = {}
        for stamped, only, scale in files:
            for component, deltas in self._fusion(stamped).deltas.items():
                if only not in ("", component):
                    continue
                _, own = self._known_networks()[component]
                for key, several in deltas.items():
                    if key not in own:
                        continue  # the graph leaves it out: the last layers of an encoder that is read before them
                    _check_low_rank(several)
                    module = key.removesuffix(".weight")
                    by_module = by_component.setdefault(component, {})
                    by_module.setdefault(module, []).extend((d, scale * d.factor) for d in several)
        return {n: _sum(deltas, self._known_networks()[n][1]) for n, deltas in by_component.items()}

    def _fusion(self, stamped: Stamped) -> Fusion:
        if stamped not in self._read:
            self._read[stamped] = match_loras([LoraFile(path=stamped[0])], self._known_networks())
            while len(self._read) > 256:
                self._read.popitem(last=False)
        self._read.move_to_end(stamped)
        return self._read[stamped]

    def _known_networks(self) -> dict[str, tuple[Mapping[str, Any], Shapes]]:
        """Configuration and shapes of weights of each network that a LoRA may change, by component."""
        if self._networks is None:
            self._networks = {}
            for name in self.components:
                part = self._bundle.component(name)
                tensors = open_tensors([self._bundle.path(part.weights)])
                shapes = {n.removeprefix(_PREFIX).removeprefix(_TEXT): t.shape for n, t in tensors.items()}
                self._networks[name] = part.config, shapes
        return self._networks


def _check_low_rank(deltas: Sequence[Delta]) -> None:
    for delta in deltas:
        if not delta.is_low_rank:
            raise UnsupportedError(
                f"{delta.lora.path.name} is {delta.title} (of {delta.name})",
                expected="a plain LoRA, with two matrices a weight",
                remedy="Fuse it at export: fewstep export CHECKPOINT BUNDLE --lora FILE",
            )


def _sum(deltas: Mapping[str, Sequence[tuple[Delta, float]]], shapes: Shapes) -> LoraChange:
    ranks = [sum(d.rank for d, _ in several) for several in deltas.values()]
    kernels = any(len(s := shapes[f"{m}.weight"]) == 4 and s[2:] != (1, 1) for m in deltas)
    return LoraChange(deltas={m: tuple(d) for m, d in deltas.items()}, rank=max(ranks), kernels=kernels)
