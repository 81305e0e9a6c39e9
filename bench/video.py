"""What a video model of full size takes without a GPU: its export, an engine of TensorRT-RTX, and one evaluation.

python bench/video.py [--frames 14] [--size 512x320] [--compute-capability 8.9] [--stages export build] [--output FILE]

Weights are random (`tools/random_video_checkpoint.py`). Each stage is a process of its own, whose peak memory is what
the system counted for it. Of the engine its build is told: bytes, seconds, attentions that came through whole. The
evaluation is of the UNet in bfloat16 by torch, of few frames at a small size: it says that it runs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from fewstep.bench.export import measured
from fewstep.bench.machine import describe

ROOT = Path(__file__).parents[1]
STAGES = ("export", "build", "evaluate")
EVALUATED = {"rows": 2, "frames": 2, "height": 16, "width": 24}
EVALUATE = """
import json, sys, time
import numpy as np
from fewstep.bundle import read_bundle
from fewstep.engines import RunOptions
from fewstep.export.backend import open_torch
dims = json.loads(sys.argv[2])
engine = open_torch(read_bundle(sys.argv[1]), "unet", RunOptions(torch_dtype="bfloat16", threads=1))
binding = engine.bind(dims)
for array in binding.inputs.values():
    array[...] = np.random.default_rng(0).standard_normal(array.shape)
began = time.perf_counter()
binding.enqueue()
out = binding.outputs["out"]
if not (np.isfinite(out).all() and out.std() > 1e-3):
    sys.exit("the UNet gives nothing")
figures = {"evaluation_s": round(time.perf_counter() - began, 1), "deviation": round(float(out.std()), 4)}
open(sys.argv[-1], "w").write(json.dumps(figures))
"""
BUILD = """
import json, sys
from pathlib import Path
from fewstep.bundle import read_bundle
from fewstep.engines import BuildOptions, Store, build_engines, profiles_for
bundle, size = read_bundle(sys.argv[1]), tuple(int(side) for side in sys.argv[2].split("x"))
built = build_engines(
    bundle,
    backend="tensorrt-rtx",
    components=["unet"],
    profiles=profiles_for(bundle, sizes=[size], guidance=True),
    options=BuildOptions(compute_capabilities=(sys.argv[3],)),
    store=Store(Path(sys.argv[4])),
)["unet"]
told = {k: v for k, v in built.entry.facts.items() if k in ("fused", "decomposed_attentions", "compute_types")}
figures = {"engine_gb": round(built.entry.length / 1e9, 2), "build_s": round(built.seconds, 1), **told}
open(sys.argv[-1], "w").write(json.dumps(figures))
"""


def stage(code: str, arguments: list[str], folder: Path, **limits: float) -> dict[str, Any]:
    """The figures of a process, with those that it writes itself."""
    words = folder.parent / "words.json"
    words.unlink(missing_ok=True)
    figures = measured([sys.executable, "-c", code, *arguments, str(words)], folder, **limits)
    return figures | (json.loads(words.read_text(encoding="utf-8")) if words.is_file() else {})


def record(name: str, figures: dict[str, Any], options: argparse.Namespace) -> None:
    """Put a stage's figures into the file, in place of older ones."""
    print(f"{name}: {figures}", flush=True)
    if options.output is None:
        return
    kept = json.loads(options.output.read_text(encoding="utf-8"))["stages"] if options.output.is_file() else {}
    data = {"machine": describe(0), "stages": {**kept, name: figures}}
    options.output.write_text(json.dumps(data, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=14)
    parser.add_argument("--size", default="512x320")
    parser.add_argument("--compute-capability", default="8.9")
    parser.add_argument("--stages", nargs="*", default=list(STAGES), choices=STAGES)
    parser.add_argument("--limit-gb", type=float, default=14.0)
    parser.add_argument("--limit-s", type=float, default=2400.0)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench" / "video", help="25 GB of room")
    parser.add_argument("--output", type=Path, help="write the figures as JSON; other stages stay")
    options = parser.parse_args()
    limits = {"limit_gb": options.limit_gb, "limit_s": options.limit_s}
    model, bundle, store = (options.folder / n for n in ("model", "bundle", "store"))
    if not model.is_dir():
        script = [sys.executable, str(ROOT / "tools" / "random_video_checkpoint.py"), str(model)]
        subprocess.run([*script, "--frames", str(options.frames)], check=True, stdout=subprocess.DEVNULL)  # noqa: S603 a program of this project, with a list of arguments and no shell
    if "export" in options.stages:
        command = [sys.executable, "-m", "fewstep", "export", str(model), str(bundle), "--overwrite", "--no-gate"]
        record("export", {"dtype": "float16"} | measured([*command, "--dtype", "fp16"], bundle, **limits), options)
    if "build" in options.stages:
        arguments = [str(bundle), options.size, options.compute_capability, str(store)]
        asked = {"frames": options.frames, "size": options.size}
        record("build", asked | stage(BUILD, arguments, store, **limits), options)
    if "evaluate" in options.stages:
        figures = stage(EVALUATE, [str(bundle), json.dumps(EVALUATED)], bundle, **limits)
        record("evaluate", {**EVALUATED, **figures}, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
