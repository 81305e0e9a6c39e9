"""`fewstep memory BUNDLE`: what each stage needs, estimated and measured, and how many images fit at once."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FewstepError, OutOfMemoryError, UnsupportedError
from .common import BACKENDS, BUNDLE_HELP, add_budget_option, between, emit, open_bundle, register_torch, say, size

if TYPE_CHECKING:
    from ..bundle import Bundle

KILLED = -9
"""How the system ends a process that takes too much."""
MEASURED = (1, 2)
"""The batches that are run: two, so that what grows with the batch is told from what does not."""


def device(text: str) -> str:
    """`cpu`, `cuda` or `cuda:1`, as it is."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not cpu, cuda or cuda:<index>")
    return text


def define(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help=BUNDLE_HELP)
    add_budget_option(parser)
    parser.add_argument("--backend", choices=BACKENDS, default="auto")
    parser.add_argument("--size", type=size, metavar="WxH", help="pixels (default: the bundle's)")
    parser.add_argument("--batch", type=between(1, 1024), default=1, help="images at once (default: %(default)s)")
    parser.add_argument("--no-measure", action="store_true", help="estimate only: nothing is loaded or run")
    parser.add_argument("--device", type=device, default="cpu", help="cpu, cuda or cuda:<index> (default: %(default)s)")
    parser.add_argument(
        "--lora-rank",
        type=between(1, 1024),
        metavar="N",
        help="with the engine of images with LoRAs of this rank",
    )
    parser.add_argument("--stage", help="measure this component alone, in this very process")


def execute(options: argparse.Namespace) -> int:
    from ..engines.memory import predict
    from ..runtime.request import check_size

    register_torch(options.backend)
    bundle = open_bundle(options.bundle, options.budget)
    pixels = check_size(bundle, options.size or (bundle.defaults.width, bundle.defaults.height))
    if options.stage:
        emit(options, *_alone(bundle, options, pixels))
        return 0
    predicted = predict(bundle, pixels, options.batch, on_cpu=options.device == "cpu", lora_rank=options.lora_rank)
    stages: list[dict[str, Any]] = [s.to_json() for s in predicted]
    free = _free_bytes(options.device)
    data: dict[str, Any] = {"size": list(pixels), "batch": options.batch, "free_bytes": free, "stages": stages}
    data["largest_batch"] = {"predicted": _largest_predicted(bundle, pixels, free, options.device)}
    if not options.no_measure:
        _build_first(bundle, options, pixels)
        measured = _Measured(options, pixels)
        for stage in stages:
            stage["measured"] = measured.peak(str(stage["component"]), options.batch)
        data["largest_batch"]["measured"] = _largest_measured(measured, stages, free)
    emit(options, data, "\n".join(_lines(data)))
    return 0


def _lines(data: dict[str, Any]) -> list[str]:
    width, height = data["size"]
    lines = [f"{width}x{height}, {data['batch']} at once; MB: weights + buffers + intermediate; peak, measured peak"]
    for stage in data["stages"]:
        parts = " + ".join(f"{stage[n] / 1e6:9.1f}" for n in ("weights", "buffers", "activations"))
        peak = stage.get("measured", "")
        measured = ", does not fit" if peak is None else f", measured {peak / 1e6:9.1f}" if peak != "" else ""
        lines.append(f"{stage['component']:16} {parts}; {stage['total'] / 1e6:9.1f}{measured}")
    largest = data["largest_batch"]
    fits = ", ".join(f"{n} {'unknown' if v is None else v}" for n, v in largest.items())
    free = "unknown" if data["free_bytes"] is None else f"{data['free_bytes'] / 1e9:.1f} GB"
    return [*lines, f"images at once that fit into the {free} that are free: {fits}"]


def _largest_predicted(bundle: Bundle, pixels: tuple[int, int], free: int | None, device: str) -> int | None:
    from ..engines.memory import largest_batch

    return None if free is None else largest_batch(bundle, pixels, free_bytes=free, on_cpu=device == "cpu")


def _largest_measured(measured: _Measured, stages: list[dict[str, Any]], free: int | None) -> int | None:
    """Cautious: as if every stage were at its peak at once. Two batches are measured, a third is a straight line.

    The second is not tried where the first does not fit.
    """
    from ..runtime.request import MOST_IMAGES

    if free is None:
        return None
    names = [str(s["component"]) for s in stages]
    one = measured.together(names, MEASURED[0])
    if one is None or one > free:
        return 0
    two = measured.together(names, MEASURED[1])
    if two is None:
        return 1
    return min(MOST_IMAGES, 1 + (free - one) // max(two - one, 1))


def _build_first(bundle: Bundle, options: argparse.Namespace, pixels: tuple[int, int]) -> None:
    """Make the engines before anything is measured: building takes more memory than running."""
    from ..engines import RunOptions, open_engines
    from ..engines.memory import ADAPTED, dims_for, stages_of

    names = stages_of(bundle)
    run = RunOptions(torch_device="cuda" if options.device.startswith("cuda") else "cpu")
    for batch in {*MEASURED, options.batch}:
        dims = dims_for(bundle, pixels, batch)
        open_engines(bundle, names, backend=options.backend, dims=dict.fromkeys(names, dims), run=run)
        if options.lora_rank is not None:
            adapted, name, wide = _stage(bundle, ADAPTED, dims, options.lora_rank)
            open_engines(adapted, [name], backend=options.backend, dims={name: wide}, run=run)


def _stage(
    bundle: Bundle, stage: str, dims: Mapping[str, int], rank: int | None
) -> tuple[Bundle, str, Mapping[str, int]]:
    """A stage as bundle, component and dimensions."""
    from ..engines.graph.low_rank import RANK
    from ..engines.low_rank import bucket, with_low_rank
    from ..engines.memory import ADAPTED

    if stage != ADAPTED:
        return bundle, stage, dims
    return with_low_rank(bundle, "unet", kernels=False), "unet", {**dims, RANK: bucket(rank or 1)}


class _Measured:
    """Peaks in bytes by component and batch, for one bundle and size; each measured once, in a process of its own."""

    def __init__(self, options: argparse.Namespace, pixels: tuple[int, int]) -> None:
        self._options, self._pixels = options, pixels
        self._peaks: dict[tuple[str, int], int | None] = {}

    def together(self, components: Sequence[str], batch: int) -> int | None:
        """The sum of the stages' peaks in bytes; `None` where one of them does not fit."""
        peaks = [self.peak(c, batch) for c in components]
        held = [p for p in peaks if p is not None]
        return sum(held) if len(held) == len(peaks) else None

    def peak(self, component: str, batch: int) -> int | None:
        """A stage's peak in bytes, `None` where memory does not suffice for it.

        Raises `FewstepError` where its process ends without one for another reason.
        """
        if (component, batch) not in self._peaks:
            self._peaks[component, batch] = self._measure(component, batch)
        return self._peaks[component, batch]

    def _measure(self, component: str, batch: int) -> int | None:
        say(f"measuring {component}, {batch} at once")
        options, (width, height) = self._options, self._pixels
        command = [sys.executable, "-m", "fewstep", "memory", options.bundle, "--json", "--stage", component]
        command += ["--backend", options.backend, "--size", f"{width}x{height}", "--batch", str(batch)]
        command += ["--device", options.device]
        command += [] if options.budget is None else ["--budget", options.budget]
        command += [] if options.lora_rank is None else ["--lora-rank", str(options.lora_rank)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 this interpreter, or a program of this project, with a list of arguments and no shell
        with suppress(ValueError):
            told = json.loads(done.stdout)
            if told.get("error", {}).get("type") == OutOfMemoryError.__name__:
                return None
            if "measured" in told:
                return int(told["measured"])
        if done.returncode == KILLED:
            return None
        raise FewstepError(
            f"{component!r} could not be measured: {done.stderr.strip()[-300:] or f'exit code {done.returncode}'}",
            remedy="Ask for a smaller size or batch, or pass --no-measure.",
        )


def _alone(bundle: Bundle, options: argparse.Namespace, pixels: tuple[int, int]) -> tuple[dict[str, Any], str]:
    """Open, bind and run one component twice; its peak above what the process held before."""
    import numpy as np

    from ..engines import RunOptions, open_engine
    from ..engines.gate.gate import engine_function
    from ..engines.memory import dims_for

    kind, _, index = options.device.partition(":")
    run = RunOptions(torch_device="cuda" if kind == "cuda" else "cpu", device=int(index or 0))
    bundle, name, dims = _stage(bundle, options.stage, dims_for(bundle, pixels, options.batch), options.lora_rank)
    before, anonymous, free = _begin(), _anonymous(), _free_bytes(options.device)
    engine = open_engine(bundle, name, backend=options.backend, dims=dims, run=run)
    zeros = {n: np.zeros(spec.resolve(dims), spec.dtype) for n, spec in engine.inputs.items()}
    for _ in range(2):  # the second run may plan its memory by the first one's, and take more
        engine_function(engine)(zeros, dims)
    if kind == "cuda":
        measured = max(0, (free or 0) - (_free_bytes(options.device) or 0))
    else:
        # pages of files, libraries among them, may have been taken back meanwhile: what was allocated is not
        measured = max(_peak_rss() - before, _anonymous() - anonymous)
    data = {"component": options.stage, "batch": options.batch, "measured": measured, "backend": engine.backend}
    return data, f"{options.stage}: {measured / 1e6:.1f} MB"


def _begin() -> int:
    """Forget the peak so far, where the system can; returns what the process holds now, in bytes."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return _status("VmRSS")
    return _peak_rss()


def _peak_rss() -> int:
    """The most memory this process has held since `_begin`, in bytes."""
    with suppress(OSError):
        return _status("VmHWM")
    from ..engines.machine import peak_memory

    peak = peak_memory()
    if peak is None:
        raise UnsupportedError(
            "measuring memory on a system that tells no process its peak",
            expected="Linux or macOS",
            remedy="Pass --no-measure for the estimate.",
        )
    return peak


def _anonymous() -> int:
    """What this process has allocated and touched, in bytes, where the system tells it apart; else 0."""
    with suppress(OSError, StopIteration):
        return _status("RssAnon")
    return 0


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _free_bytes(device: str) -> int | None:
    """Free memory of the host, or of a GPU as its driver tells it; `None` where nobody tells."""
    kind, _, index = device.partition(":")
    if kind == "cuda":
        from ..engines.machine import gpu

        return gpu(int(index or 0)).free_bytes
    from ..engines.machine import available_memory

    return available_memory()
