"""The gate's reference: `reference.safetensors` in a bundle, with inputs and what torch made of them in float32.

Tensors are named `unet/0/in/sample` and `unet/0/out/out`. The file's metadata holds under `cases` JSON of the form
`{"unet/0": {"dims": {"rows": 2, ...}, "torch_error": {"float16": 1.2e-3}}}`: the relative L2 error of torch itself in a
precision, on that case.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...bundle import Bundle
from ...errors import CorruptError, MissingError
from ...values import Reader, parse_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

FILE = "reference.safetensors"
EXPORT_AGAIN = "Export with the gate on, which writes it: fewstep export CHECKPOINT BUNDLE --overwrite"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One evaluation of one component: dimensions, inputs, torch's float32 outputs, torch's own error by precision."""

    component: str
    index: int
    dims: Mapping[str, int]
    inputs: Mapping[str, NDArray[Any]]
    outputs: Mapping[str, NDArray[Any]]
    torch_error: Mapping[str, float]


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stated_reference(bundle: Bundle) -> Path | None:
    """The bundle's reference file; `None` where it never had one, its export's gate being off.

    Raises `MissingError` where the manifest says that there was one and none is there, `CorruptError` for another file
    than was written: without it engines would be used that nothing was compared with. Manifests of older exports state
    no SHA-256.
    """
    path, digest = bundle.folder / FILE, bundle.gate.get("reference_sha256")
    if not path.is_file():
        if digest is None and "reference" not in bundle.gate:
            return None
        raise MissingError(
            f"the bundle has no {FILE}, with which its gate was run, so that no engine can be compared with torch",
            remedy=EXPORT_AGAIN,
        )
    if digest is not None and file_sha256(path) != digest:
        raise CorruptError(
            f"{FILE} was changed since the export", expected=f"SHA-256 {digest}", remedy="Export the checkpoint again."
        )
    return path


def read_reference(path: Path, component: str | None = None) -> list[Case]:
    """The cases of a reference file, of one component or of all. Raises `MissingError`, `CorruptError`."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise MissingError(f"the bundle has no {path.name}", remedy=EXPORT_AGAIN)
    try:
        with safe_open(path, framework="numpy") as file:
            reading = Reader(place=path.name)
            text = (file.metadata() or {})["cases"]
            stated = reading.mapping("cases", parse_json(text, f"cases of {path.name}", finite=True))
            if not stated:
                raise ValueError("it states no cases")
            names = list(file.keys())
            cases = [
                _case(file, names, name, stated[name], reading)
                for name in sorted(stated, key=_order)
                if component is None or name.partition("/")[0] == component
            ]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, CorruptError) as error:
        raise CorruptError(f"{path.name} is no reference: {error}", remedy="Export the checkpoint again.") from error
    return cases


def _order(name: str) -> tuple[str, int]:
    component, _, index = name.partition("/")
    return component, int(index)


def _case(file: Any, names: list[str], name: str, stated: object, reading: Reader) -> Case:
    component, index = _order(name)
    facts = reading.mapping(name, stated)
    dims, errors = (reading.mapping(f"{name}/{k}", facts[k]) for k in ("dims", "torch_error"))

    def tensors(side: str) -> dict[str, NDArray[Any]]:
        prefix = f"{name}/{side}/"
        return {n.removeprefix(prefix): file.get_tensor(n) for n in names if n.startswith(prefix)}

    outputs = tensors("out")
    if not outputs:
        raise KeyError(f"{name}/out")
    return Case(
        component=component,
        index=index,
        dims={k: reading.integer(f"{name}/dims/{k}", v, 1) for k, v in dims.items()},
        inputs=tensors("in"),
        outputs=outputs,
        torch_error={k: reading.number(f"{name}/torch_error/{k}", v, 0.0) for k, v in errors.items()},
    )
