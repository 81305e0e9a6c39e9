"""The gate's reference: structured inputs and what torch makes of them in float32, written into one safetensors file.

Runs in a process of its own (`python -m fewstep.export.gate.reference CHECKPOINT FILE`), because it is the one part of
an export that holds whole models. The models are loaded by diffusers and transformers themselves, not through our
weights, so that a weight under a wrong name shows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import nn

from ...agreement import ATTENTION_MASK
from ...families.base import Family, halvings, latent_multiple
from ...families.image_prompt import IMAGE_ENCODER
from ...families.t5 import T5
from ..checkpoint.compose import compose_checkpoint
from ..checkpoint.folder import Checkpoint
from ..plan import ComponentPlan, plan_components
from ..trace.modules import DTYPES, Traceable, wrap
from .clips import make_clips
from .loading import load_adapted, lora_method
from .pictures import make_pictures

TIMESTEPS = (999.0, 749.0, 499.0, 249.0, 24.0, 1.0)
LARGEST_SIDE, QUICK_SIDE = 32, 16
DOUBLE_LIMIT = 40_000_000
MOST_FRAMES = 6
"""Of a clip: what a frame has of others shows in few."""


def make_reference(
    checkpoint: Checkpoint,
    path: Path,
    *,
    dtypes: Mapping[str, str],
    quick: bool = False,
    plans: Sequence[ComponentPlan] | None = None,
    context: Mapping[str, dict[str, np.ndarray]] | None = None,
) -> None:
    """Write inputs, float32 outputs, and torch's own error in each component's precision.

    Tensors are named `unet/0/in/sample`, `unet/0/out/out`; the metadata's `cases` holds JSON: the dimensions of each
    case and `torch_error`, the relative L2 error of torch in `dtypes[component]` (for float32: against float64, where
    the model is small enough, and in bfloat16, which an engine of a float32 graph may use too). `quick` keeps one case
    a component (two of an encoder), for models of full size. plans: of some components alone; context: the outputs of
    the encoders that are not among them.
    """
    tensors: dict[str, np.ndarray] = {}
    cases: dict[str, Any] = {}
    known = dict(context or {})
    for plan in plan_components(checkpoint, dtypes) if plans is None else plans:
        model = load_adapted(checkpoint, plan)
        traceable = _in(plan, model, "float32")
        fewer = 2 if plan.kind.startswith("text_encoder") else 1  # an encoder's second case skips a layer
        inputs = list(_cases(plan, traceable, known, quick=quick))[: fewer if quick else None]
        outputs = [_run(traceable, case) for case in inputs]
        if plan.kind in _encoders(plan.family):
            known[plan.kind] = outputs[0]
        errors = _own_errors(checkpoint, plan, traceable, inputs, outputs)
        if plan.dtype == "float32":
            errors = [e | b for e, b in zip(errors, _bfloat16_errors(plan, model, inputs, outputs), strict=True)]
        for i, (given, output) in enumerate(zip(inputs, outputs, strict=True)):
            tensors |= {f"{plan.kind}/{i}/in/{k}": v for k, v in given.items()}
            tensors |= {f"{plan.kind}/{i}/out/{k}": v for k, v in output.items()}
            cases[f"{plan.kind}/{i}"] = {"dims": _dims(traceable, given), "torch_error": errors[i]}
        del model, traceable  # before the next model is loaded
    pictures, asked = (make_clips if checkpoint.model.clips else make_pictures)(checkpoint)
    part = path.with_suffix(".part")
    save_file(
        {k: np.ascontiguousarray(v) for k, v in (tensors | pictures).items()},
        part,
        metadata={
            "cases": json.dumps(cases),
            "pictures": json.dumps(asked),
            "torch": torch.__version__,
            "lora": lora_method(checkpoint),
        },
    )
    part.replace(path)


def _encoders(family: Family) -> tuple[str, ...]:
    """The components whose outputs its UNet attends to."""
    names = tuple(e.name for e in family.text_encoders)
    return names if family.image_encoder is None else (*names, IMAGE_ENCODER)


def _load(checkpoint: Checkpoint, plan: ComponentPlan, dtype: str) -> Traceable:
    return _in(plan, load_adapted(checkpoint, plan), dtype)


def _in(plan: ComponentPlan, model: nn.Module, dtype: str) -> Traceable:
    return wrap(plan.network, model if dtype == "float32" else model.to(DTYPES[dtype]), plan.config, dtype, plan.family)


@torch.no_grad()
def _run(traceable: Traceable, case: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    out = traceable.module(**{k: torch.from_numpy(v) for k, v in case.items()})
    values = out if isinstance(out, tuple) else (out,)
    return {s.name: v.numpy() for s, v in zip(traceable.outputs, values, strict=True)}


def _own_errors(
    checkpoint: Checkpoint,
    plan: ComponentPlan,
    traceable: Traceable,
    inputs: list[dict[str, np.ndarray]],
    outputs: list[dict[str, np.ndarray]],
) -> list[dict[str, float]]:
    """How far torch itself is from the reference in the component's precision, by case: {dtype: relative L2 error}."""
    if plan.dtype == "float32":
        if sum(p.numel() for p in traceable.module.parameters()) > DOUBLE_LIMIT or plan.network == "vae_decoder":
            return [{} for _ in inputs]
        exact = [_run_double(traceable, case) for case in inputs]
        return [{"float32": _distance(output, true)} for output, true in zip(outputs, exact, strict=True)]
    other = _load(checkpoint, plan, plan.dtype)
    return [{plan.dtype: _distance(_run(other, case), output)} for case, output in zip(inputs, outputs, strict=True)]


def _bfloat16_errors(
    plan: ComponentPlan, model: nn.Module, inputs: list[dict[str, np.ndarray]], outputs: list[dict[str, np.ndarray]]
) -> list[dict[str, float]]:
    """How far torch is from the reference in bfloat16, by case; converts the model in place, for good."""
    other = _in(plan, model, "bfloat16")
    return [{"bfloat16": _distance(_run(other, case), output)} for case, output in zip(inputs, outputs, strict=True)]


def _run_double(traceable: Traceable, case: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The float32 module's function in float64; its wrappers' final casts to float32 are all that stays of float32."""
    module = traceable.module.double()
    if hasattr(module, "dtype"):
        module.dtype = torch.float64
    try:
        return _run(traceable, case)
    finally:
        module.float()
        if hasattr(module, "dtype"):
            module.dtype = torch.float32


def _distance(output: Mapping[str, np.ndarray], true: Mapping[str, np.ndarray]) -> float:
    """The largest relative L2 error over a case's float outputs."""
    worst = 0.0
    for name, value in true.items():
        if value.dtype == np.bool_:
            continue
        a, b = output[name].astype(np.float64), value.astype(np.float64)
        worst = max(worst, float(np.linalg.norm(a - b)) / max(float(np.linalg.norm(b)), 1e-30))
    return worst


def _dims(traceable: Traceable, case: Mapping[str, np.ndarray]) -> dict[str, int]:
    dims: dict[str, int] = {}
    for spec in traceable.inputs:
        for dimension, size in zip(spec.shape, case[spec.name].shape, strict=True):
            if isinstance(dimension, str):
                name, _, factor = dimension.partition("*")
                dims[name] = size // int(factor or 1)
    return dims


def _cases(
    plan: ComponentPlan, traceable: Traceable, context: Mapping[str, Mapping[str, np.ndarray]], *, quick: bool
) -> Iterator[dict[str, np.ndarray]]:
    """Inputs of several shapes and batch sizes: noise mixed with smooth and sharp patterns, never noise alone.

    `quick` takes small ones: torch's convolutions in float16 are forty times slower than its others on a CPU.
    """
    rng = np.random.default_rng(2024)
    if plan.kind.startswith("text_encoder"):
        yield from (_token_case(plan, rng, prompts, skip) for prompts, skip in ((2, 0), (1, 1), (3, 0)))
    elif plan.kind == "unet":
        yield from _unet_cases(plan, traceable, context, rng, quick=quick)
    else:
        name = traceable.inputs[0].name
        channels = int(traceable.inputs[0].shape[1])
        for batch, height, width in ((1, 8, 8),) if quick else ((1, 16, 16), (2, 8, 12)):
            dims = {str(traceable.inputs[0].shape[0]): batch, "height": height, "width": width}
            shape = traceable.inputs[0].resolve(dims)
            base = _pattern(shape)
            value = base + (0.02 if name == "image" else 0.3) * rng.standard_normal(shape)
            yield {name: (np.clip(value, -1, 1) if name == "image" and channels == 3 else value).astype(np.float32)}


def _token_case(plan: ComponentPlan, rng: np.random.Generator, prompts: int, skip: int) -> dict[str, np.ndarray]:
    length, size = plan.config["max_position_embeddings"], plan.config["vocab_size"]
    if plan.config["_class"] == T5:
        counts = rng.integers(1, length + 1, prompts)
        mask = (np.arange(length) < counts[:, None]).astype(np.int64)
        return {"input_ids": mask * rng.integers(0, size, (prompts, length)), ATTENTION_MASK: mask}
    begin, end = size - 2, size - 1
    ids = np.full((prompts, length), end, np.int64)
    ids[:, 0] = begin
    for row in ids:
        words = int(rng.integers(0, length - 1))
        row[1 : 1 + words] = rng.integers(0, begin, words)
    return {"input_ids": ids, "clip_skip": np.array([skip], np.int64)}


def _unet_cases(
    plan: ComponentPlan,
    traceable: Traceable,
    context: Mapping[str, Mapping[str, np.ndarray]],
    rng: np.random.Generator,
    *,
    quick: bool,
) -> Iterator[dict[str, np.ndarray]]:
    whole = 1 << halvings(plan.config)
    odd = int(latent_multiple(plan.config) < whole)  # sizes at which upsamplers are told where to end
    largest = QUICK_SIDE if quick else LARGEST_SIDE
    size = plan.config.get("sample_size") or largest
    side = max(whole, min(size if isinstance(size, int) else size[0], largest) // whole * whole)
    encoders = [context[n] for n in _encoders(plan.family) if n in context]
    spec = next(s for s in traceable.inputs if s.name == "encoder_hidden_states")
    if encoders:
        hidden = plan.family.join(encoders)["encoder_hidden_states"][:1]
    else:  # of a checkpoint that is exported without them
        hidden = rng.standard_normal(spec.resolve({"rows": 1, "tokens": 77})).astype(np.float32)
    frames = min(plan.family.frames(plan.config), MOST_FRAMES)
    at = 0
    sizes = ((1, side, side), (2, side, side + whole), (3, 2 * whole + odd, 2 * whole - odd))
    for rows, height, width in ((1, side + odd, side),) if quick else sizes:
        t = np.array([TIMESTEPS[(at + i) % len(TIMESTEPS)] for i in range(rows)], np.float32)
        at += rows
        shapes = {
            s.name: s.resolve(
                {"rows": rows, "height": height, "width": width, "tokens": hidden.shape[1], "frames": frames - at % 2}
            )
            for s in traceable.inputs
        }
        noise = (t / 1000.0).reshape(-1, *(1,) * (len(shapes["sample"]) - 1))
        case = {
            "sample": (
                np.sqrt(1 - noise**2) * _pattern(shapes["sample"]) + noise * rng.standard_normal(shapes["sample"])
            ).astype(np.float32),
            "timestep": t,
            "encoder_hidden_states": np.repeat(hidden, rows, 0)
            * (1 + 0.1 * np.arange(rows, dtype=np.float32)).reshape(-1, 1, 1),
        }
        for condition in plan.family.conditions(plan.config):
            if condition.adapter is not None:
                case[condition.name] = _of_adapter(shapes[condition.name], rng)
            elif condition.example is not None:
                case[condition.name] = np.resize(np.array(condition.example, np.float32), shapes[condition.name])
            elif condition.name not in case:
                case[condition.name] = rng.standard_normal(shapes[condition.name]).astype(np.float32)
        yield {k: np.ascontiguousarray(v, np.float32) for k, v in case.items()}


def _of_adapter(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """A picture with a little noise, or factors of which the last row's are zero: both from 0 to 1."""
    if len(shape) == 4:
        return np.clip(_pattern(shape) / 2 + 0.5 + 0.02 * rng.standard_normal(shape), 0, 1)
    factors = rng.uniform(0.2, 1.0, shape)
    factors[1:][-1:] = 0.0
    return factors


def _pattern(shape: tuple[int, ...]) -> np.ndarray:
    """A gradient, a disc and a checkerboard, by channel: [B, C, h, w] in [-1, 1]; of frames each a little fainter."""
    if len(shape) == 5:
        return _pattern((shape[0] * shape[1], *shape[2:])).reshape(shape)
    batch, channels, height, width = shape
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    kinds = [x, np.where(x**2 + y**2 < 0.4, 1.0, -1.0), np.sign(np.sin(9 * x) * np.sin(9 * y) + 1e-9) * 0.8, y]
    image = np.stack([kinds[c % len(kinds)] for c in range(channels)])
    return np.stack([image * 0.8**b for b in range(batch)])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fewstep.export.gate.reference")
    parser.add_argument("checkpoint")
    parser.add_argument("file", type=Path)
    parser.add_argument("--dtypes", default="{}", help="JSON: component -> precision")
    parser.add_argument("--options", default="{}", help="JSON: further arguments of compose_checkpoint")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(argv)
    checkpoint = compose_checkpoint(options.checkpoint, **json.loads(options.options))
    make_reference(checkpoint, options.file, dtypes=json.loads(options.dtypes), quick=options.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
