"""`fewstep build BUNDLE`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError
from .common import BACKENDS, BUNDLE_HELP, add_budget_option, bar, emit, log_shown, open_bundle, register_torch, size

if TYPE_CHECKING:
    from ..engines import Span


def define(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help=BUNDLE_HELP)
    add_budget_option(parser)
    parser.add_argument("--backend", choices=BACKENDS, default="auto")
    parser.add_argument("--component", action="append", help="only this component; repeatable")
    parser.add_argument(
        "--size", type=size, action="append", metavar="WxH", help="an exact profile for this size; repeatable"
    )
    parser.add_argument("--batch", type=int, action="append", help="an exact profile for this batch size; repeatable")
    parser.add_argument(
        "--dynamic",
        action="append",
        default=[],
        metavar="DIM=MIN:OPT:MAX",
        help="a span for rows, height, width (latent cells), tokens or batch; of clips for frames or chunk",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be built, how large, and why")
    parser.add_argument("--no-preflight", action="store_true", help="do not check memory and disk first")
    parser.add_argument("--verbose", action="store_true", help="show what the backend says while it builds")
    parser.add_argument("--force", action="store_true", help="build even what is there already")
    parser.add_argument("--optimization-level", type=int, help="TensorRT's, 0 to 5")
    parser.add_argument("--workspace", type=int, metavar="MIB", help="TensorRT's scratch memory")
    parser.add_argument(
        "--compute-capability",
        action="append",
        default=[],
        help="TensorRT-RTX: build for this GPU, like 8.9; repeatable",
    )
    parser.add_argument(
        "--auxiliary-streams", type=int, default=0, help="TensorRT's side streams (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype", choices=("fp16",), help="ONNX Runtime on CUDA: convert to half precision after fusion"
    )
    parser.add_argument(
        "--capturable",
        action="store_true",
        help="TensorRT-RTX: leave all memory to the caller, whose CUDA graph may hold it",
    )
    parser.add_argument(
        "--refittable", action="store_true", help="TensorRT: weights can be replaced in the loaded engine"
    )
    parser.add_argument(
        "--stripped", action="store_true", help="TensorRT: keep no weights in the engine's file, but use the bundle's"
    )


def execute(options: argparse.Namespace) -> int:
    from ..engines import BuildOptions, build_engines, default_store, profiles_for
    from ..engines.plan import check_resources, plan_build

    register_torch("torch")  # its numbers are the reference at sizes of which the bundle has none
    bundle = open_bundle(options.bundle, options.budget)
    chosen = BuildOptions(
        optimization_level=options.optimization_level,
        workspace_bytes=None if options.workspace is None else options.workspace * 2**20,
        float16=options.dtype == "fp16",
        auxiliary_streams=options.auxiliary_streams,
        compute_capabilities=tuple(options.compute_capability),
        capturable=options.capturable,
        refittable=options.refittable,
        stripped=options.stripped,
    )
    profiles = None
    if options.size or options.batch or options.dynamic:
        dynamic = dict(_span(text) for text in options.dynamic)
        profiles = profiles_for(bundle, sizes=options.size or (), batches=options.batch or (1,), dynamic=dynamic)
    shared: dict[str, Any] = {
        "backend": options.backend,
        "components": options.component,
        "profiles": profiles,
        "options": chosen,
        "force": options.force,
    }
    planned = plan_build(bundle, **shared)
    if options.dry_run:
        lines = [
            f"{p.component:15} {p.backend}  {p.length / 1e6:9.2f} MB, {p.memory / 1e6:.0f} MB to build; {p.reason}"
            for p in planned
        ]
        emit(options, {"plan": [p.to_json() for p in planned]}, "\n".join(lines))
        return 0
    if not options.no_preflight:
        check_resources(planned, _existing(default_store().root))
    began = time.monotonic()
    with log_shown(options.verbose), bar(100, "%", "build") as progress:

        def report(component: str, stage: str, fraction: float) -> None:
            progress.set_description(f"{component}: {stage}")
            progress.n = round(100 * fraction)
            progress.refresh()

        built = build_engines(bundle, progress=report, **shared)
    engines = {
        n: {
            "engine": b.entry.name,
            "backend": b.backend,
            "reused": b.reused,
            "reason": b.reason,
            "seconds": round(b.seconds, 3),
        }
        for n, b in built.items()
    }
    lines = [
        f"{n:15} {e['backend']}  {'kept' if e['reused'] else 'built'} in {e['seconds']:.2f} s ({e['reason']})"
        for n, e in engines.items()
    ]
    emit(options, {"engines": engines, "seconds": round(time.monotonic() - began, 3)}, "\n".join(lines))
    return 0


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return folder if folder.exists() else _existing(folder.parent)


def _span(text: str) -> tuple[str, Span]:
    """`height=32:64:128` as a dimension and its span."""
    from ..engines import Span

    name, _, values = text.partition("=")
    try:
        low, best, high = (int(v) for v in values.split(":"))
    except ValueError as error:
        raise ArgumentError(f"the span is {text!r}", expected="DIM=MIN:OPT:MAX, like height=32:64:128") from error
    return name, Span(minimum=low, optimum=best, maximum=high)
