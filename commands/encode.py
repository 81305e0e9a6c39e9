"""`fewstep encode BUNDLE --prompt TEXT --output FILE`: texts as embeddings, for machines without the text encoder."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import BUNDLE_HELP, add_engine_options, emit, open_bundle, register_torch


def define(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help=BUNDLE_HELP)
    parser.add_argument("--prompt", required=True, action="append", help="a text; repeatable, one entry each")
    parser.add_argument("--negative", default="", help="negative prompt of all of them (default: the empty text)")
    parser.add_argument("--output", required=True, metavar="FILE", help="the .safetensors file to write")
    add_engine_options(parser)


def execute(options: argparse.Namespace) -> int:
    from ..engines import RunOptions, open_engines
    from ..errors import MissingError
    from ..runtime.prompts.encoders import TextEncoders
    from ..runtime.prompts.stored import save_embeddings

    register_torch(options.backend)
    bundle = open_bundle(options.bundle)
    names = list(bundle.text_encoders)
    if not names:
        raise MissingError(
            f"the bundle {bundle.name!r} has no text encoder",
            expected="one that was exported with it",
            remedy="Export the checkpoint again without --without.",
        )
    dims = {n: {"prompts": 2, "tokens": bundle.tokens} for n in names}
    run = RunOptions(threads=options.threads)
    text = TextEncoders(bundle, open_engines(bundle, names, backend=options.backend, dims=dims, run=run))
    *positives, negative = text.encode([*options.prompt, options.negative])
    zeros = bundle.force_zeros and not options.negative
    negatives = [(p.zeros() if zeros else negative) for p in positives]
    target = save_embeddings(options.output, bundle, positives, negatives, options.prompt)
    size = Path(target).stat().st_size
    data = {
        "file": str(target),
        "prompts": options.prompt,
        "bytes": size,
        "truncated": [p.truncated for p in positives],
    }
    emit(options, data, f"{target}  {len(positives)} prompts, {size / 1e6:.1f} MB")
    return 0
