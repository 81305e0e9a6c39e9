"""Tracing a component's configuration into an ONNX graph that holds no weights.

The modules are built on fake tensors, so that even the largest UNet takes no more memory than its graph. Every
parameter keeps its checkpoint name; `layout.py` says where its bytes will lie in the bundle's safetensors file, and the
graph's initialisers point there.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import optimizer
from torch._subclasses.fake_tensor import FakeTensorMode

from ...engines.base import TensorSpec
from ...errors import FewstepError, UnsupportedError
from ...families import Family
from ...weights.layout import plan_layout
from .clip_blocks import plain_clip_blocks
from .graphs import Parameter, TracedGraph
from .modules import Traceable, build_model, plain_upsamplers, wrap
from .undecomposed import undecomposed

OPSET = 23
IR_VERSION = 10
CONVOLUTIONAL = ("unet", "vae_decoder", "vae_encoder")
"""Components whose graphs come out the same without decompositions; text encoders keep two reshapes, and are small."""
_NAMES = {"FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16", "INT64": "int64"}


def trace_component(kind: str, config: Mapping[str, Any], dtype: str, family: Family, *, key: str) -> TracedGraph:
    """Trace one component of a checkpoint.

    `config` is the component's own configuration; two keys of ours may be added to a text encoder's: `_class` and
    `_layer`. Takes seconds for small models and one to two minutes for a UNet of 2.6 billion. `UnsupportedError` for a
    configuration of which no model can be made, or none that can be traced.
    """
    with _quiet(), _refusing(kind), undecomposed() if kind in CONVOLUTIONAL else nullcontext():
        with FakeTensorMode(allow_non_fake_inputs=True):
            traceable = wrap(kind, build_model(kind, config, dtype), config, dtype, family)
            if kind == "unet":
                plain_upsamplers(traceable.module)
            if family.clips:
                plain_clip_blocks(traceable.module)
            program = torch.onnx.export(
                traceable.module,
                kwargs=_example(traceable),
                dynamo=True,
                opset_version=OPSET,
                optimize=False,
                dynamic_shapes={s.name: _dynamic(s) for s in traceable.inputs},
                input_names=[s.name for s in traceable.inputs],
                output_names=[s.name for s in traceable.outputs],
                verbose=False,
            )
        if program is None or program.model is None:
            raise RuntimeError("torch's exporter gave no program")
        return _finish(kind, program.model, traceable, key=key, dtype=dtype)


@contextmanager
def _refusing(kind: str) -> Iterator[None]:
    """Say what the libraries' own errors mean, and let an interrupt through that they took for one of theirs."""
    try:
        yield
    except (FewstepError, MemoryError):
        raise
    except Exception as error:
        for cause in _causes(error):
            if isinstance(cause, KeyboardInterrupt) or "KeyboardInterrupt" in str(cause):
                raise KeyboardInterrupt from error
        *_, first = _causes(error)
        sentence = (str(first).strip().splitlines() or [type(first).__name__])[0]
        raise UnsupportedError(
            f"no graph can be made of the {kind}'s configuration: {sentence[:200]}",
            expected="a config.json that diffusers or transformers reads",
            remedy="Take the whole checkpoint; if it is as published, report it with its config.json.",
        ) from error


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what it was raised for, the first of them last."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _example(traceable: Traceable) -> dict[str, torch.Tensor]:
    types = {"float32": torch.float32, "int64": torch.int64}
    return {s.name: torch.zeros(s.resolve(traceable.example), dtype=types[s.dtype]) for s in traceable.inputs}


def _dynamic(spec: TensorSpec) -> dict[int, Any]:
    """Named dimensions; a multiple is left to torch, which derives it."""
    return {i: d if "*" not in d else torch.export.Dim.DYNAMIC for i, d in enumerate(spec.shape) if isinstance(d, str)}


def _finish(kind: str, model: ir.Model, traceable: Traceable, *, key: str, dtype: str) -> TracedGraph:
    """Cut the weights out, optimise what is left, state the promised shapes, and clear the traces."""
    weights = set(dict(traceable.module.named_parameters()))
    for name, value in list(model.graph.initializers.items()):
        if name in weights:
            value.const_value = None  # nothing that touches a weight may be folded
            continue
        if name.endswith("position_ids"):
            length = value.shape[1]
            value.const_value = ir.tensor(np.arange(length, dtype=np.int64)[None], name=name)
        elif any(name == n for n, _ in traceable.module.named_buffers()):
            raise UnsupportedError(f"the {kind} has a buffer {name!r} whose values a weightless trace cannot know")
    optimizer.optimize(model, input_size_limit=1024, output_size_limit=4096, onnx_shape_inference=False)
    used = {v.name for node in model.graph for v in node.inputs if v is not None and v.name in weights}
    for name in [n for n in model.graph.initializers if n in weights and n not in used]:
        del model.graph.initializers[name]
    file = f"{kind}.safetensors"
    parameters = []
    for name in sorted(used):
        value = model.graph.initializers[name]
        parameters.append(
            Parameter(
                name=name,
                key=_checkpoint_key(kind, name),
                dtype=_NAMES[value.dtype.name],
                shape=tuple(int(d) for d in value.shape),
            )
        )
    layout = plan_layout([(p.name, p.dtype, p.shape) for p in parameters])
    for p in parameters:
        value = model.graph.initializers[p.name]
        begin, size = layout.places[p.name]
        value.const_value = ir.ExternalTensor(
            location=file,
            offset=begin,
            length=size,
            dtype=value.dtype,
            shape=ir.Shape(p.shape),
            name=p.name,
            base_dir="",
        )
    _clear(model, traceable)
    operators = Counter(node.op_type for node in model.graph.all_nodes())
    return TracedGraph(
        key=key,
        kind=kind,
        dtype=dtype,
        parameters=tuple(parameters),
        inputs=traceable.inputs,
        outputs=traceable.outputs,
        operators=dict(sorted(operators.items())),
        header_sha256=layout.sha256,
        onnx=ir.to_proto(model).SerializeToString(deterministic=True),
    )


def _clear(model: ir.Model, traceable: Traceable) -> None:
    """Drop stack traces and file paths, and state shapes by the contract's names."""
    model.ir_version = IR_VERSION
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.producer_name, model.producer_version, model.doc_string = "fewstep", "", None
    model.graph.name = "main"
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for values, specs in ((model.graph.inputs, traceable.inputs), (model.graph.outputs, traceable.outputs)):
        for value, spec in zip(values, specs, strict=True):
            value.name = spec.name
            value.metadata_props.clear()
            value.shape = ir.Shape([d if isinstance(d, int) or "*" not in d else None for d in spec.shape])
    for value in model.graph.initializers.values():
        value.metadata_props.clear()


def _checkpoint_key(kind: str, name: str) -> str:
    """The parameter's name in the checkpoint: without the wrapper's own attribute."""
    return name if kind in {"vae_decoder", "vae_encoder"} else name.removeprefix("model.")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks on absent weights and deprecated internals from the user's terminal."""
    loggers = [
        logging.getLogger(n)
        for n in ("torch.onnx", "torch.onnx._internal.exporter._registration", "torch.export", "onnx_ir", "onnxscript")
    ]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
