"""What starting costs: `import fewstep`, `fewstep --help`, and the demo's second run, each as a process of its own.

python bench/startup.py [--runs 9] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fewstep.bench.machine import describe


def timed(command: list[str], runs: int, environment: dict[str, str], cwd: str) -> list[float]:
    """Milliseconds of each run; the first, which fills caches, is left out."""
    milliseconds = []
    for _ in range(runs + 1):
        began = time.perf_counter()
        subprocess.run(  # noqa: S603 this interpreter, or a program of this project, with a list of arguments and no shell
            command, env=environment, cwd=cwd, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        milliseconds.append(1e3 * (time.perf_counter() - began))
    return milliseconds[1:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    script = str(Path(sys.executable).with_name("fewstep"))
    commands = {
        "bare python": [sys.executable, "-c", "pass"],
        "import fewstep": [sys.executable, "-c", "import fewstep"],
        "fewstep --help": [script, "--help"],
        "fewstep demo, warm": [script, "demo"],
    }
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "FEWSTEP_CACHE_DIR": str(Path(folder) / "cache")}
        figures = {name: timed(command, options.runs, environment, folder) for name, command in commands.items()}
    rows = {
        n: {"p50_ms": round(statistics.median(v), 1), "min_ms": round(min(v), 1), "max_ms": round(max(v), 1)}
        for n, v in figures.items()
    }
    bare = rows["bare python"]["p50_ms"]
    for name, row in rows.items():
        spread = f"min {row['min_ms']:.1f}, max {row['max_ms']:.1f}"
        over = row["p50_ms"] - bare
        print(f"{name:20} p50 {row['p50_ms']:7.1f} ms  ({spread}; over bare Python {over:+.1f})")
    if options.output:
        data = {"machine": describe(0), "runs": options.runs, "figures": rows}
        options.output.write_text(json.dumps(data, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
