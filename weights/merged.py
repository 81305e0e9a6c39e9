"""Weights with the changes of adapters added: always to those of the file, never cumulative."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .delta import Delta
from .lora import Fusion
from .stored import CODES, Stored, as_array, convert, open_tensors

Weights = Mapping[str, NDArray[Any]]
_PREFIX = "model."


def mapped_weights(path: Path) -> Weights:
    """A file's tensors as they lie, mapped into memory; the same arrays as long as the file is the same."""
    status = path.stat()
    return _mapped(path.absolute(), status.st_size, status.st_mtime_ns, status.st_ino)


@lru_cache(maxsize=32)
def _mapped(path: Path, size: int, mtime_ns: int, inode: int) -> Weights:
    return {name: as_array(tensor) for name, tensor in open_tensors([path]).items()}


def merge(weights: Weights, component: str, fusion: Fusion, dtype: str) -> Weights:
    """Weights of a component, W + D by each adapter in turn, added in float32; the same arrays where nothing changes.

    dtype: of the floating weights, `"bfloat16"` as its bits.
    """
    changed = {n: c for n in weights if (c := fusion.changes(component, n.removeprefix(_PREFIX)))}

    def one(name: str) -> NDArray[Any]:
        return _merged(weights[name], changed[name], dtype, name)

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return {**weights, **dict(zip(changed, pool.map(one, changed), strict=True))}


def _merged(weight: NDArray[Any], changes: tuple[Delta, ...], dtype: str, name: str) -> NDArray[Any]:
    total = wide(weight, dtype)
    for change in changes:
        total = change.added(total)
    if dtype == "float32":
        return total
    stored = Stored(dtype=CODES["float32"], shape=weight.shape, data=total.reshape(-1).view(np.uint8))
    narrow: NDArray[Any] = convert(stored, dtype, name).reshape(weight.shape)
    return narrow


def wide(weight: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """A weight in float32."""
    if dtype == "bfloat16":
        return (weight.astype(np.uint32) << 16).view(np.float32)
    return weight.astype(np.float32, copy=False)
