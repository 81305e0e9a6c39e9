"""`fewstep triton BUNDLE OUT`: a model repository for Triton Inference Server."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import BACKENDS, BUNDLE_HELP, between, emit, open_bundle, size


def define(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help=BUNDLE_HELP)
    parser.add_argument("out", help="the repository's folder, which may hold other models")
    parser.add_argument("--name", help="the model's name there (default: the bundle's)")
    parser.add_argument("--size", type=size, metavar="WxH", help="pixels of its pictures (default: the bundle's)")
    parser.add_argument(
        "--max-batch", type=between(1, 256), default=8, metavar="N", help="images at once (default: %(default)s)"
    )
    parser.add_argument(
        "--delay-us",
        type=between(0, 60_000_000),
        default=5000,
        metavar="N",
        help="microseconds that the dynamic batcher waits for more requests (default: %(default)s)",
    )
    parser.add_argument(
        "--backend", choices=BACKENDS, default="auto", help="what runs the graphs there (default: %(default)s)"
    )
    parser.add_argument("--link", action="store_true", help="point at the bundle instead of copying it")


def execute(options: argparse.Namespace) -> int:
    from ..integrations.triton import write_repository

    model = write_repository(
        open_bundle(options.bundle),
        Path(options.out),
        name=options.name,
        size=options.size,
        max_batch=options.max_batch,
        delay_us=options.delay_us,
        backend=options.backend,
        link=options.link,
    )
    data = {"model": model.name, "folder": str(model), "repository": options.out}
    emit(options, data, f"{model}: a model of Triton's repository in {options.out}")
    return 0
