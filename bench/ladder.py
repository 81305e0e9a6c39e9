"""The ladder: an evaluation with nothing beside the UNet, a LoRA, a ControlNet, and both, beside diffusers.

    python bench/ladder.py BUNDLE CONTROLLED CHECKPOINT CONTROLNET [--size WxH] [--rank N] [--passes N] [--rounds N]
        [--threads N] [--json FILE]

CONTROLLED is the bundle that was exported with the ControlNet. Each rung of each side is a process of its own, whose
peak of memory the system counts from its start to its end; all have the same weights and the same inputs of two rows.
Passes go over all of them; figures are medians over all evaluations but each process's first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from fewstep.engines.machine import peak_memory

RUNGS = {"none": (False, False), "LoRA": (True, False), "ControlNet": (False, True), "both": (True, True)}
"""Whether there is a LoRA, and a ControlNet."""
SIDES = ("fewstep", "diffusers")
NAME, SCALE = "canny", 0.8


def inputs_of(size: tuple[int, int], tokens: int, width: int) -> dict[str, np.ndarray]:
    """The same for all: two rows of latents of 4 channels, prompts, and a picture of float32 [2, 3, H, W]."""
    random = np.random.default_rng(0)
    cells = size[1] // 8, size[0] // 8
    return {
        "sample": random.normal(size=(2, 4, *cells)).astype(np.float32),
        "timestep": np.full(2, 500.0, np.float32),
        "encoder_hidden_states": random.normal(size=(2, tokens, width)).astype(np.float32),
        "picture": random.random((2, 3, size[1], size[0])).astype(np.float32),
    }


def ours(options: argparse.Namespace, lora: bool, control: bool) -> Callable[[], np.ndarray]:
    """An evaluation of the runtime's own engine."""
    from fewstep.engines.low_rank import bucket
    from fewstep.families.control import picture_input, scale_input
    from fewstep.runtime.device.base import unet_dims
    from fewstep.runtime.loader import load

    pipe = load(options.controlled if control else options.bundle, size=options.size, threads=options.threads)
    shape, rank, changed = (4, options.size[1] // 8, options.size[0] // 8), None, {}
    engine = pipe.engines["unet"]
    if lora:
        change = pipe.loras.changes(((str(options.lora), "", 1.0),))["unet"]
        rank = bucket(change.rank)
        adapted = pipe.adapted.of("unet", change.kernels)
        engine, changed = adapted.engine, change.packed(adapted.layers, rank)
    binding = engine.bind(unet_dims(shape, 2, pipe.text.length, *(() if rank is None else (rank,))))
    width = binding.inputs["encoder_hidden_states"].shape[-1]
    arrays = inputs_of(options.size, pipe.text.length, width)
    picture = arrays.pop("picture")
    for name, value in {**arrays, **changed}.items():
        binding.inputs[name][...] = value
    if control:
        binding.inputs[picture_input(NAME)][...] = picture
        binding.inputs[scale_input(NAME)][...] = SCALE

    def evaluate() -> np.ndarray:
        binding.enqueue()
        return np.asarray(binding.outputs["out"])

    return evaluate


def theirs(options: argparse.Namespace, lora: bool, control: bool) -> Callable[[], np.ndarray]:
    """The same by diffusers' modules, eagerly."""
    import diffusers
    import torch

    torch.set_num_threads(options.threads)
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(options.checkpoint)
    net: Any = diffusers.ControlNetModel.from_pretrained(options.controlnet) if control else None
    if lora:
        pipe.load_lora_weights(str(options.lora.parent), weight_name=options.lora.name)
    width = pipe.unet.config.cross_attention_dim
    arrays = {
        n: torch.from_numpy(a) for n, a in inputs_of(options.size, pipe.tokenizer.model_max_length, width).items()
    }
    picture = arrays.pop("picture")

    def evaluate() -> np.ndarray:
        with torch.no_grad():
            more: dict[str, Any] = {}
            if net is not None:
                down, middle = net(**arrays, controlnet_cond=picture, conditioning_scale=SCALE, return_dict=False)
                more = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
            return np.asarray(pipe.unet(**arrays, **more, return_dict=False)[0])

    return evaluate


def one(options: argparse.Namespace) -> None:
    """A rung of a side: evaluations, the peak of memory, and the output into a file."""
    side, rung = options.one.split(":")
    began = time.perf_counter()
    evaluate = (ours if side == "fewstep" else theirs)(options, *RUNGS[rung])
    out = evaluate()
    ready_s, times = time.perf_counter() - began, []
    for _ in range(options.rounds):
        began = time.perf_counter()
        evaluate()
        times.append(1e3 * (time.perf_counter() - began))
    np.save(options.output, out)
    peak = peak_memory() or 0
    print(json.dumps({"milliseconds": times, "ready_s": ready_s, "peak_bytes": peak}))


def run_all(options: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """Every rung of every side, pass after pass; what each process said, joined."""
    results: dict[str, dict[str, Any]] = {}

    def run(side: str, rung: str, *more: str) -> dict[str, Any]:
        command = [sys.executable, __file__, *sys.argv[1:], "--one", f"{side}:{rung}", "--lora", str(options.lora)]
        command += ["--output", str(folder / f"{side}-{rung}.npy"), *more]
        done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603 this interpreter and file
        if done.returncode:
            sys.exit(f"{side}, {rung}: {done.stderr[-2000:]}")
        said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return said

    for rung in RUNGS:
        run(SIDES[0], rung, "--rounds", "0")  # builds the engine where it is not stored
    for _ in range(options.passes):
        for rung in RUNGS:
            for side in SIDES:
                said = run(side, rung)
                known = results.setdefault(f"{side}:{rung}", {"milliseconds": [], "ready_s": [], "peak_bytes": []})
                known["milliseconds"] += said["milliseconds"]
                known["ready_s"].append(said["ready_s"])
                known["peak_bytes"].append(said["peak_bytes"])
                print(f"{side:10s} {rung:10s} {said}", file=sys.stderr)
    return results


def summed_up(results: Mapping[str, Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """A row a rung: medians of both sides, what each costs of none, ratios, and how far the outputs are apart."""
    rows = []
    middle = {name: statistics.median(r["milliseconds"]) for name, r in results.items()}
    for rung in RUNGS:
        mine, other = (np.load(folder / f"{side}-{rung}.npy") for side in SIDES)
        row: dict[str, Any] = {
            "rung": rung,
            "largest_difference": float(np.abs(mine - other).max() / np.abs(other).max()),
        }
        for side in SIDES:
            row[f"{side}_ms"] = round(middle[f"{side}:{rung}"], 1)
            row[f"{side}_over_none"] = round(middle[f"{side}:{rung}"] / middle[f"{side}:none"], 3)
            row[f"{side}_gb"] = round(max(results[f"{side}:{rung}"]["peak_bytes"]) / 1e9, 2)
        row["diffusers_over_fewstep"] = round(row["diffusers_ms"] / row["fewstep_ms"], 3)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    for name in ("bundle", "controlled", "checkpoint", "controlnet"):
        parser.add_argument(name)
    parser.add_argument("--size", type=lambda text: tuple(int(n) for n in text.split("x")), default=(512, 512))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    for name in ("--one", "--output"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--lora", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(options)
        return
    import diffusers
    from fewstep.bench.machine import describe
    from loras import write_random_lora

    machine = describe(options.threads)
    with tempfile.TemporaryDirectory() as name:
        unet = diffusers.UNet2DConditionModel.from_pretrained(options.checkpoint, subfolder="unet")
        options.lora = write_random_lora(unet, Path(name) / "style.safetensors", options.rank, 1)
        del unet
        results = run_all(options, Path(name))
        rows = summed_up(results, Path(name))
    for row in rows:
        print(row)
    if options.json:
        report = {
            "what": (__doc__ or "").split("\n")[0],
            "machine": machine,
            "size": list(options.size),
            "rank": options.rank,
            "rows": rows,
            "processes": results,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
