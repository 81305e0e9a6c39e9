"""The steps of `gpu_check.py`, each run in a process of its own: `python bench/gpu_steps.py '{"function": ...}'`.

A step returns its outcome, writes it as it goes where it may be cut off, and says `skipped` with the reason where this
machine lacks what it is about. Steps of correctness raise where something is wrong.
"""

from __future__ import annotations

import importlib.util
import json
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fewstep.engines.backends.tensorrt_build import RTX_CAPABILITIES
from fewstep.runtime import load
from gpu_design import Design

PROMPT = "a red circle on a blue background"
VARIANTS: dict[str, dict[str, Any]] = {
    "torch-eager": {"backend": "torch", "graphs": False},
    "torch-eager-nchw": {"backend": "torch", "graphs": False, "engine_options": {"channels_last": False}},
    "torch-eager-plain-norms": {"backend": "torch", "graphs": False, "engine_options": {"fused_norms": False}},
    "torch-graph": {"backend": "torch", "graphs": True},
    "torch-graph-vae-float32": {"backend": "torch", "graphs": True, "engine_options": {"vae_float32": True}},
    "torch-compile-graph": {"backend": "torch", "graphs": True, "engine_options": {"compile": "default"}},
    "torch-reduce-overhead": {"backend": "torch", "graphs": False, "engine_options": {"compile": "reduce-overhead"}},
    "torch-autotune-graph": {
        "backend": "torch",
        "graphs": True,
        "engine_options": {"compile": "max-autotune-no-cudagraphs"},
    },
    "ort-cpu": {"backend": "ort-cpu", "graphs": False},
    "ort-cuda": {"backend": "ort-cuda", "graphs": False, "engine_options": {"cuda_graph": True}},
    "tensorrt-rtx": {"backend": "tensorrt-rtx", "graphs": True},
    "tensorrt": {"backend": "tensorrt", "graphs": True},
}
WARM_UPS = 3


class Steps(Design):
    """What the steps share beside the device: the folder, and where the outcome goes."""

    def __init__(self, asked: dict[str, Any]) -> None:
        super().__init__(str(asked["device"]))
        self.folder, self.outcome = Path(asked["folder"]), Path(asked["outcome"])
        self.repeat = int(asked["repeat"])

    def write(self, outcome: dict[str, Any]) -> None:
        part = self.outcome.with_suffix(".part")
        part.write_text(json.dumps(outcome, default=str), encoding="utf-8")
        part.replace(self.outcome)

    def wait(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize()

    # --- the machine ---

    def machine(self) -> dict[str, Any]:
        names = ("torch", "triton", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13", "diffusers")
        versions = {}
        for name in (*names, "numpy"):
            try:
                versions[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                versions[name] = "not installed"
        machine: dict[str, Any] = {"python": platform.python_version(), "versions": versions, "at": time.strftime("%F")}
        if self.on_cuda:
            device = torch.cuda.get_device_properties(self.device)
            machine |= {"gpu": device.name, "capability": f"{device.major}.{device.minor}"}
            machine |= {"memory": device.total_memory, "cuda": torch.version.cuda}
            query = "driver_version,clocks.sm,clocks.max.sm,power.draw,power.limit,temperature.gpu,pstate"
            command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
            if shutil.which("nvidia-smi"):
                machine[query] = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        return machine

    def rates(self) -> dict[str, Any]:
        """The rates that set the floor: large matrix products by precision, and copies of a large array."""
        place = torch.device(self.device if self.on_cuda else "cpu")
        side = 8192 if self.on_cuda else 512
        flops = {}
        for dtype in (torch.float16, torch.bfloat16, torch.float32) if self.on_cuda else (torch.float32,):
            a, b = (torch.randn(side, side, device=place).to(dtype) for _ in range(2))
            flops[str(dtype).removeprefix("torch.")] = 2 * side**3 / self._best(lambda a=a, b=b: a @ b)
        source = torch.empty(1 << (30 if self.on_cuda else 24), dtype=torch.uint8, device=place)
        target = torch.empty_like(source)
        copied = self._best(lambda: target.copy_(source))
        best = flops.get("float16", flops["float32"])
        return {"flops_per_s": best, "by_precision": flops, "bytes_per_s": 2 * source.numel() / copied}

    def _best(self, body: Callable[[], Any], times: int = 20) -> float:
        """The shortest time in seconds."""
        seconds = []
        for _ in range(times):
            self.wait()
            began = time.perf_counter()
            body()
            self.wait()
            seconds.append(time.perf_counter() - began)
        return min(seconds)

    # --- models ---

    def checkpoint(self, model: str, architecture: str) -> dict[str, Any]:
        if architecture == "embedded":
            return {"folder": "the embedded model"}
        from random_checkpoint import write_checkpoint

        folder = self.folder / f"{model}-checkpoint"
        part = folder.with_name(f"{folder.name}.part")
        for stale in (part, folder):
            shutil.rmtree(stale, ignore_errors=True)
        length = write_checkpoint(architecture, part, "float16")
        part.rename(folder)
        return {"bytes": length}

    def bundle(self, model: str, architecture: str) -> dict[str, Any]:
        from fewstep.export import export_bundle
        from fewstep.export.embedded import embedded_checkpoint

        tiny = architecture == "embedded"
        source = embedded_checkpoint("base") if tiny else self.folder / f"{model}-checkpoint"
        bundle = export_bundle(
            source,
            self.folder / f"{model}-bundle",
            dtype="float16" if self.on_cuda else "float32",
            gate=tiny,
            reference=source / "reference.safetensors" if tiny else None,
            preset=None if tiny or architecture == "sd1" else model,
            overwrite=True,
        )
        gate = bundle.gate if tiny else "left out: this is about time; the engines are compared with each other"
        return {"gate": gate, "bytes": sum(f.stat().st_size for f in bundle.folder.rglob("*") if f.is_file())}

    def work(self, model: str, requests: list[tuple[int, int, int]]) -> dict[str, Any]:
        """Floating-point operations of UNet and decoder, and their weights' bytes, by side and images."""
        from fewstep.bundle import read_bundle
        from fewstep.export.trace.modules import build_model, wrap
        from torch.utils.flop_counter import FlopCounterMode

        bundle = read_bundle(self.folder / f"{model}-bundle")
        work: dict[str, Any] = {}
        for side, images, _ in requests:
            cells = side // bundle.latent.factor
            rows = images * (2 if bundle.defaults.guidance > 1 else 1)
            dims = {"rows": rows, "batch": images, "height": cells, "width": cells}
            dims |= {"tokens": bundle.tokens}
            stages = work[f"{side}x{images}"] = {}
            for name in ("unet", "vae_decoder"):
                part = bundle.component(name)
                with torch.device("meta"):
                    traceable = wrap(name, build_model(name, part.config), part.config, "float32", bundle.model)
                    given = {
                        s.name: torch.empty(s.resolve(dims), dtype=getattr(torch, s.dtype)) for s in traceable.inputs
                    }
                    with FlopCounterMode(display=False) as counter, torch.no_grad():
                        traceable.module(**given)
                length = bundle.path(part.weights).stat().st_size
                stages[name] = {"flops": counter.get_total_flops(), "bytes": length}
        return work

    def build(self, model: str, backend: str) -> dict[str, Any]:
        """Engines for the sizes that are asked for."""
        reason = self._lacks(backend)
        if reason:
            return {"skipped": reason}
        from fewstep.bundle import read_bundle
        from fewstep.engines import BuildOptions, build_engines, profiles_for

        bundle = read_bundle(self.folder / f"{model}-bundle")
        names = [n for n in bundle.components if n != "vae_encoder"]
        profiles = profiles_for(bundle, guidance=bundle.defaults.guidance > 1)
        options = BuildOptions(capturable=backend == "tensorrt-rtx")
        engines = build_engines(bundle, backend=backend, components=names, profiles=profiles, options=options)
        return {
            n: {"seconds": round(b.seconds, 2), "bytes": b.entry.length, "gate": b.entry.gate}
            for n, b in engines.items()
        }

    def _lacks(self, backend: str) -> str | None:
        """Why a backend cannot run here; `None` where it can."""
        if backend.startswith("torch"):
            return None
        if backend.startswith("ort"):
            if importlib.util.find_spec("onnxruntime") is None:
                return "onnxruntime is not installed"
            import onnxruntime

            wanted = "CUDAExecutionProvider" if backend == "ort-cuda" else "CPUExecutionProvider"
            return None if wanted in onnxruntime.get_available_providers() else f"this onnxruntime has no {wanted}"
        module = backend.replace("-", "_")
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
        capability = ".".join(map(str, torch.cuda.get_device_capability(self.device))) if self.on_cuda else "none"
        if backend == "tensorrt-rtx" and capability not in RTX_CAPABILITIES:
            return f"TensorRT-RTX has no kernels for compute capability {capability}"
        return None

    def _open(self, model: str, variant: str, side: int, images: int, **options: Any) -> Any:
        from fewstep import export  # noqa: F401 - registers the torch backend

        shared = {"device": self.device, "size": (side, side), "batch": images, **VARIANTS[variant], **options}
        return load(self.folder / f"{model}-bundle", **shared)

    def timing(self, model: str, variant: str, requests: list[tuple[int, int, int]]) -> dict[str, Any]:
        """Whole requests in latency mode: known prompts and new ones, on the wall and on the device; stages; memory."""
        reason = self._lacks(VARIANTS[variant]["backend"])
        if reason is None and not self.on_cuda and VARIANTS[variant].get("engine_options", {}).get("compile"):
            reason = "torch.compile is timed on CUDA"
        if reason:
            return {"skipped": reason}
        outcome: dict[str, Any] = {"requests": []}
        pipe: Any = None
        for side, images, steps in requests:
            if pipe is None or (pipe.size[0], pipe.batch) != (side, images):
                began = time.perf_counter()
                pipe = self._open(model, variant, side, images, mode="latency")
                outcome.setdefault("load_seconds", round(time.perf_counter() - began, 2))
            outcome["requests"].append(self._figures(pipe, model, variant, side, images, steps))
            self.write(outcome)
        return outcome

    def _figures(self, pipe: Any, model: str, variant: str, side: int, images: int, steps: int) -> dict[str, Any]:
        call: dict[str, Any] = {"steps": steps, "sampler": "euler", "schedule": "trailing"}
        call["seed"] = list(range(images))
        if self.on_cuda:
            torch.cuda.reset_peak_memory_stats()
        prompts = [PROMPT] * images
        began = time.perf_counter()
        result = pipe(prompts, **call)
        first = time.perf_counter() - began
        for _ in range(WARM_UPS):
            pipe(prompts, **call)
        known, device = self._taken(lambda: pipe(prompts, **call))
        figures: dict[str, Any] = {"side": side, "images": images, "steps": steps, "first_ms": round(1e3 * first, 1)}
        figures["known_prompt"] = _percentiles(known)
        if device:
            figures["device"] = _percentiles(device)
        pipe.text.forget()

        def new_prompt() -> None:
            pipe.text.forget()
            pipe(prompts, **call)

        figures["new_prompt"] = _percentiles(self._taken(new_prompt)[0])
        stages = result.timings
        figures["stages_ms"] = {k: round(stages[k], 3) for k in ("text", "denoise", "decode")}
        figures["graphs"] = dict(pipe.graph_counts)
        if self.on_cuda:
            figures["peak_bytes"] = torch.cuda.max_memory_allocated()
        path = self.folder / f"{model}-{side}-{images}-{steps}.npy"
        if variant == "torch-eager":
            np.save(path, result.images)
        if path.is_file():
            error = float(np.mean((np.load(path).astype(np.float64) - result.images) ** 2))
            figures["psnr_to_eager_db"] = "identical" if not error else round(10 * float(np.log10(255**2 / error)), 1)
        return figures

    def _taken(self, body: Callable[[], Any]) -> tuple[list[float], list[float]]:
        """Milliseconds of each repetition on the wall, and between events of the default stream on the device."""
        wall, device = [], []
        for _ in range(self.repeat):
            if self.on_cuda:
                before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                before.record()
            began = time.perf_counter()
            body()
            wall.append(1e3 * (time.perf_counter() - began))
            if self.on_cuda:
                after.record()
                after.synchronize()
                device.append(before.elapsed_time(after))
        return wall, device

    def profile(self, model: str, variant: str, side: int, images: int, steps: int) -> dict[str, Any]:
        """One request under torch's profiler: kernels, launches, waits, and the share of time that the device idles."""
        from torch.profiler import ProfilerActivity, profile

        pipe = self._open(model, variant, side, images, mode="latency")
        call: dict[str, Any] = {"steps": steps, "sampler": "euler", "schedule": "trailing", "seed": list(range(images))}
        for _ in range(WARM_UPS):
            pipe([PROMPT] * images, **call)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_cuda else [])]
        with profile(activities=activities) as profiler:
            pipe([PROMPT] * images, **call)
            self.wait()
        events = list(profiler.events())
        calls = Counter(e.name for e in events if e.name.startswith(("cuda", "cu")))
        kernels = sorted(
            (e.time_range.start, e.time_range.end, e.name) for e in events if str(e.device_type).endswith("CUDA")
        )
        outcome: dict[str, Any] = {"runtime_calls": dict(calls.most_common(20)), "kernels": len(kernels)}
        outcome["operations"] = sum(e.name.startswith("aten::") for e in events)
        if kernels:
            busy, at = 0.0, kernels[0][0]
            for start, end, _ in kernels:
                busy += max(0.0, end - max(start, at))
                at = max(at, end)
            span = at - kernels[0][0]
            totals: Counter[str] = Counter()
            for start, end, name in kernels:
                totals[name[:80]] += end - start
            outcome |= {"busy_us": round(busy), "span_us": round(span), "idle_share": round(1 - busy / span, 4)}
            outcome["largest"] = {n: round(t) for n, t in totals.most_common(20)}
        return outcome

    def shared(self, model: str, variant: str, side: int, images: int, steps: int) -> dict[str, Any]:
        """Requests of a server, so many at once: how many a second, and how long each takes."""
        from fewstep.serving import Server

        pipe = self._open(model, variant, side, 16, mode="shared")
        outcome: dict[str, Any] = {}
        with Server(pipe, most_slots=16, most_rows=16, queue=256) as server:
            for at_once in (1, 4, 16):
                waited: list[float] = []

                def ask(number: int, waited: list[float] = waited) -> None:
                    for index in range(max(2, self.repeat // 8)):
                        began = time.perf_counter()
                        call = {"seed": 100 * number + index, "steps": steps, "size": (side, side)}
                        server.submit(PROMPT, sampler="euler", schedule="trailing", **call).result(120)
                        waited.append(1e3 * (time.perf_counter() - began))

                began = time.perf_counter()
                workers = [threading.Thread(target=ask, args=(n,)) for n in range(at_once)]
                for worker in workers:
                    worker.start()
                for worker in workers:
                    worker.join()
                rate = len(waited) / (time.perf_counter() - began)
                outcome[f"{at_once} at once"] = {"images_per_s": round(rate, 2), **_percentiles(waited)}
                self.write(outcome)
        return outcome


def _percentiles(values: list[float]) -> dict[str, Any]:
    p50, p90, p99 = (round(float(v), 3) for v in np.percentile(values, (50, 90, 99)))
    return {"p50_ms": p50, "p90_ms": p90, "p99_ms": p99, "mean_ms": round(statistics.mean(values), 3), "n": len(values)}


def main() -> int:
    asked = json.loads(sys.argv[1])
    steps = Steps(asked)
    try:
        steps.write(getattr(steps, asked["function"])(*asked["arguments"]))
    except BaseException as error:  # what a step said before it failed stays, with what it failed of
        said = json.loads(steps.outcome.read_text(encoding="utf-8")) if steps.outcome.is_file() else {}
        words = {"error": f"{type(error).__name__}: {error}"[:2000], "where": traceback.format_exc(limit=-6)}
        steps.write({**said, **words})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
