"""Lowered components in their bundle: files of their own names, the manifest, then away with what it names no more."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..bundle import Bundle, Component, StoredPrecision, read_bundle, write_manifest
from ..engines.backends.ort import OrtEngine
from ..engines.gate.gate import engine_function, worst_error
from ..engines.gate.verify import load_cases
from ..engines.graph.quantized import IntegerGrids
from ..errors import MissingError
from ..places import alone_with, write_whole, writing
from .forms import FORMS, Lowered
from .lowered import Lowering


def store_lowered(
    bundle: Bundle,
    parts: Mapping[str, Lowering],
    layers: Mapping[str, Lowered],
    grids: Mapping[str, IntegerGrids],
    made: Mapping[str, Any],
) -> Bundle:
    """Write the lowered components and their table, instead of those of the same precision and budget.

    Killed at any moment it leaves the bundle with the old ones or with the new ones, and perhaps files that nobody
    names. Raises `WriteError`.
    """
    text = json.dumps(made, indent=1) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    precision, stamp, folder = str(made["precision"]), digest[:8], bundle.folder
    written: list[Path] = []
    with alone_with(folder), writing("the lowered components", folder):
        current = read_bundle(folder)
        same = [s for s in current.precisions if (s.precision, s.budget) == (precision, made["budget"])]
        try:
            components = {}
            for name, own in layers.items():
                stem = f"{name}.{precision}-{stamp}"
                paths = [folder / f"{stem}{suffix}" for suffix in (".onnx", ".safetensors")]
                for path in paths:
                    path.unlink(missing_ok=True)
                written += paths
                component = parts[name].write(own, grids.get(name), folder, stem, FORMS[precision])
                components[name] = _with_error(current, name, component)
            table = f"{precision}-{stamp}.json"
            written.append(folder / table)
            write_whole(folder / table, text)
            stored = StoredPrecision(
                precision=precision,
                budget=str(made["budget"]),
                psnr=float(made["reached"]["psnr"]),
                worst=float(made["reached"]["worst"]),
                file=table,
                sha256=digest,
                components=components,
            )
            others = tuple(s for s in current.precisions if s not in same)
            changed = replace(current, precisions=(*others, stored))
            write_manifest(changed)
        except BaseException:
            for path in written:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
            raise
        kept = {path.name for path in written}
        for old in same:
            for file in {old.file, *(f for c in old.components.values() for f in (c.graph, c.weights))} - kept:
                (folder / file).unlink(missing_ok=True)
    return changed


def _with_error(bundle: Bundle, name: str, component: Component) -> Component:
    """The component with its own error against torch in float32, by which engines of it are judged."""
    try:
        cases = [c for c in load_cases(bundle) if c.component == name]
    except MissingError:
        return component
    engine = OrtEngine.from_onnx(
        bundle.folder / component.graph,
        inputs=component.inputs,
        outputs=component.outputs,
        optimization="disabled",
    )
    error = worst_error(engine_function(engine), cases)
    return replace(component, source={**component.source, "relative_l2": error})
