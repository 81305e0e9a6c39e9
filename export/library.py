"""What the runtime's adapter asks of diffusers: its objects by name, and checkpoints and parts exported on the spot."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..bundle import Bundle
from ..engines.kept import find_kept, keeping, kept_folder
from ..errors import MissingExtraError, UnknownNameError
from ..version import __version__


class DiffusersLibrary:
    """The `Library` of `runtime/library.py`; whatever is heavy is loaded when it is needed."""

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
        self, source: str, *, dtype: str, variant: str | None, revision: str | None, offline: bool
    ) -> Bundle:
        """The bundle of a diffusers folder or hub id in the user's cache, exported where it is not there yet.

        Its folder is named by what it was made from: the parts' files with their sizes and times of change, and the
        options.
        """
        from .checkpoint.compose import compose_checkpoint
        from .export import export_bundle
        from .trace.graphs import RECIPE

        checkpoint = compose_checkpoint(source, revision=revision, variant=variant, offline=offline)
        files = [p for p in sorted(checkpoint.folder.rglob("*")) if p.is_file()]
        facts = [(str(f.relative_to(checkpoint.folder)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        told = json.dumps([RECIPE, __version__, str(checkpoint.folder.absolute()), facts, dtype, variant, revision])
        name = Path(source).name
        folder = kept_folder("pretrained", f"{name}-{hashlib.sha256(told.encode()).hexdigest()[:12]}")
        with keeping(folder):
            return find_kept(folder) or export_bundle(
                source, folder, name=name, dtype=dtype, variant=variant, revision=revision, offline=offline
            )

    def export_parts(self, bundle: Bundle, parts: Mapping[str, Any]) -> Bundle:
        """See `swap.py`."""
        _diffusers("Exporting a component")
        from .swap import swap_parts

        return swap_parts(bundle, parts)


def _diffusers(purpose: str) -> Any:
    try:
        return importlib.import_module("diffusers")
    except ModuleNotFoundError as error:
        raise MissingExtraError("diffusers", "export", purpose=purpose) from error
