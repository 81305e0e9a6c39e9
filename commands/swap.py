"""`fewstep swap BUNDLE OTHER`: another bundle's weights in a loaded pipeline, or adapters merged into its own."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from .asking import lora
from .common import BUNDLE_HELP, add_engine_options, emit, open_bundle, register_torch


def define(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help=BUNDLE_HELP)
    parser.add_argument("other", nargs="?", help="a bundle of the same architecture (default: the bundle itself)")
    parser.add_argument(
        "--lora",
        dest="loras",
        type=lora,
        action="append",
        default=[],
        metavar="FILE[:SCALE]",
        help="merge an adapter of any kind into the weights; repeatable (default scale: 1)",
    )
    parser.add_argument("--no-gate", action="store_true", help="do not compare the other's weights with its reference")
    parser.add_argument("--prompt", help="make a picture with the weights that were loaded")
    parser.add_argument("--seed", type=int, default=0, help="of the picture (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("out.png"), help="where it goes (default: %(default)s)")
    add_engine_options(parser)


def execute(options: argparse.Namespace) -> int:
    from ..runtime.loader import load

    register_torch(options.backend)
    bundle = open_bundle(options.bundle)
    other = None if options.other is None else open_bundle(options.other)
    began = time.perf_counter()
    pipe = load(bundle, backend=options.backend, threads=options.threads, swappable=True)
    loaded = time.perf_counter()
    took = pipe.load_weights(other, loras=dict(options.loras) or None, gate=not options.no_gate)
    swapped = time.perf_counter()
    data: dict[str, Any] = {
        "bundle": bundle.name,
        "other": pipe.bundle.name,
        "load_ms": 1e3 * (loaded - began),
        "swap_ms": 1e3 * (swapped - loaded),
        "components_ms": took,
        "loaded": {n: p.weights_sha256 for n, p in pipe.bundle.components.items()},
    }
    lines = [f"{bundle.name} loaded in {data['load_ms']:.0f} ms, {pipe.bundle.name} in {data['swap_ms']:.0f} ms"]
    lines += [f"{name:15} {ms:8.1f} ms  {data['loaded'][name][:16]}" for name, ms in took.items()]
    lines += [] if took else ["nothing differs"]
    if options.prompt is not None:
        (path,) = pipe(options.prompt, seed=options.seed).save(options.output)
        data["picture"] = str(path)
        lines.append(f"wrote {path}")
    emit(options, data, "\n".join(lines))
    return 0
