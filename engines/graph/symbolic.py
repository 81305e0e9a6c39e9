"""Sizes that a graph states as formulas of its named dimensions, `(((height - 1)//2)) + 1`, in numbers."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping, Sequence

_OPERATIONS: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def count_elements(shape: Sequence[int | str | None], dims: Mapping[str, int]) -> int | None:
    """How many elements a tensor of this shape has where dimensions are these; `None` where it cannot be told."""
    sizes = [size if isinstance(size, int) else _evaluate(size or "", dims) for size in shape]
    return None if None in sizes else math.prod(s for s in sizes if s is not None)


def _evaluate(formula: str, dims: Mapping[str, int]) -> int | None:
    try:
        return _value(ast.parse(formula, mode="eval").body, dims)
    except (SyntaxError, KeyError, TypeError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr, dims: Mapping[str, int]) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.Name):
        return dims[node.id]
    if isinstance(node, ast.BinOp):
        return _OPERATIONS[type(node.op)](_value(node.left, dims), _value(node.right, dims))
    raise TypeError(f"{type(node).__name__} in a formula")
