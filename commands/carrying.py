"""What pictures carry from one command to the next: calls that are read from them, names without folders, passes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError
from .common import say, size

if TYPE_CHECKING:
    from ..runtime.second_pass import SecondPass


def add_second_pass_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("a second pass at a higher resolution")
    group.add_argument(
        "--hires", type=enlargement, metavar="2x|WxH", help="make the picture larger and denoise it anew by a strength"
    )
    group.add_argument("--hires-strength", type=float, metavar="N", help="how much anew, 0 to 1 (default: 0.5)")
    group.add_argument("--hires-steps", type=int, metavar="N", help="steps of its schedule (default: the first's)")
    group.add_argument(
        "--hires-upscaler", metavar="NAME", help="lanczos, nearest, latent or latent-nearest (default: lanczos)"
    )


def enlargement(text: str) -> float | tuple[int, int]:
    """`2x` as a factor, `1024x768` as (width, height)."""
    factor = text.lower().removesuffix("x")
    try:
        return float(factor) if factor != text.lower() else size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a factor like 2x nor WIDTHxHEIGHT") from error


def second_pass(options: argparse.Namespace) -> SecondPass | None:
    """The second pass that is asked for, if one is."""
    from ..runtime.second_pass import SecondPass

    given = {k: v for k in ("strength", "steps", "upscaler") if (v := getattr(options, f"hires_{k}")) is not None}
    if options.hires is None:
        if given:
            raise ArgumentError(f"{next(iter(given))} of a second pass without one", remedy="Add --hires 2x.")
        return None
    if options.then:
        raise ArgumentError("--hires beside --then", expected="one of the two")
    whole = {"size": options.hires} if isinstance(options.hires, tuple) else {"scale": options.hires}
    return SecondPass(**whole, **given)


def take_from_picture(options: argparse.Namespace, define: Callable[[argparse.ArgumentParser], None]) -> None:
    """Fill what a command line left out with the call in the picture that it names, and say what cannot be carried."""
    from ..runtime.pictures.parameters import command_words, read_call

    carried = read_call(options.from_picture)
    if carried.parameters.get("grid"):
        raise ArgumentError(
            f"{Path(options.from_picture).name} is a sheet of pictures", expected="one picture", remedy="Use: inspect."
        )
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    define(parser)
    taken = parser.parse_args(command_words(carried.parameters, "image.png")[2:])
    for name, value in vars(taken).items():
        if name not in ("bundle", "output") and getattr(options, name) == parser.get_default(name):
            setattr(options, name, value)
    say_left(carried.left)


def say_left(left: tuple[str, ...]) -> None:
    """Name what of another program's picture is not carried over."""
    for entry in left:
        say(f"not carried over: {entry}")


def plain_name(path: str) -> str:
    """A bundle, or what a stage begins with, by its name alone: pictures are shown to strangers."""
    return Path(path).name or Path(path).resolve().name


def bundle_nearby(p: Mapping[str, Any]) -> str | None:
    """The path of the picture's bundle, if it lies here, or in a folder here, with the weights that made it."""
    from ..bundle import read_bundle
    from ..errors import FewstepError

    name, sha256 = str(p["bundle"]), p.get("unet_sha256")
    if name != Path(name).name or name in ("", ".", ".."):
        return None
    for place in (Path(name), *sorted(folder / name for folder in Path().iterdir() if folder.is_dir())):
        try:
            if read_bundle(place).components["unet"].weights_sha256 == sha256:
                return str(place)
        except (FewstepError, OSError):
            continue
    return None
