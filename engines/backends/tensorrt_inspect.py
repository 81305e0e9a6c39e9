"""What a built engine of TensorRT or TensorRT-RTX is, as its inspector tells: precisions, and attention that was fused.

The inspector's JSON has had two forms. In 10.x a tensor has `Format/Datatype`; 11.x split that into `Format` and
`DataType` (Migrating IEngineInspector Usage from TensorRT 10.x to 11.x). An engine built without detail has names for
layers. What cannot be read is unknown, and is said to be.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ...errors import MismatchError

UNKNOWN = "unknown"
_PRECISIONS = {
    "float32": r"fp32|float",
    "float16": r"fp16|half",
    "bfloat16": r"bf16|bfloat16",
    "int8": r"int8",
    "fp8": r"fp8|float8|fp8e4m3|e4m3",
}
_FUSED = re.compile(r"f?mha|flash|attention", re.IGNORECASE)


def read_layers(information: str) -> list[Mapping[str, Any]]:
    """The layers that are described, of the inspector's JSON; none where it gives names alone, or nothing."""
    try:
        data = json.loads(information)
    except ValueError:
        return []
    layers = data.get("Layers", ()) if isinstance(data, dict) else ()
    return [layer for layer in layers if isinstance(layer, dict)]


def count_precisions(layers: list[Mapping[str, Any]]) -> dict[str, int]:
    """How many outputs of layers are of each precision."""
    counts = dict.fromkeys(_PRECISIONS, 0)
    for layer in layers:
        for tensor in layer.get("Outputs", ()):
            words = [str(tensor.get(k, "")) for k in ("Format/Datatype", "DataType", "Format")] if tensor else []
            # the type itself where there is one, else the format's words, which name the type last
            stated = words and (words[1] or words[0] or words[2])
            for name, spelling in _PRECISIONS.items():
                counts[name] += bool(stated and re.search(rf"\b({spelling})\b", stated, re.IGNORECASE))
    return counts


def check_precision(information: str, dtype: str) -> dict[str, int] | str:
    """Outputs of layers by precision, or `"unknown"`.

    Raises `MismatchError` when none is of the asked precision: the backend computed in another one.
    """
    counts = count_precisions(read_layers(information))
    if not sum(counts.values()):
        return UNKNOWN
    asked = dtype if dtype in counts else "float32"  # weights alone in fewer bits are multiplied as floats
    if not counts[asked]:
        raise MismatchError(
            f"the engine computes in {', '.join(n for n, c in counts.items() if c)}",
            expected=asked,
            remedy="Rebuild it with: fewstep build BUNDLE --force",
        )
    return counts


def count_fused_attention(information: str) -> int | str:
    """Layers whose kernel is a fused attention, by their names and tactics; `"unknown"` where kernels are not told."""
    layers = read_layers(information)
    told = [" ".join(str(layer.get(k, "")) for k in ("TacticName", "LayerType", "TacticValue")) for layer in layers]
    if not any(layer.get("TacticName") for layer in layers):
        return UNKNOWN
    return sum(bool(_FUSED.search(words)) for words in told)
