"""What a visit to a GPU is for, in one command: correctness first, the first figure within minutes, then the rest.

python bench/gpu_check.py --folder build/gpu-check --output build/gpu-check.json
python bench/gpu_check.py --device cpu:torch --tiny --folder build/gpu-check-tiny      (the same steps, on any machine)

It runs from a checkout, with nothing installed but torch, NumPy and what it names when that is missing. Each step is a
process of its own with a time limit, so that one that hangs or crashes ends alone. After every step the report is
written. A step that succeeded is not done again while what it made is there and code and options are the same; one that
failed is. No step begins that the slice's time does not admit: exit code 75 says to run it again. Exit codes: 0 all of
the plan is done, 1 no timing worked, 3 a package is missing.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NEEDED = (
    "packaging",
    "torch",
    "numpy",
    "diffusers",
    "transformers",
    "accelerate",
    "tokenizers",
    "safetensors",
    "filelock",
)
NEEDED += ("platformdirs", "tqdm", "PIL", "onnxruntime")
DISTRIBUTIONS = {"PIL": "pillow"}
MORE_TO_DO, NOTHING_WORKED, MISSING = 75, 1, 3


@dataclass(frozen=True)
class CheckStep:
    """One step of a plan: a function of `gpu_steps.py` with its arguments, what it makes, and its time limit."""

    name: str
    function: str
    arguments: tuple[Any, ...] = ()
    makes: str = ""
    limit_s: float = 120.0


@dataclass(frozen=True)
class Model:
    """A model to check, and what is asked of it as (side in pixels, images, steps)."""

    name: str
    architecture: str
    requests: tuple[tuple[int, int, int], ...]


SD_TURBO = Model("sd-turbo", "sd2", ((512, 1, 1), (512, 1, 2), (512, 1, 4)))
SDXL_TURBO = Model("sdxl-turbo", "sdxl", ((512, 1, 1), (512, 1, 4), (1024, 1, 4)))
SD15 = Model("sd15", "sd1", ((512, 1, 4), (512, 4, 4)))
TINY = Model("tiny", "embedded", ((64, 1, 1), (64, 1, 2)))

DESIGN = ("replays", "failed_capture", "threads", "stream_wrap", "evictions", "synchronisations", "seeds")
"""Steps of correctness, on the embedded model."""


def plan_first(tiny: bool) -> list[CheckStep]:
    """Correctness; SD-Turbo; SDXL, whose decoder is the largest loss; peers; sharing."""
    turbo, large = (TINY, None) if tiny else (SD_TURBO, SDXL_TURBO)
    steps = [CheckStep("machine", "machine"), CheckStep("rates", "rates")]
    steps += [CheckStep(f"design/{name}", name) for name in DESIGN]
    steps += made(turbo)
    variants = ("torch-graph", "torch-eager", "torch-eager-plain-norms", "torch-eager-nchw")
    steps += [timing(turbo, v) for v in variants]
    steps.append(CheckStep(f"{turbo.name}/profile", "profile", (turbo.name, "torch-graph", *turbo.requests[0])))
    steps += [timing(turbo, "torch-compile-graph", 300.0)]
    if large is not None:
        steps += made(large)
        steps += [timing(large, v) for v in ("torch-graph", "torch-graph-vae-float32", "torch-eager")]
        steps.append(CheckStep(f"{large.name}/profile", "profile", (large.name, "torch-graph", *large.requests[0])))
    steps += [timing(turbo, v, 420.0) for v in ("torch-reduce-overhead", "torch-autotune-graph")]
    steps.append(CheckStep(f"{turbo.name}/shared", "shared", (turbo.name, "torch-graph", *turbo.requests[0])))
    return steps


def plan_all(tiny: bool) -> list[CheckStep]:
    """Plan `first`, and every backend that is installed."""
    steps = plan_first(tiny)
    for model in (TINY,) if tiny else (SD_TURBO, SDXL_TURBO, SD15):
        steps += [s for s in made(model) if s not in steps]
        for backend in ("ort-cpu",) if tiny else ("ort-cuda", "tensorrt-rtx", "tensorrt"):
            steps.append(CheckStep(f"{model.name}/build/{backend}", "build", (model.name, backend), limit_s=540.0))
            steps.append(timing(model, backend))
    return steps


def made(model: Model) -> list[CheckStep]:
    """What a model's other steps stand on."""
    checkpoint = f"{model.name}-checkpoint" if model.architecture != "embedded" else ""
    bundle = f"{model.name}-bundle/bundle.json"
    return [
        CheckStep(f"{model.name}/checkpoint", "checkpoint", (model.name, model.architecture), checkpoint, 240.0),
        CheckStep(f"{model.name}/bundle", "bundle", (model.name, model.architecture), bundle, 240.0),
        CheckStep(f"{model.name}/work", "work", (model.name, model.requests)),
    ]


def timing(model: Model, variant: str, limit_s: float = 240.0) -> CheckStep:
    return CheckStep(f"{model.name}/time/{variant}", "timing", (model.name, variant, model.requests), limit_s=limit_s)


PLANS = {"first": plan_first, "all": plan_all}


class Check:
    """The steps of a plan, and the file that remembers what came of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.folder = options, Path(options.folder).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.steps = [s for s in PLANS[options.plan](options.tiny) if options.only in s.name]
        self.file, self.began = self.folder / "state.json", time.monotonic()
        same = {
            "sources": digest_of_sources(),
            "device": options.device,
            "tiny": options.tiny,
            "repeat": options.repeat,
        }
        known = json.loads(self.file.read_text(encoding="utf-8")) if self.file.is_file() else {}
        self.state: dict[str, Any] = known if known.get("of") == same else {"of": same, "done": {}}

    def run(self) -> bool:
        """Do what is left, in order; False when the slice's time is over before the last step."""
        for step in self.steps:
            if self.is_done(step):
                continue
            left = self.options.slice_seconds - (time.monotonic() - self.began)
            if left < min(step.limit_s, self.options.least_seconds) and self.state["done"]:
                return False
            print(step.name, file=sys.stderr, flush=True)
            started = time.monotonic()
            outcome = self.in_a_child(step, min(step.limit_s, max(left, self.options.least_seconds)))
            self.state["done"][step.name] = {**outcome, "seconds": round(time.monotonic() - started, 3)}
            write_json(self.file, self.state)
            self.write_report(complete=False)
        return True

    def is_done(self, step: CheckStep) -> bool:
        known = self.state["done"].get(step.name)
        there = not step.makes or (self.folder / step.makes).exists()
        return known is not None and "error" not in known and there

    def in_a_child(self, step: CheckStep, limit_s: float) -> dict[str, Any]:
        """What a step says of itself; how it ended, where it says nothing. What it wrote before stays in any case."""
        outcome = self.folder / "outcome.json"
        outcome.unlink(missing_ok=True)
        asked = {"function": step.function, "arguments": step.arguments, "outcome": str(outcome)}
        asked |= {"folder": str(self.folder), "device": self.options.device, "repeat": self.options.repeat}
        command = [sys.executable, str(Path(__file__).with_name("gpu_steps.py")), json.dumps(asked)]
        environment = {**os.environ, "PYTHONPATH": package_path(), "FEWSTEP_CACHE_DIR": str(self.folder / "cache")}
        log = self.folder / "step.log"
        with log.open("w", encoding="utf-8") as output:
            child = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
            try:
                code: int | None = child.wait(limit_s)
            except subprocess.TimeoutExpired:
                code = None
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        said = json.loads(outcome.read_text(encoding="utf-8")) if outcome.is_file() else {}
        if code is None:
            return {**said, "error": f"it was ended after {limit_s:.0f} s"}
        if code and "error" not in said:
            return {**said, "error": f"it ended with code {code}", "where": log.read_text(errors="replace")[-2000:]}
        return dict(said)

    def write_report(self, *, complete: bool) -> dict[str, Any]:
        """The report so far: every step of the plan, done, failed, skipped or not begun."""
        done = self.state["done"]
        results = {s.name: done.get(s.name, {"not begun": "there was no time yet"}) for s in self.steps}
        add_floors(results)
        report = {"complete": complete, "plan": self.options.plan, **self.state["of"], "results": results}
        report["summary"] = {
            word: sorted(n for n, r in results.items() if key in r)
            for word, key in (("failed", "error"), ("skipped", "skipped"), ("not begun", "not begun"))
        }
        if self.options.output is not None:
            write_json(self.options.output, report)
        return report


def add_floors(results: dict[str, dict[str, Any]]) -> None:
    """Beside each timing the least time that the machine's own rates allow, where both are known."""
    rates = results.get("rates", {})
    for name, outcome in results.items():
        work = results.get(f"{name.partition('/')[0]}/work", {})
        for figures in outcome.get("requests", ()):
            stages = work.get(f"{figures['side']}x{figures['images']}")
            if "flops_per_s" in rates and stages:
                least = {
                    n: max(s["flops"] / rates["flops_per_s"], s["bytes"] / rates["bytes_per_s"])
                    for n, s in stages.items()
                }
                floor = 1e3 * (figures["steps"] * least["unet"] + least["vae_decoder"])
                figures["floor_ms"] = round(floor, 3)
                figures["times_the_floor"] = round(figures["known_prompt"]["p50_ms"] / max(floor, 1e-9), 2)


def digest_of_sources() -> str:
    """Of the package's Python: results of other code are not these results."""
    whole = hashlib.sha256()
    for path in sorted(p for p in ROOT.rglob("*.py") if not {"build", ".venv", "tests"} & set(p.parts)):
        whole.update(path.read_bytes())
    return whole.hexdigest()[:16]


def package_path() -> str:
    """A folder in which the checkout is the package `fewstep`, whatever it is called, and the scripts beside it."""
    if importlib.util.find_spec("fewstep") is None:
        folder = Path(tempfile.gettempdir()) / f"fewstep-{hashlib.sha256(str(ROOT).encode()).hexdigest()[:12]}"
        folder.mkdir(exist_ok=True)
        if not (folder / "fewstep").exists():
            (folder / "fewstep").symlink_to(ROOT, target_is_directory=True)
        own = str(folder)
    else:
        own = ""
    return os.pathsep.join(p for p in (own, str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")) if p)


def missing_packages() -> list[str]:
    """Distributions that the steps need and this Python has not, and those that these need in turn."""
    missing = [DISTRIBUTIONS.get(n, n) for n in NEEDED if importlib.util.find_spec(n) is None]
    for name in NEEDED:
        try:
            required = metadata.requires(DISTRIBUTIONS.get(name, name)) or []
        except metadata.PackageNotFoundError:
            continue
        missing += [r for r in map(required_name, required) if r is not None and not is_installed(r)]
    return list(dict.fromkeys(missing))


def required_name(requirement: str) -> str | None:
    """The distribution that a requirement names, where it is one of this Python and of no extra."""
    from packaging.requirements import Requirement

    parsed = Requirement(requirement)
    return parsed.name if parsed.marker is None or parsed.marker.evaluate({"extra": ""}) else None


def is_installed(distribution: str) -> bool:
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def write_json(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(data, indent=1, default=str) + "\n", encoding="utf-8")
    part.replace(path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=PLANS, default="first", help="(default: %(default)s)")
    parser.add_argument("--device", default="cuda:0", help="cuda:<index>, or cpu:torch (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="the embedded model in place of full size")
    parser.add_argument("--only", default="", metavar="WORD", help="only steps whose name holds this")
    parser.add_argument("--folder", default="build/gpu-check", help="checkpoints, bundles, and what was done")
    parser.add_argument(
        "--output", type=Path, help="the report, written after every step (default: stdout, at the end)"
    )
    parser.add_argument("--slice-seconds", type=float, default=540.0, help="end before this (default: %(default)s)")
    parser.add_argument("--least-seconds", type=float, default=30.0, help="no step begins with less than this left")
    parser.add_argument("--repeat", type=int, default=50)
    options = parser.parse_args(argv)
    missing = missing_packages()
    if missing:
        print(f"missing: {', '.join(missing)}; install them, or carry their wheels: pip install *.whl", file=sys.stderr)
        return MISSING
    check = Check(options)
    complete = check.run()
    report = check.write_report(complete=complete)
    if options.output is None:
        print(json.dumps(report, indent=1, default=str))
    for word, names in report["summary"].items():
        if names:
            print(f"{word}: {', '.join(names)}", file=sys.stderr)
    if not complete:
        return MORE_TO_DO
    return 0 if any(r.get("requests") for r in report["results"].values()) else NOTHING_WORKED


if __name__ == "__main__":
    sys.exit(main())
