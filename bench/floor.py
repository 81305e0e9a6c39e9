"""Where a component's time goes on the CPU, and its floor: FLOPs over the matmul rate, bytes over the bandwidth.

python bench/floor.py BUNDLE|student [--components unet,vae_decoder] [--size WxH] [--runs N] [--threads N] [--output F]

ONNX Runtime's profiler names every node that the optimised graph really runs, with its shapes and its time. FLOPs are
those of convolutions, matrix products and attention; the bytes are those of the weights, read once an evaluation. Rate
and bandwidth are measured in the same run, on as many threads.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fewstep.bench.machine import describe
from fewstep.bundle import Bundle, read_bundle
from fewstep.engines import RunOptions, build_engines
from fewstep.engines.backends.ort import open_session
from fewstep.engines.profile import profiles_for

SIDE, COPY_BYTES = 2048, 1 << 28
Shape = list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorRow:
    """All nodes of one operator: how many, milliseconds an evaluation, GFLOP, and MB that they read and write."""

    operator: str
    nodes: int
    ms: float
    gflop: float
    mb: float


def flops(operator: str, inputs: list[Shape], outputs: list[Shape]) -> float:
    """Multiplications and additions of a node with these shapes; 0 for operators that are bound by memory."""
    if operator in ("Conv", "FusedConv"):
        return 2.0 * math.prod(outputs[0]) * math.prod(inputs[1][1:])
    if operator in ("MatMul", "FusedMatMul", "Gemm"):
        return 2.0 * math.prod(inputs[0]) * outputs[0][-1]
    if operator in ("Attention", "MultiHeadAttention"):
        rows, keys = math.prod(inputs[0]), inputs[1][-2]
        return 4.0 * rows * keys
    return 0.0


def profiled(
    model: Path, external: Path, feeds: dict[str, Any], runs: int, threads: int
) -> tuple[list[OperatorRow], float]:
    """The rows by operator, slowest first, and the median milliseconds of an evaluation without the profiler."""
    with tempfile.TemporaryDirectory() as folder:

        def configure(options: Any) -> None:
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "profile")

        run = RunOptions(threads=threads)
        given: dict[str, Any] = {"run": run, "optimization": "disabled"}
        data = model.read_bytes()
        session = open_session(data, external_folder=external, configure=configure, **given)
        for _ in range(runs + 1):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text())
    del session
    plain = open_session(data, external_folder=external, **given)
    plain.run(None, feeds)
    return list(_rows(events)), 1e3 * float(np.median(_timed(lambda: plain.run(None, feeds), runs)))


def _rows(events: list[dict[str, Any]]) -> Iterator[OperatorRow]:
    times: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    work: dict[str, dict[str, tuple[float, float]]] = defaultdict(dict)
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        facts = event["args"]
        operator, node = facts["op_name"], event["name"]
        times[operator][node].append(event["dur"] / 1e3)
        inputs, outputs = (_shapes(facts.get(k, [])) for k in ("input_type_shape", "output_type_shape"))
        moved = 4.0 * sum(math.prod(s) for s in (*inputs, *outputs))
        work[operator][node] = flops(operator, inputs, outputs), moved
    for operator in sorted(times, key=lambda o: -sum(map(np.median, times[o].values()))):
        yield OperatorRow(
            operator=operator,
            nodes=len(times[operator]),
            ms=round(float(sum(map(np.median, times[operator].values()))), 3),
            gflop=round(sum(f for f, _ in work[operator].values()) / 1e9, 3),
            mb=round(sum(b for _, b in work[operator].values()) / 1e6, 1),
        )


def _shapes(given: Any) -> list[Shape]:
    return [shape for value in given for shape in value.values()]


def _timed(call: Callable[[], Any], runs: int) -> list[float]:
    seconds = []
    for _ in range(runs):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return seconds


def matmul_rate(threads: int) -> float:
    """The best GFLOP/s of a float32 matrix product of 2048 x 2048 on ONNX Runtime, in ten."""
    from fewstep.engines.graph.onnx_bytes import Node, block, number, string

    def value(at: int, name: str) -> bytes:
        dims = b"".join(block(1, number(1, SIDE)) for _ in range(2))
        return block(at, string(1, name) + block(2, block(1, number(1, 1) + block(2, dims))))

    node = Node(operator="MatMul", inputs=["a", "b"], outputs=["c"])
    graph = block(1, node.to_bytes()) + string(2, "matmul") + value(11, "a") + value(11, "b") + value(12, "c")
    model = number(1, 10) + block(7, graph) + block(8, number(2, 17))
    session = open_session(model, run=RunOptions(threads=threads))
    draw = np.random.default_rng(0)
    feeds = {n: draw.standard_normal((SIDE, SIDE), dtype=np.float32) for n in "ab"}
    return 2e-9 * SIDE**3 / min(_timed(lambda: session.run(None, feeds), 10))


def bandwidth(threads: int) -> float:
    """The best GB/s of copying 256 MiB a thread, read and written, in ten."""
    pairs = [(np.ones(COPY_BYTES // 8), np.zeros(COPY_BYTES // 8)) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        best = min(_timed(lambda: list(pool.map(lambda p: np.copyto(p[1], p[0]), pairs)), 10))
    return 2e-9 * COPY_BYTES * threads / best


def measure(bundle: Bundle, component: str, size: tuple[int, int] | None, runs: int, threads: int) -> dict[str, Any]:
    entry = build_engines(bundle, backend="ort-cpu", components=(component,))[component].entry
    dims = dict(profiles_for(bundle)[component][0].optimum)
    if size is not None:
        dims |= {"width": size[0] // bundle.latent.factor, "height": size[1] // bundle.latent.factor}
    draw = np.random.default_rng(0)
    feeds = {}
    for spec in bundle.component(component).inputs:
        shape = spec.resolve(dims)
        feeds[spec.name] = (
            draw.standard_normal(shape).astype(np.float32) if spec.dtype == "float32" else np.zeros(shape, spec.dtype)
        )
    external = entry.folder if entry.data is not None else bundle.folder
    rows, ms = profiled(entry.path, external, feeds, runs, threads)
    weights = bundle.path(bundle.component(component).weights).stat().st_size
    return {"dims": dims, "ms": round(ms, 3), "weights_mb": round(weights / 1e6, 1), "rows": [asdict(r) for r in rows]}


def with_floor(data: dict[str, Any], rate: float, speed: float) -> dict[str, Any]:
    """The floor of a component, in ms: its FLOPs, the bytes of its weights, and how far above the larger it is."""
    gflop = sum(r["gflop"] for r in data["rows"])
    by_flops, by_bytes = 1e3 * gflop / rate, data["weights_mb"] / speed
    floor = max(by_flops, by_bytes)
    floors = {"gflop": round(gflop, 2), "floor_flops_ms": round(by_flops, 3), "floor_weights_ms": round(by_bytes, 3)}
    return {**data, **floors, "above_floor": round(data["ms"] / floor, 2)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="a bundle folder, or student or base: the embedded models")
    parser.add_argument("--components", default="unet,vae_decoder")
    parser.add_argument("--size", help="WxH (default: the bundle's)")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.bundle in ("student", "base"):
        from fewstep.export.embedded import embedded_bundle

        bundle, _ = embedded_bundle(options.bundle)
    else:
        bundle = read_bundle(options.bundle)
    about = describe(options.threads)
    rate, speed = matmul_rate(about["threads"]), bandwidth(about["threads"])
    size = tuple(map(int, options.size.split("x"))) if options.size else None
    parts = {
        name: with_floor(measure(bundle, name, size, options.runs, options.threads), rate, speed)  # type: ignore[arg-type]
        for name in options.components.split(",")
    }
    report = {"machine": about, "matmul_gflops": round(rate, 1), "bandwidth_gb_s": round(speed, 1), "components": parts}
    print(f"matmul {rate:.0f} GFLOP/s, copying {speed:.1f} GB/s, {about['threads']} threads")
    for name, part in parts.items():
        floors = f"{part['floor_flops_ms']:.2f} ms by FLOPs, {part['floor_weights_ms']:.2f} by weights"
        print(
            f"{name}: {part['ms']:.2f} ms, {part['gflop']:.2f} GFLOP; floor {floors}; {part['above_floor']:.2f}x above"
        )
        for row in part["rows"][:12]:
            done = f"{row['gflop'] / row['ms'] * 1e3:7.0f} GFLOP/s" if row["gflop"] and row["ms"] else ""
            print(f"  {row['operator']:24} {row['nodes']:5} {row['ms']:10.3f} ms {row['mb']:9.1f} MB {done}")
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
