"""Tracing without a second trace: torch's exporter runs every program through decompositions, needed or not.

A program whose operators all have a translation to ONNX already comes out of that as it went in, but for conversions
that convert nothing, which are taken away here. The networks of diffusers and transformers are such programs, and that
second trace took more than a third of the time. It is left out by putting another function in the place of the
exporter's own while a component is traced; where the exporter has no such function, or a program needs it, all is as
torch does it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_lock = threading.RLock()
_CONVERSIONS = ("to.dtype", "to.device", "to.dtype_layout", "to.other")


@contextmanager
def undecomposed() -> Iterator[None]:
    """Have torch's exporter leave programs as they are where that changes nothing. One thread at a time."""
    try:
        from torch.onnx._internal.exporter import _decomp, _fx_passes

        whole: Callable[..., Any] = _fx_passes.decompose_with_registry
        implemented: Callable[..., Any] = _decomp.get_onnx_implemented_overloads
    except (ImportError, AttributeError):  # another torch
        yield
        return

    def decompose(program: Any, registry: Any) -> Any:
        known = set(implemented(registry))
        return program if _plain(program.graph_module, known) else whole(program, registry)

    with _lock:
        _fx_passes.decompose_with_registry = decompose
        try:
            yield
        finally:
            _fx_passes.decompose_with_registry = whole


def _plain(module: Any, known: set[Any]) -> bool:
    """Take conversions to the same type away; whether all that is left then can be translated."""
    aten = torch.ops.aten
    conversions = {getattr(aten.to, name.removeprefix("to."), None) for name in _CONVERSIONS} - {None}
    dropped = {aten._assert_scalar.default, aten._assert_tensor_metadata.default}
    calls = [n for n in module.graph.nodes if n.op == "call_function"]
    for node in calls:
        if node.target in conversions:
            source = node.args[0]
            if node.meta["val"].dtype == source.meta["val"].dtype:
                continue
            if aten._to_copy.default not in known:
                return False
        elif isinstance(node.target, torch._ops.OpOverload):
            if node.target not in known and node.target not in dropped:
                return False
            if node.target._schema.is_mutable:
                return False
    for node in calls:
        if node.target in conversions:
            _convert(module, node)
    module.graph.lint()
    module.recompile()
    return True


def _convert(module: Any, node: Any) -> None:
    """What a decomposition makes of it: a copy in the other type, or nothing unless it is what the program returns."""
    source, dtype = node.args[0], node.meta["val"].dtype
    if source.meta["val"].dtype == dtype and not any(user.op == "output" for user in node.users):
        node.replace_all_uses_with(source)
        module.graph.erase_node(node)
        return
    node.target, node.args, node.kwargs = torch.ops.aten._to_copy.default, (source,), {"dtype": dtype}
