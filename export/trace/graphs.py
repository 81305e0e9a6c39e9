"""Graphs by key: a traced graph depends on a component's configuration and precision, never on its weights.

A key is the hash of both. Graphs of the standard architectures and of the embedded model travel with the package;
others are traced once and kept in the user's cache.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from ...engines.base import TensorSpec
from ...engines.store import cache_root
from ...errors import CorruptError
from ...places import writing
from ...values import Reader, parse_json
from ..checkpoint.configs import canonical_config

RECIPE = 5
"""Raised whenever the modules, the tracing or the layout change what a graph is."""
RECIPES = {"unet": 6}
"""Of kinds of components whose graphs alone changed since."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A weight that a graph needs: its name in the graph, its key in the checkpoint, dtype and shape."""

    name: str
    key: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedGraph:
    """An ONNX graph without weights, and what is known of it."""

    key: str
    kind: str
    dtype: str
    parameters: tuple[Parameter, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    operators: Mapping[str, int]
    header_sha256: str
    onnx: bytes = field(repr=False)


def graph_key(kind: str, config: Mapping[str, Any], dtype: str) -> str:
    """The key of a component's graph: 24 hexadecimal digits."""
    kept = canonical_config(kind, config, dtype)
    recipe = RECIPES.get(kind, RECIPE)
    text = json.dumps({"recipe": recipe, "kind": kind, "dtype": dtype, "config": kept}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def cache_folder() -> Path:
    """Where traced graphs are kept: `graphs` in the user's cache."""
    return cache_root() / "graphs"


def find_graph(key: str) -> TracedGraph | None:
    """A packaged or cached graph, or `None`; `CorruptError` for a file that is there and cannot be read."""
    packaged = resources.files("fewstep.export").joinpath("graphs", f"{key}.graph")
    if packaged.is_file():
        return _unpack(packaged.read_bytes(), str(packaged))
    cached = cache_folder() / f"{key}.graph"
    if cached.is_file():
        return _unpack(cached.read_bytes(), str(cached))
    return None


def keep_graph(graph: TracedGraph, folder: Path | None = None) -> Path:
    """Write a graph into a folder (the user's cache if none is given), whole or not at all."""
    folder = folder or cache_folder()
    path, packed = folder / f"{graph.key}.graph", _pack(graph)
    with writing("a traced graph", folder, needed=len(packed)):
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, suffix=".part")
        part = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(packed)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    return path


def _pack(graph: TracedGraph) -> bytes:
    """One line of JSON, then the ONNX bytes, compressed together."""
    head = {
        "key": graph.key,
        "kind": graph.kind,
        "dtype": graph.dtype,
        "parameters": [[p.name, p.key, p.dtype, list(p.shape)] for p in graph.parameters],
        "inputs": [s.to_json() for s in graph.inputs],
        "outputs": [s.to_json() for s in graph.outputs],
        "operators": dict(graph.operators),
        "header_sha256": graph.header_sha256,
        "onnx_sha256": hashlib.sha256(graph.onnx).hexdigest(),
    }
    return lzma.compress(json.dumps(head).encode() + b"\n" + graph.onnx, preset=9)


def _unpack(data: bytes, path: str) -> TracedGraph:
    try:
        head, _, onnx = lzma.decompress(data).partition(b"\n")
        fields = parse_json(head, f"the kept graph {Path(path).name}", finite=True)
        if hashlib.sha256(onnx).hexdigest() != fields.pop("onnx_sha256"):
            raise ValueError("the graph's hash is another")
        reading = Reader(place=f"the kept graph {Path(path).name}", remedy=f"Delete it: {path}")
        parameters = tuple(Parameter(name=n, key=k, dtype=d, shape=tuple(s)) for n, k, d, s in fields.pop("parameters"))
        inputs = tuple(TensorSpec.from_json(s, reading) for s in fields.pop("inputs"))
        outputs = tuple(TensorSpec.from_json(s, reading) for s in fields.pop("outputs"))
        return TracedGraph(parameters=parameters, inputs=inputs, outputs=outputs, onnx=onnx, **fields)
    except (ValueError, KeyError, TypeError, lzma.LZMAError, EOFError) as error:
        raise CorruptError(
            f"the kept graph {Path(path).name} is damaged ({error})", remedy=f"Delete it: {path}"
        ) from error
