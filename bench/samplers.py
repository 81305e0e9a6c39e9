"""Microseconds a sampler's update takes, against diffusers' `scale_model_input` + `.step()`: same tensor, same run.

    python bench/samplers.py [--json FILE] [--repeats N] [--steps N] [--shape 1 4 64 64]

Both sides get the same network output and, where the sampler is stochastic, the same ready-made noise, so that
what is timed is the update alone. Two-stage samplers are counted by the step, not by the evaluation. Each repeat
times a whole schedule of both sides, one after the other; the figure is the median over repeats. One thread.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from fewstep.bench.machine import describe
from fewstep.runtime.device.numpy_update import SlotState
from fewstep.schedules import NoiseSchedule, Program, program_from_diffusers
from fewstep.schedules.compat.classes import CLASSES
from fewstep.schedules.compat.named import scheduler_config
from fewstep.schedules.solvers.registry import SAMPLERS, Sampler

LIMITS = {"each deterministic": 3.0, "lms": 50.0, "median": 7.0}


@contextlib.contextmanager
def ready_noise(class_name: str, noise: torch.Tensor) -> Iterator[type]:
    """The scheduler class, with its module's Gaussian draws replaced by one that is there already."""
    cls = getattr(diffusers, class_name)
    module = importlib.import_module(cls.__module__)
    saved = getattr(module, "randn_tensor", None)
    if saved is not None:
        module.randn_tensor = lambda *_, **__: noise  # type: ignore[attr-defined]
    try:
        yield cls
    finally:
        if saved is not None:
            module.randn_tensor = saved  # type: ignore[attr-defined]


def diffusers_us(scheduler: Any, steps: int, x: torch.Tensor, out: torch.Tensor, noise: torch.Tensor) -> float:
    """Microseconds a step of diffusers, the mean over one schedule."""
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "noise_sampler"):
        scheduler.noise_sampler = lambda *_: noise
    timesteps = scheduler.timesteps
    begun = time.perf_counter()
    for t in timesteps:
        scheduler.scale_model_input(x, t)
        scheduler.step(out, t, x, return_dict=False)
    return (time.perf_counter() - begun) / steps * 1e6


def fewstep_us(state: SlotState, program: Program, outputs: np.ndarray, buffer: np.ndarray) -> float:
    """Microseconds a step of the slot update, writing the network's input included, the mean over one schedule."""
    slots, programs = list(range(len(outputs))), [program] * len(outputs)
    begun = time.perf_counter()
    for i in range(program.evaluations):
        for slot in slots:
            state.model_input(slot, program, i, buffer[slot])
        state.advance(slots, programs, [i] * len(slots), outputs)
    return (time.perf_counter() - begun) / program.steps * 1e6


def compare(sampler: Sampler, *, steps: int, repeats: int, shape: tuple[int, ...]) -> dict[str, Any]:
    """One row of the table."""
    config = scheduler_config(sampler, NoiseSchedule.scaled_linear())
    program = program_from_diffusers(config, steps=steps)
    rng = np.random.default_rng(0)
    start, outputs, noise = (rng.standard_normal(shape).astype(np.float32) for _ in range(3))
    state = SlotState(shape[0], shape[1:], program.history)
    buffer = np.empty(shape, np.float32)
    theirs, ours = [], []
    with ready_noise(config["_class_name"], torch.from_numpy(noise)) as cls, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler: Any = cls
        scheduler = scheduler.from_config({k: v for k, v in config.items() if k != "_class_name"})
        x0, out, draw = (torch.from_numpy(array) for array in (start, outputs, noise))
        for repeat in range(repeats + 1):
            state.latent[:], state.noise[:] = start, noise
            with torch.inference_mode():
                there = diffusers_us(scheduler, steps, x0, out, draw)
            here = fewstep_us(state, program, outputs, buffer)
            if repeat:
                theirs.append(there)
                ours.append(here)
    mine, other = statistics.median(ours), statistics.median(theirs)
    return {
        "sampler": sampler.name,
        "scheduler": config["_class_name"],
        "deterministic": not program.draws.any(),
        "stages": sampler.stages,
        "history": program.history,
        "fewstep_us": round(mine, 2),
        "diffusers_us": round(other, 2),
        "ratio": round(other / mine, 2),
        "fewstep_us_worst": round(max(ours), 2),
        "diffusers_us_best": round(min(theirs), 2),
    }


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The three figures that are asked for, and whether they are met."""
    deterministic = [row for row in rows if row["deterministic"]]
    slowest = min(deterministic, key=lambda row: row["ratio"])
    figures = {
        "slowest deterministic": (slowest["sampler"], slowest["ratio"], LIMITS["each deterministic"]),
        "lms": ("lms", next(row["ratio"] for row in rows if row["sampler"] == "lms"), LIMITS["lms"]),
        "median sampler": ("", statistics.median(row["ratio"] for row in rows), LIMITS["median"]),
    }
    return {k: {"sampler": s, "ratio": r, "wanted": w, "met": r >= w} for k, (s, r, w) in figures.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--shape", type=int, nargs=4, default=[1, 4, 64, 64])
    parser.add_argument("--only", default="", help="samplers whose name holds this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    rows = []
    print(f"{'sampler':18} {'history':>7} {'fewstep us':>11} {'diffusers us':>13} {'ratio':>7}")
    for sampler in SAMPLERS.values():
        if sampler.diffusers in CLASSES and arguments.only in sampler.name:
            row = compare(sampler, steps=arguments.steps, repeats=arguments.repeats, shape=tuple(arguments.shape))
            rows.append(row)
            kind = "" if row["deterministic"] else "  (stochastic)"
            figures = f"{row['fewstep_us']:11} {row['diffusers_us']:13} {row['ratio']:6}x"
            print(f"{row['sampler']:18} {row['history']:7} {figures}{kind}", flush=True)
    result = {
        "what": "microseconds a step: scale_model_input + step against model_input + advance",
        "shape": arguments.shape,
        "dtype": "float32",
        "steps": arguments.steps,
        "repeats": arguments.repeats,
        "machine": describe(1),
        "versions": {"diffusers": diffusers.__version__, "torch": torch.__version__},
        "rows": rows,
    }
    if not arguments.only:
        result["summary"] = summarise(rows)
        for name, figure in result["summary"].items():
            print(f"{name} {figure['sampler']}: {figure['ratio']:.1f}x, wanted {figure['wanted']}x")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
