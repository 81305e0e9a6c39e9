"""What a LoRA costs: an evaluation with it and without, and a change to another one, beside diffusers in the same run.

    python bench/loras.py BUNDLE CHECKPOINT [--size WxH] [--rank N] [--rounds N] [--threads N] [--json FILE]

Both sides have the same weights, the same inputs of two rows, and the same random LoRAs of the attention's layers. A
round times each subject once, one after the other; figures are medians over rounds. A change is counted from files that
were not read before to the moment at which an evaluation could begin. A change of scale is to a factor that was not
asked for before. diffusers' change is `load_lora_weights` and `set_adapters`, with the last adapter deleted; without
a LoRA its adapters are disabled.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from fewstep.bench.machine import describe
from fewstep.bundle import read_bundle
from fewstep.engines.low_rank import bucket, no_change
from fewstep.runtime.device.base import unet_dims
from fewstep.runtime.loader import load
from fewstep.runtime.prompts.lora_tags import Uses
from safetensors.torch import save_file

NAMES = ("fewstep, no LoRA", "fewstep, LoRA", "fewstep, rows without one", "diffusers, no LoRA", "diffusers, LoRA")


def write_random_lora(unet: torch.nn.Module, path: Path, rank: int, seed: int) -> Path:
    """A LoRA over every linear layer of the attention's blocks, random in both matrices, in diffusers' names."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.Linear) and ".attn" in name:
            down = torch.randn((rank, module.in_features), generator=generator) * 0.05
            up = torch.randn((module.out_features, rank), generator=generator) * 0.05
            tensors |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
    save_file(tensors, path)
    return path


class Ours:
    """The pipeline's two engines, bound for two rows."""

    def __init__(self, bundle: str, inputs: Mapping[str, np.ndarray], size: tuple[int, int], threads: int, first: Path):
        self.pipe = load(bundle, size=size, threads=threads)
        self.change = self.pipe.loras.changes(((str(first), "", 1.0),))["unet"]
        self.rank = bucket(self.change.rank)
        self.adapted = self.pipe.adapted.of("unet", self.change.kernels)
        latent = self.pipe.bundle.latent
        shape = latent.channels, size[1] // latent.factor, size[0] // latent.factor
        tokens = self.pipe.text.length
        self.plain = self.pipe.engines["unet"].bind(unet_dims(shape, 2, tokens))
        self.binding = self.adapted.engine.bind(unet_dims(shape, 2, tokens, self.rank))
        for binding in (self.plain, self.binding):
            for name, value in inputs.items():
                binding.inputs[name][...] = value

    def tell(self, loras: Uses) -> None:
        change = self.pipe.loras.changes(loras)["unet"] if loras else None
        arrays = (
            no_change(self.adapted.extent, self.rank)
            if change is None
            else change.packed(self.adapted.layers, self.rank)
        )
        for name, array in arrays.items():
            self.binding.inputs[name][...] = array


def measured(
    rounds: int, subjects: Mapping[str, Callable[[int], Any]], before: Mapping[str, Callable[[], Any]] | None = None
) -> dict[str, list[float]]:
    """Milliseconds of each subject, by round; what is done before one is not timed."""
    times: dict[str, list[float]] = {name: [] for name in subjects}
    for turn in range(rounds):
        for name, run in subjects.items():
            (before or {}).get(name, lambda: None)()
            began = time.perf_counter()
            run(turn)
            times[name].append(1e3 * (time.perf_counter() - began))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("bundle")
    parser.add_argument("checkpoint")
    parser.add_argument("--size", default="")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    theirs: Any = diffusers.DiffusionPipeline.from_pretrained(options.checkpoint)
    bundle = read_bundle(options.bundle)
    default = bundle.defaults.width, bundle.defaults.height
    size = tuple(int(n) for n in options.size.split("x")) if options.size else default
    cells = size[1] // bundle.latent.factor, size[0] // bundle.latent.factor
    random = np.random.default_rng(0)
    part = bundle.component("unet")
    dims = {"rows": 2, "height": cells[0], "width": cells[1], "tokens": bundle.tokens}
    inputs = {s.name: random.normal(size=s.resolve(dims)).astype(np.float32) for s in part.inputs}
    inputs["timestep"][...] = 500.0
    added = {c.name: torch.from_numpy(inputs[c.name]) for c in bundle.conditions if c.group == "added_cond_kwargs"}

    def forward() -> np.ndarray:
        with torch.no_grad():
            out = theirs.unet(
                torch.from_numpy(inputs["sample"]),
                torch.from_numpy(inputs["timestep"]),
                torch.from_numpy(inputs["encoder_hidden_states"]),
                added_cond_kwargs=added or None,
                return_dict=False,
            )
        return np.asarray(out[0])

    with tempfile.TemporaryDirectory() as folder:
        files = [
            write_random_lora(theirs.unet, Path(folder) / f"{i}.safetensors", options.rank, i)
            for i in range(2 * options.rounds + 2)
        ]
        ours = Ours(options.bundle, inputs, size, options.threads, files[-1])

        def change(turn: int) -> None:
            ours.tell(((str(files[turn]), "", 1.0),))

        def their_change(turn: int) -> None:
            theirs.delete_adapters(str(turn - 1)) if turn else None
            theirs.load_lora_weights(str(files[turn].parent), weight_name=files[turn].name, adapter_name=str(turn))
            theirs.set_adapters([str(turn)], adapter_weights=[1.0])

        ours.plain.enqueue()
        plain = forward()
        agreement = {"no LoRA": float(np.abs(ours.plain.outputs["out"] - plain).max() / np.abs(plain).max())}
        changes = measured(
            options.rounds,
            {
                "fewstep, another LoRA": change,
                "diffusers, another LoRA": their_change,
                "fewstep, another scale": lambda turn: ours.tell(((str(files[turn]), "", 0.5 + turn / 100),)),
                "diffusers, another scale": lambda turn: theirs.set_adapters(
                    [str(turn)], adapter_weights=[0.5 + turn / 100]
                ),
            },
        )
        last = options.rounds - 1
        theirs.set_adapters([str(last)], adapter_weights=[1.0])
        ours.tell(((str(files[last]), "", 1.0),))
        ours.binding.enqueue()
        with_lora = forward()
        agreement["LoRA"] = float(np.abs(ours.binding.outputs["out"] - with_lora).max() / np.abs(with_lora).max())
        evaluations = measured(
            options.rounds,
            {
                NAMES[0]: lambda turn: ours.plain.enqueue(),
                NAMES[1]: lambda turn: ours.binding.enqueue(),
                NAMES[2]: lambda turn: ours.binding.enqueue(),
                NAMES[3]: lambda turn: forward(),
                NAMES[4]: lambda turn: forward(),
            },
            before={
                NAMES[1]: lambda: ours.tell(((str(files[last]), "", 1.0),)),
                NAMES[2]: lambda: ours.tell(()),
                NAMES[3]: theirs.disable_lora,
                NAMES[4]: theirs.enable_lora,
            },
        )
    every = {**evaluations, **changes}
    medians = {name: statistics.median(times) for name, times in every.items()}
    evaluation = medians[NAMES[1]]
    for name, value in medians.items():
        print(f"{name:28s} {value:10.2f} ms")
    ratios = {
        "an evaluation with a LoRA over one without": evaluation / medians[NAMES[0]],
        "diffusers' evaluation with a LoRA over ours": medians[NAMES[4]] / evaluation,
        "another LoRA, of an evaluation": medians["fewstep, another LoRA"] / evaluation,
        "another scale, of an evaluation": medians["fewstep, another scale"] / evaluation,
        "diffusers' other LoRA over ours": medians["diffusers, another LoRA"] / medians["fewstep, another LoRA"],
    }
    for name, value in ratios.items():
        print(f"{name:48s} {value:8.3f}")
    print(f"largest difference, relative to the largest value: {agreement}")
    if options.json:
        report = {
            "machine": describe(options.threads),
            "bundle": bundle.name,
            "size": list(size),
            "rank": options.rank,
            "rounds": options.rounds,
            "threads": options.threads,
            "milliseconds": every,
            "medians": medians,
            "ratios": ratios,
            "agreement": agreement,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
