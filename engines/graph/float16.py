"""Half precision for ONNX Runtime on CUDA: converted after fusion, because the fusions match float32 graphs only.

Inputs and outputs stay float32, and so do the operators and the side inputs (of normalisations and resizes) that
onnxruntime's own list keeps. Needs the modules `onnx` and `onnxruntime`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import MissingExtraError


def convert_saved(model: Path, data: Path) -> int:
    """Convert a saved graph, whose weights lie in `data` beside it, in place; returns how many weights are half now."""
    onnx, float16 = _import()
    graph = onnx.load(str(model))
    # float16(x) = x (1 + e) with |e| <= 2^-11 for 2^-14 <= |x| <= 65504; what leaves that range stays between Casts
    half = float16.convert_float_to_float16(
        graph,
        keep_io_types=True,
        disable_shape_infer=True,
        op_block_list=[*float16.DEFAULT_OP_BLOCK_LIST, "DepthToSpace"],
        force_fp16_initializers=False,
    )
    model.unlink()
    data.unlink(missing_ok=True)
    onnx.save(
        half,
        str(model),
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location=data.name,
        size_threshold=1024,
    )
    return sum(i.data_type == onnx.TensorProto.FLOAT16 for i in half.graph.initializer)


def _import() -> tuple[Any, Any]:
    try:
        import onnx
        from onnxruntime.transformers import float16
    except ImportError as error:
        raise MissingExtraError("onnx", "export", purpose="the conversion to half precision") from error
    return onnx, float16
