"""`fewstep run BUNDLE --prompt ...`, or for clips `--image ...`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from .asking import (
    add_clip_options,
    add_load_options,
    add_picture_options,
    add_prompt_options,
    call_options,
    load_options,
    warnings_shown,
)
from .carrying import add_second_pass_options, plain_name, second_pass, take_from_picture
from .common import (
    BUNDLE_HELP,
    add_image_options,
    bar,
    defaults_line,
    emit,
    open_bundle,
    register_torch,
    say,
    size,
    stage_lines,
)
from .sampling import add_sampler_options, option

if TYPE_CHECKING:
    from ..bundle import Bundle


def define(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help=BUNDLE_HELP)
    parser.add_argument(
        "--prompt", action="append", help="what the image shows; repeatable, one image each (clips: none)"
    )
    parser.add_argument(
        "--from",
        dest="from_picture",
        metavar="PICTURE",
        help="make the picture that this one says, fewstep's or A1111's; what is given beside it counts instead",
    )
    parser.add_argument(
        "--prompt-embeds", dest="embeds_file", metavar="FILE", help="prompts that `fewstep encode` encoded, instead"
    )
    parser.add_argument(
        "--then",
        type=later_stage,
        action="append",
        default=[],
        metavar="BUNDLE[,NAME=VALUE...]",
        help="make the picture larger by this bundle, with its own steps, guidance, sampler, schedule, size, "
        "noise_level and options; repeatable, one stage after another",
    )
    parser.add_argument(
        "--seed", type=int, action="append", help="repeatable, one image each (default: a random one, printed)"
    )
    parser.add_argument("--images", type=int, dest="images_per_prompt", help="images a prompt, with successive seeds")
    parser.add_argument(
        "--shared-stream",
        action="store_true",
        help="draw the whole batch from the first seed, as one torch generator does",
    )
    parser.add_argument(
        "--output",
        help="the .png, .jpg, .webp or .avif to write (default: image.png, replaced if it is there); of a clip an "
        ".mp4, .webp or .gif, or a "
        "folder (default: clip.mp4)",
    )
    add_image_options(parser)
    add_prompt_options(parser)
    add_picture_options(parser, many=True)
    add_second_pass_options(parser)
    add_clip_options(parser)
    add_load_options(parser)
    add_sampler_options(parser)


def later_stage(text: str) -> tuple[str, dict[str, Any]]:
    """`if-ii,steps=50,size=256x256` as (bundle, arguments)."""
    bundle, *words = text.split(",")
    given = dict(option(w) for w in words)
    if not bundle:
        raise argparse.ArgumentTypeError(f"{text!r} is not BUNDLE, or BUNDLE,NAME=VALUE")
    if "size" in given:
        given["size"] = size(str(given["size"]))
    return bundle, given


def _named_stages(options: argparse.Namespace, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The later stages of a picture by the names that the command line gave them."""
    words = [w.partition(",") for w in parameters.get("then", ())]
    then = [f"{plain_name(name)}{comma}{rest}" for (name, _), (_, comma, rest) in zip(options.then, words, strict=True)]
    return {"then": then} if then else {}


def _pipeline(options: argparse.Namespace, bundle: Bundle) -> Any:
    """What is called, and told of the later stages' arguments where there are any."""
    from ..runtime import load
    from ..runtime.cascade import Cascade
    from ..runtime.second_pass import in_two_passes

    first = load(bundle, **load_options(options, bundle))
    second = second_pass(options)
    if second is not None:
        return partial(in_two_passes, first, second=second)
    if not options.then:
        return first
    shared = {"backend": options.backend, "threads": options.threads, "keep_text_encoders": False}
    stages = [load(open_bundle(name), **shared, size=given.get("size")) for name, given in options.then]
    return partial(Cascade([first, *stages]), later=[given for _, given in options.then])


def execute(options: argparse.Namespace) -> int:
    from ..runtime.pictures.images import check_output
    from ..runtime.pictures.video import check_clip_output
    from ..runtime.prompts.stored import read_embeddings

    if options.from_picture is not None:
        take_from_picture(options, define)
    bundle = open_bundle(options.bundle, options.budget)
    output = options.output if options.output is not None else "clip.mp4" if bundle.model.clips else "image.png"
    (check_clip_output if bundle.model.clips else check_output)(output)
    embeddings = {} if options.embeds_file is None else read_embeddings(options.embeds_file)
    register_torch(options.backend)
    if bundle.defaults.preset:
        say(f"preset {bundle.defaults.preset}: {defaults_line(bundle.defaults)}")
    pipe = _pipeline(options, bundle)
    with warnings_shown(), bar(None, "it", "denoise") as progress:

        def on_step(step: Any) -> None:
            progress.total = step.total
            progress.update(1)

        result = pipe(on_step=on_step, **call_options(options), **embeddings)
    named = tuple({**p, "bundle": plain_name(options.bundle), **_named_stages(options, p)} for p in result.parameters)
    files = replace(result, parameters=named).save(output)
    data = {
        "files": files,
        "seeds": list(result.seeds),
        "truncated": list(result.truncated),
        "timings_ms": dict(result.timings),
        "parameters": [dict(p) for p in named],
    }
    lines = [f"{f}  seed {s}" for f, s in zip(files, result.seeds, strict=True)]
    emit(options, data, "\n".join([*lines, stage_lines(dict(result.timings))]))
    return 0
