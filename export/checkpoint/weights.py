"""Weights from a checkpoint to a bundle: converted one tensor at a time, written as a stream."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from ...errors import CorruptError
from ...weights.layout import plan_layout
from ...weights.stored import Stored, convert
from ..trace.graphs import Parameter, TracedGraph

_VAE_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

Progress = Callable[[int], None]
Patch = Callable[[str, Stored], Stored]
"""What may change a tensor on its way: given the parameter's key and the checkpoint's tensor, one of its shape."""


def find_tensor(parameter: Parameter, tensors: Mapping[str, Stored]) -> Stored | None:
    """The checkpoint's tensor for a parameter, under the names that checkpoints of different ages give it."""
    key = parameter.key
    candidates = [key, f"text_model.{key}", key.removeprefix("text_model.")]
    if key == "encoder.embed_tokens.weight":  # as T5's decoder, which is left out, would have it too
        candidates.append("shared.weight")
    for new, old in _VAE_ATTENTION.items():
        if f".attentions.0.{new}." in key:
            candidates.append(key.replace(f".{new}.", f".{old}."))
    return next((tensors[c] for c in candidates if c in tensors), None)


def write_weights(
    graph: TracedGraph,
    tensors: Mapping[str, Stored],
    path: Path,
    progress: Progress | None = None,
    patch: Patch | None = None,
) -> str:
    """Write the weights that `graph` needs in the layout its initialisers point at; return the file's SHA-256.

    `patch` sees every tensor before it is converted; one is in memory at a time. Raises `CorruptError` when weights
    are missing or have another shape.
    """
    layout = plan_layout([(p.name, p.dtype, p.shape) for p in graph.parameters])
    if layout.sha256 != graph.header_sha256:
        raise CorruptError(
            "a kept graph was made for another layout of weights",
            remedy="Delete the graph cache, or reinstall fewstep.",
        )
    by_name = {p.name: p for p in graph.parameters}
    sources = {name: find_tensor(p, tensors) for name, p in by_name.items()}
    missing = [by_name[n].key for n, t in sources.items() if t is None]
    if missing:
        shown = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        raise CorruptError(
            f"the checkpoint lacks {len(missing)} weights of its {graph.kind}: {shown}",
            expected=f"{len(by_name)} weights, as its config.json says",
            remedy="Take the whole checkpoint.",
        )
    digest = hashlib.sha256(layout.header)
    with path.open("xb") as file:
        file.write(layout.header)
        for name in layout.order:
            data = _fitting(sources[name], by_name[name], patch)
            view = np.ascontiguousarray(data).view(np.uint8).data
            file.write(view)
            digest.update(view)
            if progress:
                progress(len(view))
            source = sources[name]
            del data, view
            if source is not None:
                source.release()
    return digest.hexdigest()


def _fitting(stored: Stored | None, parameter: Parameter, patch: Patch | None) -> np.ndarray:
    if stored is None or [d for d in stored.shape if d != 1] != [d for d in parameter.shape if d != 1]:
        raise CorruptError(
            f"weight {parameter.key!r} has shape {stored.shape if stored else None}",
            expected=f"{parameter.shape}, as its config.json says",
            remedy="Take weights and config.json from the same checkpoint.",
        )
    return convert(patch(parameter.key, stored) if patch else stored, parameter.dtype, parameter.key)
