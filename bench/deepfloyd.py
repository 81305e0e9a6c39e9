"""DeepFloyd-IF's UNets at full size: what exporting them takes, what TensorRT-RTX makes of them, and one evaluation.

python bench/deepfloyd.py [--stages if-i if-i-l if-i-m if-ii] [--build] [--evaluate] [--output FILE]

Weights are random. if-i has the shape of IF-I-XL (4.3 billion parameters), if-i-l and if-i-m those of the two smaller
first stages that were published (0.9 and 0.4 billion). if-ii is of IF-II-L's size (1.2 billion) and
of its kinds of blocks, but not of its published configuration, which was not at hand. The text encoder is left out, as
`--without text_encoder` does, and the numeric gate too. Every step is a process of its own, and its peak memory is what
the system counted for it; building for TensorRT-RTX needs no GPU, running does.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from fewstep.bench.export import measured
from fewstep.bench.machine import describe

ROOT = Path(__file__).parents[1]
SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "beta_schedule": "squaredcos_cap_v2",
    "variance_type": "learned_range",
    "thresholding": True,
    "dynamic_thresholding_ratio": 0.95,
    "sample_max_value": 1.5,
}
BLOCKS = ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D")
SHARED: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "gelu",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 64,
    "attention_head_dim": 64,
    "cross_attention_norm": "group_norm",
    "encoder_hid_dim": 4096,
    "encoder_hid_dim_type": "text_proj",
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "out_channels": 6,
    "resnet_time_scale_shift": "scale_shift",
    "time_embedding_act_fn": "gelu",
}


def first_stage(channels: int) -> dict[str, Any]:
    """What IF's three first stages differ in is the channels of their first level."""
    return {
        "in_channels": 3,
        "sample_size": 64,
        "block_out_channels": [channels, 2 * channels, 3 * channels, 4 * channels],
        "cross_attention_dim": 4 * channels,
        "layers_per_block": 3,
        "down_block_types": [BLOCKS[0], *BLOCKS[1:] * 3],
    }


STAGES: dict[str, dict[str, Any]] = {
    "if-i": first_stage(704),
    "if-i-l": first_stage(320),
    "if-i-m": first_stage(192),
    "if-ii": {
        "in_channels": 6,
        "sample_size": 256,
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 1280,
        "layers_per_block": [2, 3, 4, 4],
        "class_embed_type": "timestep",
        "down_block_types": [*BLOCKS[:1] * 2, *BLOCKS[1:] * 2],
        "mid_block_only_cross_attention": False,
        "mid_block_scale_factor": 1.414,
        "only_cross_attention": True,
        "resnet_out_scale_factor": 1.414,
        "resnet_skip_time_act": True,
    },
}
EVALUATE = """
import json, pathlib, sys, time
import numpy as np
import fewstep, fewstep.export
folder, size = sys.argv[1], int(sys.argv[2])
pipe = fewstep.load(folder, backend="torch", size=(size, size))
embeds = np.random.default_rng(0).standard_normal((1, 77, 4096)).astype(np.float32)
told = {} if pipe.bundle.family == "if" else {"image": np.zeros((1, 3, 64, 64), np.float32)}
began = time.perf_counter()
result = pipe(prompt_embeds=embeds, steps=1, guidance=1.0, seed=0, **told)
figures = {"request_s": round(time.perf_counter() - began, 2), "evaluation_ms": result.timings["evaluations"]}
figures |= {"finite": bool(np.isfinite(result.latents).all()), "deviation": float(result.latents.std())}
place = pathlib.Path(folder).parent / "evaluated"
place.mkdir()
(place / "figures.json").write_text(json.dumps(figures))
"""


def config_of(stage: str) -> dict[str, Any]:
    own = STAGES[stage]
    turned = {"Downsample": "Upsample", "AttnDown": "AttnUp"}
    ups = list(reversed(own["down_block_types"]))
    for down, up in turned.items():
        ups = [name.replace(down, up) for name in ups]
    return {**SHARED, **own, "up_block_types": ups}


def write_zeros(path: Path, shapes: dict[str, tuple[int, ...]]) -> int:
    """A safetensors file of zeros in float16 that takes no room on the disk; returns its bytes."""
    from fewstep.weights.layout import plan_layout

    layout = plan_layout([(name, "float16", shape) for name, shape in shapes.items()])
    with path.open("wb") as file:
        file.write(layout.header)
        file.truncate(len(layout.header) + 2 * sum(math.prod(shape) for shape in shapes.values()))
    return path.stat().st_size


def write_stage(stage: str, folder: Path, *, zeros: bool) -> int:
    """A diffusers folder without a text encoder, its UNet's weights random in float16; returns their number."""
    sys.path.insert(0, str(ROOT / "tools"))
    from random_checkpoint import shapes_of, write_part

    config = config_of(stage)
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    shapes = shapes_of("unet", config)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    size = write_zeros(file, shapes) if zeros else write_part(file, shapes, "float16", 0)
    index: dict[str, Any] = {
        "_class_name": "IFPipeline" if stage.startswith("if-i-") or stage == "if-i" else "IFSuperResolutionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        **{name: [None, None] for name in ("text_encoder", "tokenizer")},
    }
    for name in ("scheduler", *(("image_noising_scheduler",) if stage == "if-ii" else ())):
        (folder / name).mkdir()
        plain = {k: SCHEDULER[k] for k in ("_class_name", "beta_schedule")}
        own = SCHEDULER if name == "scheduler" else plain
        (folder / name / "scheduler_config.json").write_text(json.dumps(own))
        index[name] = ["diffusers", "DDPMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return size // 2


def fused_attentions(bundle: Path) -> int:
    return int(json.loads((bundle / "bundle.json").read_text())["components"]["unet"]["operators"].get("Attention", 0))


def fused_in_engine(store: Path) -> dict[str, int]:
    """How many of the UNet's attentions came through fused."""
    for manifest in store.glob("unet.*/manifest.json"):
        return {"fused_attentions": int(json.loads(manifest.read_text())["facts"]["fused"]["Attention"])}
    return {}


def run(stage: str, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    size, fewstep = STAGES[stage]["sample_size"], [sys.executable, "-m", "fewstep"]
    limits = {"limit_gb": options.limit_gb, "limit_s": options.limit_s}
    row: dict[str, Any] = {
        "stage": stage,
        "parameters": write_stage(stage, work / "checkpoint", zeros=options.zeros),
        "weights": "zeros" if options.zeros else "random",
        "dtype": options.dtype,
    }
    command = [*fewstep, "export", str(work / "checkpoint"), str(work / "out"), "--no-gate", "--dtype", options.dtype]
    row["export"] = measured(command, work / "out", **limits)
    shutil.rmtree(work / "checkpoint")
    row["attentions"] = fused_attentions(work / "out")
    if options.build:
        command = [*fewstep, "build", str(work / "out"), "--backend", "tensorrt-rtx", "--compute-capability", "8.9"]
        command += ["--size", f"{size}x{size}", "--json"]
        row["tensorrt_rtx"] = measured(command, work / "cache", **limits) | fused_in_engine(work / "cache" / "engines")
    if options.evaluate:
        code = [sys.executable, "-c", EVALUATE, str(work / "out"), str(size)]
        row["evaluation"] = measured(code, work / "evaluated", **limits)
        figures = work / "evaluated" / "figures.json"
        row["evaluation"] |= json.loads(figures.read_text()) if figures.is_file() else {}
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="*", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--dtype", default="bf16", choices=("fp16", "bf16", "fp32"))
    parser.add_argument("--zeros", action="store_true", help="weights of zero, where an export alone is measured")
    parser.add_argument("--build", action="store_true", help="for TensorRT-RTX, which takes no GPU")
    parser.add_argument("--evaluate", action="store_true", help="one step by torch on the CPU")
    parser.add_argument("--limit-gb", type=float, default=14.0)
    parser.add_argument("--limit-s", type=float, default=1800.0)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench", help="a disk with 20 GB of room")
    parser.add_argument("--output", type=Path, help="write the figures as JSON; rows of other stages stay")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for stage in options.stages:
        with tempfile.TemporaryDirectory(dir=options.folder, prefix="deepfloyd-") as folder:
            row = run(stage, options, Path(folder))
        print(json.dumps(row), flush=True)
        if options.output is not None:
            record(row, options.output)
    return 0


def record(row: dict[str, Any], path: Path) -> None:
    """Put a row into the file of figures, in place of an older one of the same stage and precision."""
    kept = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    rows = [r for r in kept if (r["stage"], r["dtype"]) != (row["stage"], row["dtype"])] + [row]
    data = {"machine": describe(0), "rows": sorted(rows, key=lambda r: str(r["stage"]))}
    path.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
