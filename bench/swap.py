"""What replacing a loaded pipeline's weights costs: a LoRA merged and taken back, another checkpoint; beside diffusers.

    python bench/swap.py BUNDLE CHECKPOINT [--rank N] [--rounds N] [--threads N] [--json FILE]

Both sides have the same weights and the same random LoRAs of the attention's layers. A round merges a LoRA from a file
that was not read before, takes it back, and loads another checkpoint's UNet and back, one subject after the other;
figures are medians over rounds. The other checkpoint is a copy with other values; the first time its digest is computed
too, which is told apart. An evaluation of an engine whose weights can be replaced is
timed beside one of the usual engine. diffusers merges with `load_lora_weights` and `fuse_lora`, and takes back with
`unfuse_lora` and `unload_lora_weights`; its other checkpoint is `load_state_dict` of a file that is mapped into memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from fewstep.bench.machine import describe
from fewstep.bundle import Bundle, read_bundle
from fewstep.engines.digest import sha256_file
from fewstep.runtime.device.base import unet_dims
from fewstep.runtime.loader import load
from loras import write_random_lora
from safetensors.torch import load_file, save_file


def other_bundle(bundle: Bundle, folder: Path) -> Bundle:
    """A copy of a bundle whose UNet has other values; without a reference, for they are of no checkpoint."""
    shutil.copytree(bundle.folder, folder)
    part = bundle.component("unet")
    path = folder / part.weights
    with path.open("rb") as file:
        begin = 8 + int.from_bytes(file.read(8), "little")
    values = np.memmap(path, np.float32, "r+", offset=begin)
    for at in range(0, len(values), 1 << 24):
        values[at : at + (1 << 24)] *= np.float32(1.001)
    values.flush()
    del values
    changed = replace(part, weights_sha256=sha256_file(path))
    return replace(bundle, folder=folder, components={**bundle.components, "unet": changed})


def timed(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("bundle")
    parser.add_argument("checkpoint")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine, bundle = describe(options.threads), read_bundle(options.bundle)
    theirs: Any = diffusers.DiffusionPipeline.from_pretrained(options.checkpoint)
    place = Path(tempfile.mkdtemp(dir=bundle.folder.parent))
    try:
        times, agreement, first_ms = measure(options, bundle, theirs, place)
    finally:
        shutil.rmtree(place)
    medians = {name: statistics.median(ms) for name, ms in times.items()}
    for name, value in medians.items():
        print(f"{name:42s} {value:10.1f} ms")
    ratios = {
        f"diffusers over fewstep, {what}": medians[f"diffusers, {what}"] / medians[f"fewstep, {what}"]
        for what in ("a LoRA merged", "a LoRA taken back", "another checkpoint")
    }
    ratios["an evaluation over that of the usual engine"] = (
        medians["evaluation, swappable"] / medians["evaluation, usual"]
    )
    for name, value in ratios.items():
        print(f"{name:48s} {value:8.3f}")
    print(f"another checkpoint for the first time, its digest computed: {first_ms:.0f} ms; difference: {agreement}")
    if options.json:
        report = {
            "what": (__doc__ or "").split("\n")[0],
            "machine": machine,
            "bundle": bundle.name,
            "rank": options.rank,
            "milliseconds": times,
            "medians": medians,
            "ratios": ratios,
            "first_time_ms": first_ms,
            "agreement": agreement,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def measure(
    options: argparse.Namespace, bundle: Bundle, theirs: Any, place: Path
) -> tuple[dict[str, list[float]], dict[str, float], float]:
    """Milliseconds by subject, how far outputs are apart, and those of another checkpoint the first time."""
    files = [write_random_lora(theirs.unet, place / f"{i}.safetensors", options.rank, i) for i in range(options.rounds)]
    other = other_bundle(bundle, place / "other")
    state = {n: v.clone() * 1.001 for n, v in theirs.unet.state_dict().items()}
    state_file = "unet.safetensors"
    save_file(state, place / state_file)
    del state
    pipe, usual = load(bundle, swappable=True, threads=options.threads), load(bundle, threads=options.threads)
    size = bundle.defaults.width, bundle.defaults.height
    dims = unet_dims((bundle.latent.channels, size[1] // 8, size[0] // 8), 2, pipe.text.length)
    bindings = {"swappable": pipe.engines["unet"].bind(dims), "usual": usual.engines["unet"].bind(dims)}
    random = np.random.default_rng(0)
    for name, array in bindings["usual"].inputs.items():
        array[...] = 500.0 if name == "timestep" else random.normal(size=array.shape)
        bindings["swappable"].inputs[name][...] = array
    times: dict[str, list[float]] = {}

    def note(name: str, run: Callable[[], Any]) -> None:
        times.setdefault(name, []).append(timed(run))

    def merged(path: Path) -> None:
        theirs.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="one")
        theirs.fuse_lora(adapter_names=["one"])

    def taken_back() -> None:
        theirs.unfuse_lora()
        theirs.unload_lora_weights()

    first_ms = timed(lambda: pipe.load_weights(other, gate=False))
    pipe.load_weights()
    for path in files:
        note("fewstep, a LoRA merged", partial(pipe.load_weights, loras={path: 1.0}))
        note("diffusers, a LoRA merged", partial(merged, path))
        note("fewstep, a LoRA taken back", pipe.load_weights)
        note("diffusers, a LoRA taken back", taken_back)
        note("fewstep, another checkpoint", lambda: pipe.load_weights(other, gate=False))
        pipe.load_weights()
        note(
            "diffusers, another checkpoint", lambda: theirs.unet.load_state_dict(load_file(place / "unet.safetensors"))
        )
        for name, binding in bindings.items():
            note(f"evaluation, {name}", binding.enqueue)
    agreement = {}
    pipe.load_weights(other, gate=False)
    bindings["swappable"].enqueue()
    with torch.no_grad():
        arrays = {n: torch.from_numpy(np.array(a)) for n, a in bindings["swappable"].inputs.items()}
        expected = np.asarray(theirs.unet(**arrays, return_dict=False)[0])
    out = bindings["swappable"].outputs["out"]
    agreement["another checkpoint"] = float(np.abs(out - expected).max() / np.abs(expected).max())
    return times, agreement, first_ms


if __name__ == "__main__":
    main()
