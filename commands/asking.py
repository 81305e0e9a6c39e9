"""The options of verbs that make pictures: how prompts are read, what a picture starts from, what memory is spared."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError
from ..families.decoders import DECODERS
from .common import add_budget_option, add_engine_options, between, opened_schedule, say, size
from .sampling import sampler_options

if TYPE_CHECKING:
    from ..bundle import Bundle

SIZES = ("original_size", "target_size", "negative_original_size", "negative_target_size")
CROPS = ("crop_top_left", "negative_crop_top_left")
MANY = ("prompt", "seed", "image", "mask", "ip_adapter_image")
"""Options that may be given more than once."""
SPARING = {"auto": "auto", "on": True, "off": False}


def pair(text: str) -> tuple[int, int]:
    """`16,0` as (top, left)."""
    first, comma, second = text.partition(",")
    try:
        return (int(first), int(second)) if comma else (int(""), 0)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not TOP,LEFT, like 16,0") from error


def lora_use(text: str) -> tuple[str, float | dict[str, float]]:
    """As `lora`; by component too: `style.safetensors:unet=0.8,text_encoder=0.5`."""
    file, colon, scales = text.rpartition(":")
    pairs = [s.partition("=") for s in scales.split(",")]
    try:
        return (file, {n: float(s) for n, _, s in pairs}) if colon and all(e for _, e, _ in pairs) else lora(text)
    except ValueError:
        return text, 1.0


def lora(text: str) -> tuple[str, float]:
    """`style.safetensors:0.8` as (file, factor); what follows the last colon is a factor if it is a number."""
    file, colon, scale = text.rpartition(":")
    try:
        return (file, float(scale)) if colon else (text, 1.0)
    except ValueError:
        return text, 1.0


def embedding(text: str) -> tuple[str | None, str]:
    """`<toy>=toy.safetensors` as (name, file); without a name the file has its own."""
    name, equals, file = text.rpartition("=")
    return (name, file) if equals else (None, text)


def threshold(text: str) -> float | str:
    """A number, or `none`."""
    try:
        return "none" if text.lower() == "none" else float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor none") from error


def whole_or_none(text: str) -> int | None:
    """A whole number, or `none` for the model's own."""
    try:
        return None if text.lower() == "none" else int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor none") from error


def control(text: str) -> tuple[str, str, float | None]:
    """`canny=edges.png:0.8` as (name, picture, factor); what follows the last colon is a factor if it is a number."""
    name, equals, rest = text.partition("=")
    if not equals or not name or not rest:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PICTURE, or NAME=PICTURE:SCALE")
    picture, colon, scale = rest.rpartition(":")
    try:
        return (name, picture, float(scale)) if colon and picture else (name, rest, None)
    except ValueError:
        return name, rest, None


def canny(text: str) -> tuple[str, tuple[float, float]]:
    """`canny`, or `canny:100:200`, as (name, thresholds)."""
    from ..runtime.pictures.edges import HIGH, LOW

    name, *thresholds = text.split(":")
    try:
        low, high = [float(t) for t in thresholds] if thresholds else (LOW, HIGH)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME, or NAME:LOW:HIGH") from error
    return name, (low, high)


def share(text: str) -> tuple[str | None, float]:
    """`0.3`, or `canny=0.3`, as (name, share)."""
    name, equals, number = text.rpartition("=")
    try:
        return (name, float(number)) if equals else (None, float(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share of the steps, like 0.3, or NAME=0.3") from error


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how prompts are read")
    group.add_argument("--prompt-2", help="what a second text encoder reads instead")
    group.add_argument("--negative-2", help="negative prompt for a second text encoder")
    group.add_argument(
        "--prompt-syntax",
        choices=("plain", "a1111"),
        help="a1111: (word:1.3), [word], [from:to:0.5], [one|other], BREAK and <lora:name:0.8> (default: plain)",
    )
    group.add_argument(
        "--long-prompts",
        choices=("truncate", "chunk"),
        help="what one pass does not take: cut, as diffusers does, or in chunks (default: cut; a1111: in chunks)",
    )
    group.add_argument(
        "--lora",
        dest="loras",
        type=lora_use,
        action="append",
        metavar="FILE[:SCALE]",
        help="change the weights by a LoRA, for this picture alone; repeatable (default scale: 1)",
    )
    group.add_argument("--clip-skip", type=between(0, 64), metavar="N", help="leave out the last N text layers")
    for name in (*SIZES, *CROPS):
        kind, shown = (size, "WxH") if name in SIZES else (pair, "T,L")
        words = f"the {name.replace('_', ' ')}, for a UNet that is told of sizes"
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=shown, help=words)


def add_picture_options(parser: argparse.ArgumentParser, *, many: bool) -> None:
    group = parser.add_argument_group("pictures to start from, and controls")
    again: dict[str, Any] = {"action": "append"} if many else {}
    group.add_argument(
        "--image", **again, help="start from this picture" + ("; repeatable, one an image" if many else "")
    )
    group.add_argument("--mask", **again, help="a picture of the same: white is made anew, black stays")
    group.add_argument(
        "--mask-threshold",
        type=threshold,
        metavar="N",
        help="grey from which on a mask is white, or none (default: 0.5)",
    )
    group.add_argument(
        "--strength", type=float, help="how much of --image to change, 0 to 1 (default: 0.8, with a mask 1)"
    )
    group.add_argument(
        "--noise-level", type=whole_or_none, metavar="N", help="noise in a picture that is made larger, 0 to 999"
    )
    group.add_argument(
        "--fit",
        choices=("stretch", "cover", "contain", "diffusers"),
        help="what becomes of a picture where --size is another; diffusers does what stretch does (default: stretch)",
    )
    group.add_argument(
        "--control",
        type=control,
        action="append",
        default=[],
        metavar="NAME=PICTURE[:SCALE]",
        help="a picture for a ControlNet of the bundle, by its name, with a factor (default: 1); repeatable, and "
        "of one name for one an image",
    )
    for end, usual in (("start", 0), ("end", 1)):
        group.add_argument(
            f"--control-guidance-{end}",
            type=share,
            action="append",
            metavar="[NAME=]SHARE",
            help=f"the share of the steps at which control {end}s (default: {usual}); repeatable, by name",
        )
    group.add_argument(
        "--canny",
        type=canny,
        action="append",
        metavar="NAME[:LOW:HIGH]",
        help="the picture of this control is a photograph: take its edges (default: 100 and 200); repeatable",
    )
    group.add_argument("--guess-mode", action="store_true", help="control the prompt's row alone, as diffusers does")
    group.add_argument("--ip-adapter-image", **again, help="a picture as prompt, for the IP-Adapter of the bundle")
    group.add_argument("--ip-adapter-scale", type=float, metavar="N", help="how much of it is taken (default: 1)")
    group.add_argument("--variation-seed", type=int, metavar="N", help="turn the seed's noise towards this one's")
    group.add_argument("--variation", type=float, metavar="N", help="how far, 0 to 1 (default: 0)")
    group.add_argument(
        "--decoder", choices=tuple(DECODERS), help="tiny: the tiny autoencoder's, if the bundle has one (default: full)"
    )
    group.add_argument(
        "--seed-device", metavar="cpu|cuda", help="whose noise: torch's on the CPU or on CUDA (default: cpu)"
    )


def add_clip_options(parser: argparse.ArgumentParser) -> None:
    """Of models that make clips, which begin with `--image`."""
    group = parser.add_argument_group("clips")
    group.add_argument("--frames", type=int, metavar="N", help="of a clip: how many frames (default: the model's)")
    group.add_argument("--fps", type=int, metavar="N", help="of a clip: frames per second (default: 7)")
    group.add_argument("--motion-bucket", type=int, metavar="N", help="of a clip: how much moves (default: 127)")
    group.add_argument(
        "--noise-augmentation", type=float, metavar="N", help="of a clip: noise over its picture (default: 0.02)"
    )
    group.add_argument(
        "--min-guidance",
        type=float,
        metavar="N",
        help="of a clip: the first frame's guidance, which rises to --guidance at the last (default: 1)",
    )
    group.add_argument(
        "--decode-chunk", type=int, metavar="N", help="of a clip: frames that are decoded together (default: all)"
    )


def add_adapter_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("adapters")
    group.add_argument(
        "--embedding",
        type=embedding,
        action="append",
        metavar="[NAME=]FILE",
        help="teach the text encoders a word (textual inversion); repeatable",
    )
    group.add_argument("--lora-folder", metavar="DIR", help="where LoRAs are found by name")


def add_load_options(parser: argparse.ArgumentParser) -> None:
    add_adapter_options(parser)
    add_engine_options(parser)
    group = parser.add_argument_group("memory and precision")
    add_budget_option(group)
    group.add_argument("--vae-tiling", choices=SPARING, default="auto", help="large pictures in tiles (default: auto)")
    group.add_argument("--vae-slicing", choices=SPARING, default="auto", help="one picture at a time (default: auto)")
    group.add_argument(
        "--drop-text-encoders", action="store_true", help="let go of the text encoders once prompts are encoded"
    )


def load_options(options: argparse.Namespace, bundle: Bundle) -> dict[str, Any]:
    """What `fewstep.load` is told; without a size that of the picture, for engines that are built for one."""
    return {
        "backend": options.backend,
        "threads": options.threads,
        "size": options.size or _own_size(options, bundle),
        "vae_tiling": SPARING[options.vae_tiling],
        "vae_slicing": SPARING[options.vae_slicing],
        "keep_text_encoders": not options.drop_text_encoders,
        "lora_folder": options.lora_folder,
        "embeddings": options.embedding or (),
    }


def _own_size(options: argparse.Namespace, bundle: Bundle) -> tuple[int, int] | None:
    """The size that the first picture's own makes, said; `None` without a picture."""
    from ..runtime.pictures.reading import open_image
    from ..runtime.pictures.resize import size_of

    if bundle.model.clips:
        return None  # a clip has the model's own size
    images = options.image if isinstance(options.image, list) else [options.image] if options.image else []
    shown = [*images, *(picture for _, picture, _ in getattr(options, "control", []))]
    if not shown:
        return None
    picture = open_image(shown[0])
    width, height = size_of(bundle, picture)
    say(f"size {width}x{height}: that of the picture, {picture.width}x{picture.height}, as --size is not given")
    return width, height


def call_options(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of a call, and of its sampler, that were given; of lists with one entry, the entry."""
    from ..runtime.call import NAMES

    given = {k: v for k in NAMES if (v := getattr(options, k, None)) is not None}
    given = {k: v[0] if isinstance(v, list) and len(v) == 1 and k in MANY else v for k, v in given.items()}
    if "loras" in given:
        given["loras"] = dict(given["loras"])
    given = {k: v for k, v in given.items() if "control" not in k and k != "canny"} | _controls(options)
    if options.force_schedule and not isinstance(options.schedule, Path):
        raise ArgumentError("--force-schedule without a file of found schedules", expected="--schedule FILE.json")
    if "schedule" in given:
        given["schedule"] = opened_schedule(given["schedule"], force=options.force_schedule)
    given["options"] = sampler_options(options)
    return given | ({"mask_threshold": None} if given.get("mask_threshold") == "none" else {})


def _controls(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of a call that are about its controls."""
    pictures: dict[str, list[str]] = {}
    scales: dict[str, float] = {}
    for name, picture, scale in getattr(options, "control", []):
        pictures.setdefault(name, []).append(picture)
        scales |= {} if scale is None else {name: scale}
    given: dict[str, Any] = {}
    if pictures:
        given["control"] = {n: p[0] if len(p) == 1 else p for n, p in pictures.items()}
    if scales:
        given["controlnet_conditioning_scale"] = scales
    for argument in ("control_guidance_start", "control_guidance_end"):
        shares = getattr(options, argument, None)
        if shares:
            whole = [s for name, s in shares if name is None]
            given[argument] = whole[-1] if whole else dict(shares)
    if getattr(options, "canny", None):
        given["canny"] = dict(options.canny)
    return given


class _Said(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(f"{record.levelname.lower()}: {record.getMessage()}")


@contextmanager
def warnings_shown() -> Iterator[None]:
    """Show the library's warnings on stderr, a line each."""
    handler, logger = _Said(logging.WARNING), logging.getLogger("fewstep")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
