"""What exporting a checkpoint of full size takes: time, peak memory and file sizes, beside optimum's exporter.

python bench/export.py [--models sd1 sd21 sdxl] [--dtypes fp32 fp16 bf16] [--output FILE]

Every export is a process of its own over the same random weights, and its peak memory is what the system counted for
it. The numeric gate is left out on both sides (optimum: --no-validation is its word for it). optimum runs in the
virtual environment that `make bench-peers` makes; a process that outgrows --limit-gb is ended and named.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fewstep.bench.machine import describe

ROOT = Path(__file__).parents[1]
OPTIMUM = ROOT / "build" / "bench" / "optimum" / "bin" / "python"
LONG = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
SOURCES = {"sdxl": "float16"}
"""The precision of the random weights on disk, float32 where none is given."""
OPTIMUM_CODE = """
import sys
from optimum.exporters.onnx import main_export
source, target, dtype = sys.argv[1:]
main_export(source, target, task="text-to-image", dtype=dtype, do_validation=False, device="cpu")
"""


def measured(command: list[str], folder: Path, *, limit_gb: float, limit_s: float) -> dict[str, Any]:
    """Run a command; its seconds, its peak memory, the bytes it left in `folder`, and its last words if it failed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "FEWSTEP_CACHE_DIR": str(folder.parent / "cache")}
    began = time.monotonic()
    with tempfile.TemporaryFile() as words:
        process = subprocess.Popen(command, env=environment, stdout=words, stderr=subprocess.STDOUT)  # noqa: S603 this interpreter, or a program of this project, with a list of arguments and no shell
        ended = ""
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            if resident_gb(process.pid) > limit_gb:
                ended = f"ended: it took more than {limit_gb:g} GB"
            elif time.monotonic() - began > limit_s:
                ended = f"ended: it took more than {limit_s:g} s"
            if ended:
                process.kill()
            time.sleep(0.05)
        words.seek(0)
        lines = words.read().decode(errors="replace").strip().splitlines()
    process.returncode = os.waitstatus_to_exitcode(status)
    figures: dict[str, Any] = {
        "seconds": round(time.monotonic() - began, 1),
        "peak_memory_gb": round(usage.ru_maxrss * 1024 / 1e9, 2),
        "gb": round(sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e9, 2) if folder.exists() else 0,
    }
    if process.returncode:
        figures["error"] = ended or (lines[-1][:300] if lines else f"exit code {process.returncode}")
    return figures


def resident_gb(pid: int) -> float:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9


def versions() -> dict[str, str]:
    """The versions on the other side, as its own environment states them."""
    code = (
        "import json; from importlib.metadata import version; "
        "print(json.dumps({n: version(n) for n in ('optimum', 'optimum-onnx', 'torch', 'diffusers', 'transformers')}))"
    )
    done = subprocess.run([str(OPTIMUM), "-c", code], capture_output=True, text=True, check=False)  # noqa: S603 this interpreter, or a program of this project, with a list of arguments and no shell
    return dict(json.loads(done.stdout)) if done.returncode == 0 else {}


def run(model: str, options: argparse.Namespace, work: Path) -> None:
    """Every export of one architecture, each recorded as soon as it is measured."""
    checkpoint = work / model
    source = SOURCES.get(model, "float32")
    subprocess.run(  # noqa: S603 this interpreter, or a program of this project, with a list of arguments and no shell
        [sys.executable, str(ROOT / "tools" / "random_checkpoint.py"), model, str(checkpoint), "--dtype", source],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for dtype in options.dtypes:
        ours = [sys.executable, "-m", "fewstep", "export", str(checkpoint), str(work / "out"), "--no-gate"]
        contenders = {"fewstep": [*ours, "--dtype", dtype]}
        if options.optimum and dtype in options.optimum:
            code = [str(OPTIMUM), "-c", OPTIMUM_CODE, str(checkpoint), str(work / "out"), dtype]
            contenders["optimum"] = code
        for tool, command in contenders.items():
            figures = measured(command, work / "out", limit_gb=options.limit_gb, limit_s=options.limit_s)
            row = {"model": model, "weights": source, "dtype": LONG[dtype], "tool": tool, **figures}
            show(row)
            record(row, options.output)
            shutil.rmtree(work / "out", ignore_errors=True)
    shutil.rmtree(checkpoint)


def show(row: dict[str, Any]) -> None:
    error = f"  {row['error']}" if "error" in row else ""
    print(
        f"{row['model']:9} {row['dtype']:9} {row['tool']:8} {row['seconds']:7.1f} s  "
        f"peak {row['peak_memory_gb']:6.2f} GB  files {row['gb']:6.2f} GB{error}",
        flush=True,
    )


def record(row: dict[str, Any], path: Path | None) -> None:
    """Put a row into the file of figures, in place of an older one of the same export."""
    if path is None:
        return
    kept = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    same = ("model", "dtype", "tool")
    rows = [r for r in kept if any(r[k] != row[k] for k in same)] + [row]
    data = {
        "machine": describe(0),
        "optimum": versions(),
        "rows": sorted(rows, key=lambda r: [r[k] for k in same]),
    }
    path.write_text(json.dumps(data, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["sd1", "sd21", "sdxl"])
    parser.add_argument("--dtypes", nargs="*", default=["fp32", "fp16", "bf16"], choices=list(LONG))
    parser.add_argument(
        "--optimum", nargs="*", default=["fp32"], help="what optimum is asked for; half precision takes it far longer"
    )
    parser.add_argument("--limit-gb", type=float, default=14.0)
    parser.add_argument("--limit-s", type=float, default=1200.0)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench", help="a disk with 30 GB of room")
    parser.add_argument("--output", type=Path, help="write the figures as JSON; rows of other exports stay")
    options = parser.parse_args()
    if options.optimum and not OPTIMUM.is_file():
        print("optimum has no environment here: make bench-peers", file=sys.stderr)
        options.optimum = []
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="export-") as folder:
        for model in options.models:
            run(model, options, Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
