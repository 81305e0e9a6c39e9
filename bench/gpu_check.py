"""Everything that needs a GPU to be shown, in one command that can be cut off and goes on where it was.

python bench/gpu_check.py --folder build/gpu-check --output build/gpu-check.json
python bench/gpu_check.py --device cpu:torch --tiny --folder build/gpu-check-tiny      (the same code, on any machine)

Writes random checkpoints of full size, exports them, builds with every backend that is installed, gates, and times
eager torch, torch.compile, torch in CUDA graphs, ONNX Runtime on CUDA with and without graphs, TensorRT-RTX and
TensorRT: whole requests and stages, peak memory, and the floor that the machine's own rates set. Each step is
recorded in the folder when it is done; a run ends before `--slice-seconds` are over, and says to be run again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

MARGIN_SECONDS = 180.0
"""No step begins when less than this is left of the slice."""


@dataclass(frozen=True)
class Model:
    """A model to check: its architecture, and what is asked of it as (side in pixels, steps)."""

    name: str
    architecture: str
    requests: tuple[tuple[int, int], ...]
    preset: str | None = None

    @property
    def sides(self) -> tuple[int, ...]:
        return tuple(sorted({side for side, _ in self.requests}))


FULL = (
    Model("sd-turbo", "sd21", ((512, 1), (512, 2), (512, 4)), "sd-turbo"),
    Model("sdxl-turbo", "sdxl", ((512, 1), (512, 4), (1024, 4)), "sdxl-turbo"),
    Model("sd15", "sd1", ((512, 4),)),
)
TINY = (Model("tiny", "embedded", ((64, 1), (64, 2))),)


@dataclass(frozen=True)
class Variant:
    """A way to run a model: backend, options of `Pipeline`, and the module that it needs."""

    name: str
    backend: str
    module: str
    options: dict[str, Any]


def variants(on_cuda: bool, quick: bool) -> list[Variant]:
    """What is compared. On CPU tensors, recordings stand for CUDA graphs and ONNX Runtime for the built engines."""
    eager = Variant("torch-eager", "torch", "torch", {"graphs": False})
    graph = Variant("torch-graph", "torch", "torch", {"graphs": True})
    if not on_cuda:
        return [eager, graph, Variant("ort-cpu", "ort-cpu", "onnxruntime", {"graphs": False})]
    mode = "default" if quick else "max-autotune-no-cudagraphs"
    compiled = {"engine_options": {"compile": mode}}
    own = {"engine_options": {"compile": "max-autotune"}}
    return [
        eager,
        graph,
        Variant("torch-compile", "torch", "torch", {"graphs": False, **own}),
        Variant("torch-compile-graph", "torch", "torch", {"graphs": True, **compiled}),
        Variant("ort-cuda", "ort-cuda", "onnxruntime", {"graphs": False}),
        Variant("ort-cuda-graph", "ort-cuda", "onnxruntime", {"graphs": False, "engine_options": {"cuda_graph": True}}),
        Variant("tensorrt-rtx", "tensorrt-rtx", "tensorrt_rtx", {"graphs": True}),
        Variant("tensorrt", "tensorrt", "tensorrt", {"graphs": True}),
    ]


class Check:
    """The steps that are left, their order, and the file that remembers what was done."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.folder = options, Path(options.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.on_cuda = options.device.startswith("cuda")
        self.models = TINY if options.tiny else tuple(m for m in FULL if m.name in options.model)
        self.file = self.folder / "state.json"
        self.done: dict[str, Any] = json.loads(self.file.read_text()) if self.file.is_file() else {}
        self.began = time.monotonic()

    def steps(self) -> list[tuple[str, Callable[[], Any]]]:
        planned: list[tuple[str, Callable[[], Any]]] = [("machine", self.machine), ("rates", self.rates)]
        for model in self.models:
            planned.append((f"{model.name}/checkpoint", lambda m=model: self.checkpoint(m)))
            planned.append((f"{model.name}/bundle", lambda m=model: self.bundle(m)))
            planned.append((f"{model.name}/work", lambda m=model: self.work(m)))
            ways = variants(self.on_cuda, self.options.quick)
            for backend in sorted({v.backend for v in ways} - {"torch"}):
                planned.append((f"{model.name}/build/{backend}", lambda m=model, b=backend: self.build(m, b)))
            for variant in ways:
                for side, steps in model.requests:
                    name = f"{model.name}/{side}/{steps}/{variant.name}"
                    planned.append((name, lambda m=model, v=variant, s=side, n=steps: self.timing(m, v, s, n)))
        return planned

    def run(self) -> bool:
        """Do the steps in order; False when the slice's time is over before the last."""
        for name, step in self.steps():
            known = self.done.get(name)
            if known is not None and not (self.options.retry and "error" in known):
                continue
            if time.monotonic() - self.began > self.options.slice_seconds - MARGIN_SECONDS and self.done:
                return False
            print(name, file=sys.stderr, flush=True)
            started = time.monotonic()
            try:
                outcome = step()
            except Exception as error:  # one backend that fails must not end the check: what it said is its result
                outcome = {"error": f"{type(error).__name__}: {error}", "where": traceback.format_exc(limit=-3)}
            self.done[name] = {**outcome, "seconds": round(time.monotonic() - started, 3)}
            part = self.file.with_suffix(".part")
            part.write_text(json.dumps(self.done, indent=1))
            part.replace(self.file)
        return True

    def report(self, *, complete: bool) -> dict[str, Any]:
        """All outcomes; each timing beside the floor of the same run."""
        rates = self.done.get("rates", {})
        results = {}
        for name, outcome in self.done.items():
            model, _, rest = name.partition("/")
            work = self.done.get(f"{model}/work", {})
            if "p50_ms" in outcome and "flops_per_s" in rates and work:
                side, steps, _ = rest.split("/")
                floor = floor_ms(work[side], int(steps), rates)
                outcome = {
                    **outcome,
                    "floor_ms": floor,
                    "times_the_floor": round(outcome["p50_ms"] / max(floor, 1e-9), 2),
                }
            results[name] = outcome
        return {"complete": complete, "device": self.options.device, "results": results}

    def machine(self) -> dict[str, Any]:
        import platform
        from importlib import metadata

        import torch

        names = ("torch", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13", "diffusers", "numpy")
        versions = {}
        for name in names:
            try:
                versions[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
        machine: dict[str, Any] = {"python": platform.python_version(), "versions": versions, "at": time.strftime("%F")}
        if self.on_cuda:
            device = torch.cuda.get_device_properties(self.options.device)
            capability = f"{device.major}.{device.minor}"
            machine |= {"gpu": device.name, "capability": capability, "memory": device.total_memory}
        return machine

    def rates(self) -> dict[str, Any]:
        """The rates that set the floor: a large matrix product, and copies of a large array."""
        import torch

        device = torch.device(self.options.device if self.on_cuda else "cpu")
        dtype = torch.float16 if self.on_cuda else torch.float32
        side = 8192 if self.on_cuda else 1024
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        product = self.best(lambda: a @ b)
        source = torch.empty(1 << (30 if self.on_cuda else 26), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        copied = self.best(lambda: target.copy_(source))
        return {"flops_per_s": 2 * side**3 / product, "bytes_per_s": 2 * source.numel() / copied, "dtype": str(dtype)}

    def best(self, body: Callable[[], Any], times: int = 20) -> float:
        """The shortest time in seconds."""
        seconds = []
        for _ in range(times):
            self.wait()
            began = time.perf_counter()
            body()
            self.wait()
            seconds.append(time.perf_counter() - began)
        return min(seconds)

    def wait(self) -> None:
        if self.on_cuda:
            import torch

            torch.cuda.synchronize()

    def checkpoint(self, model: Model) -> dict[str, Any]:
        if model.architecture == "embedded":
            return {"folder": "the embedded model"}
        from random_checkpoint import write_checkpoint

        folder = self.folder / f"{model.name}-checkpoint"
        if folder.exists():  # a slice that was cut off leaves half of one
            import shutil

            shutil.rmtree(folder)
        return {"bytes": write_checkpoint(model.architecture, folder, "float16")}

    def bundle(self, model: Model) -> dict[str, Any]:
        from fewstep.export import export_bundle
        from fewstep.export.embedded import embedded_checkpoint

        tiny = model.architecture == "embedded"
        source = embedded_checkpoint("base") if tiny else self.folder / f"{model.name}-checkpoint"
        reference = source / "reference.safetensors" if tiny else None
        bundle = export_bundle(
            source,
            self.folder / f"{model.name}-bundle",
            dtype="float16" if self.on_cuda else "float32",
            gate=tiny or not self.options.no_gate,
            preset=model.preset,
            quick_gate=not tiny,
            reference=reference,
            overwrite=True,
        )
        return {"gate": bundle.gate, "bytes": sum(f.stat().st_size for f in bundle.folder.rglob("*") if f.is_file())}

    def build(self, model: Model, backend: str) -> dict[str, Any]:
        """Engines for the sizes that are asked for, each gated where the bundle has a reference."""
        from fewstep.bundle import read_bundle
        from fewstep.engines import BuildOptions, build_engines, profiles_for

        module = next(v.module for v in variants(self.on_cuda, True) if v.backend == backend)
        if importlib.util.find_spec(module) is None:
            return {"skipped": f"{module} is not installed"}
        bundle = read_bundle(self.folder / f"{model.name}-bundle")
        names = [n for n in bundle.components if n != "vae_encoder"]
        profiles = profiles_for(bundle, sizes=[(s, s) for s in model.sides], guidance=bundle.defaults.guidance > 1)
        options = BuildOptions(capturable=backend == "tensorrt-rtx")
        engines = build_engines(bundle, backend=backend, components=names, profiles=profiles, options=options)
        return {
            n: {"seconds": round(b.seconds, 2), "bytes": b.entry.length, "gate": b.entry.gate}
            for n, b in engines.items()
        }

    def work(self, model: Model) -> dict[str, Any]:
        """Floating-point operations of an image's evaluation of UNet and decoder, and their weights' bytes, by side."""
        import torch
        from fewstep.bundle import read_bundle
        from fewstep.export.trace.modules import build_model, wrap
        from torch.utils.flop_counter import FlopCounterMode

        bundle = read_bundle(self.folder / f"{model.name}-bundle")
        work: dict[str, Any] = {}
        rows = 2 if bundle.defaults.guidance > 1 else 1
        for side in model.sides:
            cells = side // bundle.latent.factor
            dims = {"rows": rows, "batch": 1, "height": cells, "width": cells, "tokens": bundle.tokenizers[0].length}
            work[str(side)] = {}
            for name in ("unet", "vae_decoder"):
                part = bundle.component(name)
                with torch.device("meta"):
                    traceable = wrap(name, build_model(name, part.config), part.config, "float32", bundle.model)
                    given = {s.name: torch.empty(s.resolve(dims), dtype=_torch(s.dtype)) for s in traceable.inputs}
                    with FlopCounterMode(display=False) as counter, torch.no_grad():
                        traceable.module(**given)
                length = bundle.path(part.weights).stat().st_size
                work[str(side)][name] = {"flops": counter.get_total_flops(), "bytes": length}
        return work

    def timing(self, model: Model, variant: Variant, side: int, steps: int) -> dict[str, Any]:
        """Whole requests in latency mode, stages from ticks, peak memory; and how near the pictures are to eager's."""
        import torch
        from fewstep import export  # noqa: F401 - registers the torch backend
        from fewstep.runtime import load

        if importlib.util.find_spec(variant.module) is None:
            return {"skipped": f"{variant.module} is not installed"}
        if self.on_cuda:
            torch.cuda.reset_peak_memory_stats()
        bundle = self.folder / f"{model.name}-bundle"
        shared = {"backend": variant.backend, "device": self.options.device, "size": (side, side), **variant.options}
        call: dict[str, Any] = {"steps": steps, "sampler": "euler", "schedule": "trailing", "seed": 7}
        pipe = load(bundle, mode="latency", **shared)
        result = pipe("a red circle", **call)
        for _ in range(3):
            pipe("a red circle", **call)
        taken = []
        for _ in range(self.options.repeat):
            began = time.perf_counter()
            pipe("a red circle", **call)
            taken.append(1e3 * (time.perf_counter() - began))
        counts = pipe.graph_counts
        ticks = load(bundle, mode="shared", **{**shared, "graphs": False})
        for _ in range(3):
            stages = ticks("a red circle", **call).timings
        p50, p90, p99 = (round(float(v), 3) for v in np.percentile(taken, (50, 90, 99)))
        figures = {"p50_ms": p50, "p90_ms": p90, "p99_ms": p99, "repeat": self.options.repeat, "graphs": counts}
        figures["stages_ms"] = {k: round(stages[k], 3) for k in ("text", "denoise", "decode", "update", "gather")}
        figures["stages_ms"]["evaluations"] = [round(v, 3) for v in stages["evaluations"]]
        if self.on_cuda:
            figures["peak_bytes"] = torch.cuda.max_memory_allocated()
        path = self.folder / f"{model.name}-{side}-{steps}.npy"
        if variant.name == "torch-eager":
            np.save(path, result.images)
        if path.is_file():
            error = float(np.mean((np.load(path).astype(np.float64) - result.images) ** 2))
            figures["psnr_to_eager_db"] = None if not error else round(10 * float(np.log10(255**2 / error)), 1)
        return figures


def _torch(dtype: str) -> Any:
    import torch

    return getattr(torch, dtype)


def floor_ms(work: dict[str, Any], steps: int, rates: dict[str, float]) -> float:
    """The least time that the machine's rates allow: of each stage its operations or its weights, whichever is more."""

    def least(part: dict[str, float]) -> float:
        return max(part["flops"] / rates["flops_per_s"], part["bytes"] / rates["bytes_per_s"])

    return 1e3 * (steps * least(work["unet"]) + least(work["vae_decoder"]))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0", help="cuda:<index>, or cpu:torch (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="the embedded model in place of full size")
    parser.add_argument("--model", action="append", choices=[m.name for m in FULL], help="only this; repeatable")
    parser.add_argument("--folder", default="build/gpu-check", help="checkpoints, bundles, and what was done")
    parser.add_argument("--output", type=Path, help="where the JSON goes (default: stdout)")
    parser.add_argument("--slice-seconds", type=float, default=480.0, help="stop before this (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=50)
    parser.add_argument("--no-gate", action="store_true", help="do not compare full-size exports with torch")
    parser.add_argument("--quick", action="store_true", help="torch.compile without its search")
    parser.add_argument("--retry", action="store_true", help="do again what failed")
    options = parser.parse_args(argv)
    options.model = options.model or [m.name for m in FULL]
    check = Check(options)
    complete = check.run()
    text = json.dumps(check.report(complete=complete), indent=1, default=str)
    if options.output is None:
        print(text)
    else:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text + "\n")
    if not complete:
        print("the slice's time is over: run the same command again to go on", file=sys.stderr)
    return 0 if complete else 75


if __name__ == "__main__":
    sys.exit(main())
