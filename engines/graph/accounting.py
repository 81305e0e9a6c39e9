"""Fusion accounting: which operators a graph holds, and whether the fused ones came through the backend whole."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping

from ...errors import MismatchError

Forms = Mapping[str, tuple[str, ...]]
"""The operators of a built graph that stand for one of the exported graph."""

ATTENTION = ("Attention", "MultiHeadAttention", "PackedMultiHeadAttention", "GroupQueryAttention")
FUSED: Forms = {"Attention": ATTENTION}
# Every Sigmoid of our exports is that of a SiLU or of CLIP's GELU; both are x sigmoid(a x), ONNX Runtime's QuickGelu.
FUSED_ON_CPU: Forms = {
    "Attention": ATTENTION,
    "GroupNormalization": ("GroupNormalization", "InstanceNormalization"),
    "LayerNormalization": ("LayerNormalization", "SkipLayerNormalization"),
    "Gelu": ("Gelu", "BiasGelu", "FastGelu"),
    "Sigmoid": ("QuickGelu",),
}
_log = logging.getLogger("fewstep.engines")


def count_operators(model: bytes | memoryview) -> Counter[str]:
    """How many nodes of each operator a serialised ONNX model holds, sub-graphs included. Raises `CorruptError`."""
    from .onnx_bytes import fields_of  # whoever opens an engine reads no graph

    counts: Counter[str] = Counter()
    for number, kind, value in fields_of(memoryview(model)):
        if number == 7 and kind == 2:
            _count_graph(value, counts)
    return counts


def _count_graph(graph: memoryview, counts: Counter[str]) -> None:
    from .onnx_bytes import fields_of

    for number, kind, node in fields_of(graph):
        if number != 1 or kind != 2:
            continue
        for field, _, value in fields_of(node):
            if field == 4:
                counts[bytes(value).decode("utf-8", "replace")] += 1
            elif field == 5:
                for inner, _, subgraph in fields_of(value):
                    if inner == 6:
                        _count_graph(subgraph, counts)


def check_fusion(
    component: str, stated: Mapping[str, int], counted: Mapping[str, int], *, strict: bool, fused: Forms = FUSED
) -> dict[str, int]:
    """Compare the fused operators of a built graph with those that the manifest counts; returns what was found.

    With `strict` a lost one raises `MismatchError`; otherwise it is logged, as slower and not wrong.
    """
    result = {}
    for name, forms in fused.items():
        expected, got = stated.get(name, 0), sum(counted.get(f, 0) for f in forms)
        result[name] = got
        if got >= expected:
            continue
        text = f"{got} of {expected} {name} operators of {component!r} came through fused"
        if strict:
            raise MismatchError(
                text, expected="all of them", remedy="Upgrade the backend, or export with another opset."
            )
        _log.warning("%s: the engine is right but slower than it could be", text)
    return result
