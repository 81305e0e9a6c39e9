"""`fewstep demo`: export, build and run the embedded model, then say where the picture is and what each stage took."""

from __future__ import annotations

import argparse
import time

from .common import add_engine_options, between, emit, stage_lines

PROMPT = "a red circle on a blue background"


def define(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", default=PROMPT, help='the default is "%(default)s"')
    parser.add_argument(
        "--model",
        choices=("student", "base"),
        default="student",
        help="4 steps without guidance, or 20 with (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int)
    parser.add_argument(
        "--scale",
        type=between(1, 64),
        default=6,
        help="enlarge the 64x64 picture this many times (default: %(default)s)",
    )
    parser.add_argument("--output", default="demo.png", help="the PNG to write (default: %(default)s)")
    add_engine_options(parser)


def execute(options: argparse.Namespace) -> int:
    import numpy as np

    from ..export.embedded import embedded_bundle
    from ..runtime import load
    from ..runtime.pictures.images import check_output, save_picture

    target = check_output(options.output)
    began = time.perf_counter()
    bundle, exported = embedded_bundle(options.model)
    at_bundle = time.perf_counter()
    pipe = load(bundle, backend=options.backend, threads=options.threads)
    at_engines = time.perf_counter()
    result = pipe(options.prompt, seed=options.seed, steps=options.steps)
    at_image = time.perf_counter()
    scale = options.scale
    image = result.images[0].repeat(scale, axis=0).repeat(scale, axis=1)
    save_picture(target, np.ascontiguousarray(image), {**result.parameters[0], "bundle": options.model})
    stages = {
        "export" if exported else "find the bundle": at_bundle - began,
        "build and load engines": at_engines - at_bundle,
        "make the image": at_image - at_engines,
        "write the picture": time.perf_counter() - at_image,
    }
    lines = [f"{target}: {options.prompt!r}, embedded {options.model}, seed {options.seed}"]
    lines += [f"  {name:24} {1e3 * seconds:8.1f} ms" for name, seconds in stages.items()]
    lines.append(f"  of the image: {stage_lines(dict(result.timings))}")
    lines.append(f"the bundle lies in {bundle.folder}")
    data = {
        "file": str(target),
        "bundle": str(bundle.folder),
        "stages_ms": {k: 1e3 * v for k, v in stages.items()},
        "timings_ms": dict(result.timings),
    }
    emit(options, data, "\n".join(lines))
    return 0
