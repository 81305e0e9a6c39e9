"""Real time, as a viewer has it: frames a second and input-to-frame latency, measured by the page in Chromium.

python bench/live.py [--seconds 10] [--steps 1] [--output FILE]

`fewstep serve` runs the embedded student at 64x64 in a process of its own; headless Chromium opens its page, which
sends an input every 16 milliseconds, whatever comes back: another seed, or a drawing with a moved stroke. The latency
of every input counts, from just before it is made until a frame that shows it, or a newer one, is on the canvas.
Server and browser share the machine's cores. Needs Debian's packages chromium and chromium-driver.
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
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fewstep.bench.machine import describe

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1200,800",
]
PROMPT = "a red circle on a blue background"

# The page's own functions drive it: an input every `pause` milliseconds, for `ms` milliseconds after a first while.
DRIVE = """
const [ms, pictures, pause, done] = arguments;
let seed = 1000, moved = 0, begun = 0, last = 0;
const sketch = document.createElement('canvas'), sent = new Map(), latencies = [], marks = [];
sketch.width = sketch.height = 64;
const pen = sketch.getContext('2d', { alpha: false });
async function input() {
  const at = performance.now();
  let id = 0;
  if (pictures) {
    pen.fillStyle = '#2040d0'; pen.fillRect(0, 0, 64, 64);
    pen.fillStyle = '#d02020'; pen.fillRect(8 + (moved += 5) % 40, 20, 16, 16);
    id = await live.picture(await new Promise(ready => sketch.toBlob(ready, 'image/jpeg', 0.85)));
  } else id = live.set({ seed: ++seed });
  sent.set(id, at);
}
live.onframe = id => {
  const now = performance.now();
  if (begun) marks.push(now);
  for (; last < id; last++) {
    const at = sent.get(last + 1);
    sent.delete(last + 1);
    if (begun && at > begun) latencies.push(now - at);
  }
};
const timer = setInterval(input, pause);
setTimeout(() => { begun = performance.now(); }, 1500);
setTimeout(() => { clearInterval(timer); live.onframe = null; done({ latencies, marks }); }, 1500 + ms);
"""


@contextmanager
def serving(*options: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """`fewstep serve student` until it is ready; its address and process."""
    port = 8600 + os.getpid() % 1000
    command = [sys.executable, "-m", "fewstep", "serve", "student", "--port", str(port), *options]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)  # noqa: S603 this interpreter, or a program of this project, with a list of arguments and no shell
        address = f"http://127.0.0.1:{port}"
        try:
            for _ in range(600):
                try:
                    with urllib.request.urlopen(f"{address}/health/ready", timeout=5):  # noqa: S310 the address of the server that this started
                        break
                except OSError:
                    if process.poll() is not None:
                        log.seek(0)
                        sys.exit(log.read().decode(errors="replace"))
                    time.sleep(0.1)
            yield address, process
        finally:
            process.terminate()
            process.wait(60)


@contextmanager
def browser(*flags: str) -> Iterator[Any]:
    """Headless Chromium with a profile of its own, and more flags if wanted."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS, *flags, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(service=Service(str(shutil.which("chromedriver"))), options=options)
        try:
            yield driver
        finally:
            driver.quit()


def cpu_seconds(root: int) -> float:
    """User and system seconds of a process and all below it (Linux)."""
    parents, spent = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        pid = int(stat.parent.name)
        parents[pid], spent[pid] = int(fields[1]), (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    total, wanted = 0.0, {root}
    for pid in sorted(parents):
        if pid in wanted or parents[pid] in wanted:
            wanted.add(pid)
            total += spent[pid]
    return total


def percentile(values: list[float], percent: float) -> float:
    """The smallest value that `percent` of all do not exceed."""
    return sorted(values)[min(len(values) - 1, int(percent / 100 * len(values)))] if values else float("nan")


def measure(driver: Any, server: int, *, seconds: float, steps: int, pictures: bool, rate: float) -> dict[str, Any]:
    """One way of driving the page."""
    settings = {"prompt": PROMPT, "steps": steps, "guidance": 0, "strength": 0.5, "noise": "fixed"}
    driver.execute_script("live.set(arguments[0]); live.errors.length = 0;", settings)
    time.sleep(0.5)
    before = cpu_seconds(server), cpu_seconds(driver.service.process.pid), time.perf_counter()
    got = driver.execute_async_script(DRIVE, 1000 * seconds, pictures, 1000 / rate)
    spent = time.perf_counter() - before[2]
    used = cpu_seconds(server) - before[0], cpu_seconds(driver.service.process.pid) - before[1]
    marks, latencies = got["marks"], got["latencies"]
    shown = 1000 * (len(marks) - 1) / (marks[-1] - marks[0])
    driver.execute_script("live.socket.send(JSON.stringify({type: 'clear', id: live.next++, at: 0}))")
    return {
        "input": "pictures" if pictures else "seeds",
        "steps": steps,
        "inputs_a_second": rate,
        "inputs": len(latencies),
        "frames": len(marks),
        "fps": round(shown, 1),
        "input_to_frame_ms": {f"p{p}": round(percentile(latencies, p), 1) for p in (50, 90, 99)},
        "errors": driver.execute_script("return live.errors.length"),
        "cpu_ms_a_frame": {
            "server": round(1e3 * used[0] / spent / shown, 1),
            "browser": round(1e3 * used[1] / spent / shown, 1),
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--steps", type=int, action="append", help="repeatable (default: 1, 2 and 4)")
    parser.add_argument("--rate", type=float, default=62.5, help="inputs a second (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    missing = [n for n in ("chromium", "chromedriver") if shutil.which(n) is None]
    if missing:
        sys.exit(f"not found: {', '.join(missing)}. Install Debian's packages chromium and chromium-driver.")
    rows, machine = [], describe(1)
    with serving("--threads", "1") as (address, process), browser() as driver:
        driver.set_script_timeout(60 + options.seconds)
        driver.get(f"{address}/live")
        version = driver.capabilities["browserVersion"]
        while not driver.execute_script("return live.frames > 0"):
            time.sleep(0.05)
        for steps in options.steps or (1, 2, 4):
            for pictures in (False, True):
                row = measure(
                    driver,
                    process.pid,
                    seconds=options.seconds,
                    steps=steps,
                    pictures=pictures,
                    rate=options.rate,
                )
                rows.append(row)
                ms = row["input_to_frame_ms"]
                print(
                    f"{row['input']:8} {steps} steps: {row['fps']:6.1f} frames/s, input to frame "
                    f"p50 {ms['p50']:.1f}, p90 {ms['p90']:.1f}, p99 {ms['p99']:.1f} ms; "
                    f"CPU a frame: server {row['cpu_ms_a_frame']['server']:.1f}, "
                    f"browser {row['cpu_ms_a_frame']['browser']:.1f} ms"
                )
    if options.output:
        data = {
            "what": (__doc__ or "").split("\n")[0],
            "model": "embedded-student",
            "size": "64x64",
            "machine": machine,
            "chromium": version,
            "seconds": options.seconds,
            "figures": rows,
        }
        options.output.write_text(json.dumps(data, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
