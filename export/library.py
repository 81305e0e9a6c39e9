"""What the runtime's adapter asks of diffusers: its objects by name, and checkpoints and parts exported on the spot."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..bundle import Bundle
from ..engines.digest import sha256_file
from ..engines.kept import find_kept, keeping, kept_folder
from ..errors import MissingExtraError, UnknownNameError, UnsupportedError
from ..families.control import CONTROL_CLASSES
from ..places import staging_folder, writing
from ..version import __version__
from .embedded import embedded_bundle


class DiffusersLibrary:
    """The `Library` of `runtime/library.py`; whatever is heavy is loaded when it is needed."""

    def embedded(self, name: str) -> Bundle:
        return embedded_bundle(name)[0]

    def named(self, name: str) -> Any:
        """diffusers' own object of a name; `AttributeError` where it has none."""
        return getattr(_diffusers(f"diffusers' {name}"), name)

    def make_scheduler(self, config: Mapping[str, Any]) -> Any:
        """diffusers' scheduler of a configuration; `UnknownNameError` for a class that it does not have."""
        library, name = _diffusers("A scheduler as diffusers' object"), str(config.get("_class_name"))
        cls: Any = getattr(library, name, None)
        if cls is None:
            raise UnknownNameError("scheduler class (_class_name)", name, dir(library.schedulers))
        return cls.from_config(dict(config))

    def export_checkpoint(
        self,
        source: str,
        *,
        dtype: str,
        variant: str | None,
        revision: str | None,
        offline: bool,
        controlnets: Sequence[Any] = (),
    ) -> Bundle:
        """The bundle of a diffusers folder or hub id in the user's cache, exported where it is not there yet.

        Its folder is named by what it was made from: the parts' files with their sizes and times of change, those of
        ControlNets, and the options. ControlNets get the names of `control_names`.
        """
        from .checkpoint.compose import compose_checkpoint
        from .export import export_bundle
        from .trace.graphs import RECIPE

        checkpoint = compose_checkpoint(source, revision=revision, variant=variant, offline=offline)
        files = [p for p in sorted(checkpoint.folder.rglob("*")) if p.is_file()]
        facts = [(str(f.relative_to(checkpoint.folder)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        told = [RECIPE, __version__, str(checkpoint.folder.absolute()), facts, dtype, variant, revision]
        name, root = Path(source).name, kept_folder("pretrained", "")
        with writing("a bundle of a checkpoint", root), staging_folder(root / "controlnets") as saved:
            nets = dict(zip(control_names(len(controlnets)), controlnets, strict=True))
            places = {n: _place_of(net, saved / n) for n, net in nets.items()}
            told += [[n, _digest(p)] for n, p in places.items()]
            key = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]
            folder = kept_folder("pretrained", f"{name}-{key}")
            with keeping(folder):
                kept = find_kept(folder)
                if kept is None:
                    how: Any = {"dtype": dtype, "variant": variant, "revision": revision, "offline": offline}
                    kept = export_bundle(source, folder, name=name, controlnets=places or None, **how)
        return kept

    def export_parts(self, bundle: Bundle, parts: Mapping[str, Any]) -> Bundle:
        """See `swap.py`."""
        _diffusers("Exporting a component")
        from .swap import swap_parts

        return swap_parts(bundle, parts)


def control_names(count: int) -> list[str]:
    """Names of so many ControlNets, whose order is theirs."""
    return ["controlnet"] if count == 1 else [f"controlnet_{i + 1:02}" for i in range(count)]


def _place_of(net: Any, place: Path) -> Path:
    """The folder of a ControlNet: its own, or where it is written as its library writes it."""
    if isinstance(net, (str, os.PathLike)):
        return Path(net)
    if type(net).__name__ not in CONTROL_CLASSES or not hasattr(net, "save_pretrained"):
        raise UnsupportedError(f"a {type(net).__name__} as controlnet", expected="a ControlNetModel, or its folder")
    net.save_pretrained(place)
    return place


def _digest(place: Path) -> str:
    """Of a folder's files, by their names and bytes."""
    digest = hashlib.sha256()
    for file in sorted(p for p in place.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(place)}\0{sha256_file(file)}\0".encode())
    return digest.hexdigest()


def _diffusers(purpose: str) -> Any:
    try:
        return importlib.import_module("diffusers")
    except ModuleNotFoundError as error:
        raise MissingExtraError("diffusers", "export", purpose=purpose) from error
