"""A bundle of three tiny graphs with real operators, its weights in safetensors to which the graphs point."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from fewstep.bundle import Bundle, Component, Defaults, Latent, Tokenizer, write_manifest
from fewstep.engines import TensorSpec
from onnx import TensorProto, helper
from safetensors.numpy import save_file

OPSET, IR = 23, 10
FACTOR = 4


def spec(name: str, dtype: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


SPECS: dict[str, tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]] = {
    "text_encoder": (
        (spec("input_ids", "int64", "prompts", 77),),
        (spec("hidden", "float32", "prompts", 77, 16),),
    ),
    "unet": (
        (
            spec("sample", "float32", "rows", 4, "height", "width"),
            spec("timestep", "float32", "rows"),
            spec("encoder_hidden_states", "float32", "rows", "tokens", 16),
        ),
        (spec("out", "float32", "rows", 4, "height", "width"),),
    ),
    "vae_decoder": (
        (spec("latent", "float32", "batch", 4, "height", "width"),),
        (spec("image", "uint8", "batch", f"height*{FACTOR}", f"width*{FACTOR}", 3), spec("finite", "bool", "batch")),
    ),
}


def weights_of(component: str, seed: int = 0) -> dict[str, np.ndarray]:
    draw = np.random.default_rng([seed, len(component)])

    def normal(*shape: int, scale: float = 0.2) -> np.ndarray:
        return (draw.standard_normal(shape) * scale).astype(np.float32)

    return {
        "text_encoder": lambda: {
            "embedding.weight": normal(64, 16),
            "norm.weight": 1 + normal(16),
            "norm.bias": normal(16),
        },
        "unet": lambda: {
            "conv_in.weight": normal(16, 4, 3, 3),
            "conv_in.bias": normal(16),
            "norm.weight": 1 + normal(16),
            "norm.bias": normal(16),
            "time.weight": normal(1, 16),
            "query.weight": normal(16, 16),
            "conv_out.weight": normal(4, 16, 3, 3),
            "conv_out.bias": normal(4),
        },
        "vae_decoder": lambda: {
            "conv.weight": normal(3 * FACTOR * FACTOR, 4, 3, 3),
            "conv.bias": normal(3 * FACTOR * FACTOR),
        },
    }[component]()


def _text_encoder() -> list[Any]:
    node = helper.make_node
    return [
        node("Gather", ["embedding.weight", "input_ids"], ["embedded"]),
        node("LayerNormalization", ["embedded", "norm.weight", "norm.bias"], ["hidden"], axis=-1),
    ]


def _unet() -> list[Any]:
    """Convolution, group normalisation, a timestep term, attention on the prompt, convolution."""
    node = helper.make_node
    return [
        node("Conv", ["sample", "conv_in.weight", "conv_in.bias"], ["features"], pads=[1, 1, 1, 1]),
        node("GroupNormalization", ["features", "norm.weight", "norm.bias"], ["normed"], num_groups=4),
        node("Sigmoid", ["normed"], ["gate"]),
        node("Mul", ["normed", "gate"], ["silu"]),
        node("Unsqueeze", ["timestep", "one"], ["column"]),
        node("Mul", ["column", "thousandth"], ["scaled"]),
        node("MatMul", ["scaled", "time.weight"], ["time"]),
        node("Reshape", ["time", "time_shape"], ["time_map"]),
        node("Add", ["silu", "time_map"], ["mixed"]),
        node("Shape", ["mixed"], ["mixed_shape"]),
        node("Reshape", ["mixed", "flat_shape"], ["flat"]),
        node("Transpose", ["flat"], ["cells"], perm=[0, 2, 1]),
        node("MatMul", ["cells", "query.weight"], ["query"]),
        node(
            "Attention",
            ["query", "encoder_hidden_states", "encoder_hidden_states"],
            ["attended"],
            q_num_heads=2,
            kv_num_heads=2,
        ),
        node("Add", ["attended", "cells"], ["residual"]),
        node("Transpose", ["residual"], ["back"], perm=[0, 2, 1]),
        node("Reshape", ["back", "mixed_shape"], ["map"]),
        node("Conv", ["map", "conv_out.weight", "conv_out.bias"], ["out"], pads=[1, 1, 1, 1]),
    ]


def _vae_decoder() -> list[Any]:
    node = helper.make_node
    return [
        node("Conv", ["latent", "conv.weight", "conv.bias"], ["packed"], pads=[1, 1, 1, 1]),
        node("DepthToSpace", ["packed"], ["pixels"], blocksize=FACTOR, mode="CRD"),
        node("Mul", ["pixels", "zero"], ["zeroed"]),
        node("ReduceSum", ["zeroed", "all_axes"], ["total"], keepdims=0),
        node("Equal", ["total", "zero"], ["finite"]),
        node("Mul", ["pixels", "half_range"], ["scaled"]),
        node("Add", ["scaled", "half_range"], ["shifted"]),
        node("Clip", ["shifted", "zero", "full_range"], ["clipped"]),
        node("Round", ["clipped"], ["rounded"]),
        node("Transpose", ["rounded"], ["last"], perm=[0, 2, 3, 1]),
        node("Cast", ["last"], ["image"], to=TensorProto.UINT8),
    ]


_NODES = {"text_encoder": _text_encoder, "unet": _unet, "vae_decoder": _vae_decoder}
_CONSTANTS: dict[str, dict[str, np.ndarray]] = {
    "text_encoder": {},
    "unet": {
        "one": np.array([1], np.int64),
        "thousandth": np.array(1e-3, np.float32),
        "time_shape": np.array([-1, 16, 1, 1], np.int64),
        "flat_shape": np.array([0, 0, -1], np.int64),
    },
    "vae_decoder": {
        "zero": np.array(0, np.float32),
        "all_axes": np.array([1, 2, 3], np.int64),
        "half_range": np.array(127.5, np.float32),
        "full_range": np.array(255, np.float32),
    },
}


def _external(name: str, array: np.ndarray, location: str, start: int, length: int) -> Any:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=array.shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", str(start)), ("length", str(length))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return tensor


def write_component(folder: Path, component: str, seed: int = 0) -> Component:
    """Write one component's graph and weights; returns what the manifest says of it."""
    graph_path, weights_path = folder / f"{component}.onnx", folder / f"{component}.safetensors"
    weights = weights_of(component, seed)
    save_file(weights, weights_path)
    raw = weights_path.read_bytes()
    header = struct.unpack("<Q", raw[:8])[0]
    layout = json.loads(raw[8 : 8 + header])
    initialisers = []
    for name, array in weights.items():
        start, end = layout[name]["data_offsets"]
        initialisers.append(_external(name, array, weights_path.name, 8 + header + start, end - start))
    initialisers += [onnx.numpy_helper.from_array(a, n) for n, a in _CONSTANTS[component].items()]
    inputs, outputs = SPECS[component]
    types = {
        "float32": TensorProto.FLOAT,
        "int64": TensorProto.INT64,
        "uint8": TensorProto.UINT8,
        "bool": TensorProto.BOOL,
    }

    def infos(specs: tuple[TensorSpec, ...]) -> list[Any]:
        return [
            helper.make_tensor_value_info(s.name, types[s.dtype], [d if "*" not in str(d) else None for d in s.shape])
            for s in specs
        ]

    nodes = _NODES[component]()
    for index, one in enumerate(nodes):
        one.name = f"{one.op_type.lower()}_{index}"
    graph = helper.make_graph(nodes, component, infos(inputs), infos(outputs), initialisers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)
    onnx.save(model, graph_path)
    onnx.checker.check_model(graph_path, full_check=True)
    return Component(
        graph=graph_path.name,
        weights=weights_path.name,
        graph_sha256=hashlib.sha256(graph_path.read_bytes()).hexdigest(),
        weights_sha256=hashlib.sha256(raw).hexdigest(),
        graph_key=f"small-{component}",
        dtype="float32",
        inputs=inputs,
        outputs=outputs,
        config={"cross_attention_dim": 16} if component == "unet" else {},
        operators={t: sum(n.op_type == t for n in nodes) for t in {n.op_type for n in nodes}},
    )


def write_bundle(folder: Path, seed: int = 0) -> Bundle:
    """Write a whole bundle with its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    bundle = Bundle(
        folder=folder,
        name="small",
        family="sd1",
        components={name: write_component(folder, name, seed) for name in SPECS},
        tokenizers=(Tokenizer(file="tokenizer.json", length=77, pad_id=0, bos_id=1, eos_id=2),),
        latent=Latent(channels=4, factor=FACTOR, multiple=2),
        scheduler={"_class_name": "EulerDiscreteScheduler"},
        defaults=Defaults(width=64, height=48, steps=2, guidance=0.0),
    )
    write_manifest(bundle)
    return bundle


def example(component: str, dims: dict[str, int], seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs of a component for these dimensions."""
    draw = np.random.default_rng(seed)
    values = {}
    for one in SPECS[component][0]:
        shape = one.resolve(dims)
        if one.dtype == "int64":
            values[one.name] = draw.integers(0, 64, shape)
        elif one.name == "timestep":
            values[one.name] = draw.uniform(1, 999, shape).astype(np.float32)
        else:
            values[one.name] = draw.standard_normal(shape).astype(np.float32)
    return values
