"""The gate's reference: `reference.safetensors` in a bundle, with inputs and what torch made of them in float32.

Tensors are named `unet/0/in/sample` and `unet/0/out/out`. The file's metadata holds under `cases` JSON of the form
`{"unet/0": {"dims": {"rows": 2, ...}, "torch_error": {"float16": 1.2e-3}}}`: the relative L2 error of torch itself in a
precision, on that case.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import CorruptError, MissingError

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


def read_reference(path: Path, component: str | None = None) -> list[Case]:
    """The cases of a reference file, of one component or of all. Raises `MissingError`, `CorruptError`."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise MissingError(f"the bundle has no {path.name}", remedy=EXPORT_AGAIN)
    try:
        with safe_open(path, framework="numpy") as file:
            stated = dict(json.loads((file.metadata() or {})["cases"]))
            if not stated:
                raise ValueError("it states no cases")
            names = list(file.keys())
            cases = [
                _case(file, names, name, stated[name])
                for name in sorted(stated, key=_order)
                if component is None or name.partition("/")[0] == component
            ]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptError(f"{path.name} is no reference: {error}", remedy="Export the checkpoint again.") from error
    return cases


def _order(name: str) -> tuple[str, int]:
    component, _, index = name.partition("/")
    return component, int(index)


def _case(file: Any, names: list[str], name: str, stated: Mapping[str, Any]) -> Case:
    component, index = _order(name)

    def tensors(side: str) -> dict[str, NDArray[Any]]:
        prefix = f"{name}/{side}/"
        return {n.removeprefix(prefix): file.get_tensor(n) for n in names if n.startswith(prefix)}

    outputs = tensors("out")
    if not outputs:
        raise KeyError(f"{name}/out")
    return Case(
        component=component,
        index=index,
        dims={str(k): int(v) for k, v in stated["dims"].items()},
        inputs=tensors("in"),
        outputs=outputs,
        torch_error={str(k): float(v) for k, v in stated["torch_error"].items()},
    )
