"""Tensors as they lie in safetensors files: read in place, converted one at a time."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from ..errors import CorruptError, MissingError, PickledFileError, UnsupportedError
from ..values import parse_json

_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_INTEGERS = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1"}
CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int8": "I8", "uint8": "U8"} | {
    "float8": "F8_E4M3"
}
"""Safetensors' codes of the precisions that bundles have."""
PICKLES = {".ckpt", ".pt", ".pth", ".bin", ".pkl"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One tensor as it lies in a file: safetensors' dtype code, shape, and its bytes as a read-only array.

    `release` lets go of the memory that reading it took; its bytes stay readable.
    """

    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray
    release: Callable[[], None] = field(default=lambda: None, repr=False, compare=False)


def open_tensors(paths: Iterable[Path]) -> dict[str, Stored]:
    """Map the tensors of safetensors files, without reading them.

    The safetensors library checks each file first; only then are the offsets of its header used. Raises
    `UnsafeFileError` for pickles, `CorruptError` for a file that is no valid safetensors file.
    """
    stored: dict[str, Stored] = {}
    for path in paths:
        if path.suffix in PICKLES:
            raise PickledFileError(path.name)
        if not path.is_file():
            raise MissingError(f"no file {str(path)!r}", expected="a .safetensors file")
        try:
            with safe_open(path, framework="np") as file:
                names = set(file.keys())
            stored.update(_map(path, names))
        except (SafetensorError, OSError, ValueError) as error:
            raise CorruptError(
                f"{path.name} is not a valid safetensors file ({error})", remedy="Fetch it again: it may be truncated."
            ) from error
    return stored


def _map(path: Path, names: set[str]) -> dict[str, Stored]:
    with path.open("rb") as file:
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    start = 8 + int.from_bytes(view[:8], "little")
    header = parse_json(view[8:start], f"the header of {path.name}", remedy="Fetch it again.", finite=True)
    tensors = {}
    for name in names:
        entry = header[name]
        code, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        raw = np.frombuffer(view, dtype=np.uint8, count=end - begin, offset=start + begin)
        release = partial(_drop_pages, view, start + begin, start + end)
        tensors[name] = Stored(dtype=code, shape=shape, data=raw, release=release)
    return tensors


def _drop_pages(view: mmap.mmap, begin: int, end: int) -> None:
    """Unmap the pages of a byte range: what was read of a file would otherwise count as memory to the end."""
    first = begin // mmap.PAGESIZE * mmap.PAGESIZE
    if end > first and hasattr(mmap, "MADV_DONTNEED"):
        view.madvise(mmap.MADV_DONTNEED, first, end - first)


def as_array(stored: Stored) -> np.ndarray:
    """A tensor as it lies in its file, without a copy; bfloat16 as its bits, in uint16."""
    kind = {**_FLOATS, **_INTEGERS}.get(stored.dtype)
    if kind is None:
        raise UnsupportedError(f"a tensor of the type {stored.dtype}", expected=", ".join({**_FLOATS, **_INTEGERS}))
    return stored.data.view(kind).reshape(stored.shape)


def convert(stored: Stored, dtype: str, name: str) -> np.ndarray:
    """A weight's values in another precision, as a flat array.

    Raises `CorruptError` for a weight that is no float, or whose values are not finite or not so in float32, and
    `UnsupportedError` for floats of 8 bits and for values that are finite, but not in `dtype`.
    """
    if dtype == "int64" and stored.dtype == "I64":
        return stored.data.view("<i8")
    raw = stored.data.view(_FLOATS[_float_code(stored, name)])
    wide = _bf16_to_f32(raw) if stored.dtype == "BF16" else raw
    if not np.isfinite(wide).all():
        raise CorruptError(
            f"tensor {name!r} holds NaN or infinity",
            expected="finite weights",
            remedy="Take another copy of the checkpoint.",
        )
    if CODES[dtype] == stored.dtype:
        return raw
    with np.errstate(over="ignore"):
        single = wide.astype(np.float32)
        if stored.dtype == "F64" and not np.isfinite(single).all():
            raise CorruptError(
                f"tensor {name!r} holds values of float64 that float32 does not",
                expected="weights below 3.4e38",
                remedy="Take another copy of the checkpoint.",
            )
        if dtype == "float32":
            return single
        values = _f32_to_bf16(single) if dtype == "bfloat16" else single.astype(np.float16)
    if not np.isfinite(_bf16_to_f32(values) if dtype == "bfloat16" else values).all():
        others = "bfloat16 or float32" if dtype == "float16" else "float32"
        raise UnsupportedError(
            f"tensor {name!r} does not fit {dtype}", remedy=f"Export this component with --dtype {others}."
        )
    return values


def read_number(stored: Stored, name: str) -> float:
    """A tensor of one element, of floats or of integers (a LoRA's alpha may be either), as a number."""
    if stored.dtype in _INTEGERS:
        return float(stored.data.view(_INTEGERS[stored.dtype])[0])
    return float(convert(stored, "float32", name)[0])


def _float_code(stored: Stored, name: str) -> str:
    """The dtype of a weight; only a tensor that is needed is asked."""
    if stored.dtype in _FLOATS:
        return stored.dtype
    expected = f"one of {', '.join(_FLOATS)}"
    if stored.dtype.startswith("F"):
        raise UnsupportedError(
            f"weight {name!r} has dtype {stored.dtype}",
            expected=expected,
            remedy="Take the checkpoint in float16 or float32, or convert it first.",
        )
    raise CorruptError(
        f"weight {name!r} has dtype {stored.dtype}", expected=expected, remedy="Take another copy of the checkpoint."
    )


def _bf16_to_f32(raw: np.ndarray) -> np.ndarray:
    return (raw.astype(np.uint32) << 16).view(np.float32)


def _f32_to_bf16(values: np.ndarray) -> np.ndarray:
    """Round to nearest, ties to even, on the bit patterns."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
