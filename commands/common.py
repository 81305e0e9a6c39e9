"""What several verbs share: argument types, progress on stderr, data on stdout."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..values import printable, printable_json
from .sampling import add_sampler_options

if TYPE_CHECKING:
    from ..bundle import Bundle, Defaults


class _BackendNames:
    """The backends that may be named, looked up when a command line names one or asks for help."""

    def __iter__(self) -> Iterator[str]:
        from ..engines import backend_names

        return iter(("auto", *backend_names()))

    def __contains__(self, name: object) -> bool:
        return name in tuple(self)


BACKENDS = _BackendNames()
EMBEDDED = ("student", "base")
BUNDLE_HELP = "a bundle folder, or student or base: the embedded models"


def open_bundle(name: str) -> Bundle:
    """The bundle in a folder; `student` and `base` are the embedded models where no folder of that name lies here."""
    if name in EMBEDDED and not Path(name).exists():
        from ..export.embedded import embedded_bundle

        return embedded_bundle(name)[0]
    from ..bundle import read_bundle

    return read_bundle(name)


def size(text: str) -> tuple[int, int]:
    """`512x768` as (width, height)."""
    width, x, height = text.lower().partition("x")
    if not (x and width.isdigit() and height.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, like 512x512")
    return int(width), int(height)


def numbers(text: str) -> list[float]:
    """`999,749` as a list of numbers."""
    try:
        return [float(v) for v in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers, like 999,749,499") from error


def between(low: int, high: int) -> Callable[[str], int]:
    """An argument type: an integer from `low` to `high`."""

    def parse(text: str) -> int:
        if not text.isdigit() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer from {low} to {high}")
        return int(text)

    return parse


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend", choices=BACKENDS, default="auto", help="what runs the graphs (default: %(default)s)"
    )
    parser.add_argument("--threads", type=between(0, 4096), default=0, help="CPU threads (default: one a core)")


def add_image_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--negative", help="negative prompt")
    parser.add_argument("--steps", type=int, help="default: the bundle's")
    parser.add_argument("--sampler", help="any name of `fewstep samplers` (default: the bundle's)")
    parser.add_argument("--schedule", help="any schedule of `fewstep samplers` (default: the sampler's)")
    parser.add_argument(
        "--guidance", type=float, help="guidance scale; 1 or less: no negative prompt (default: the bundle's)"
    )
    parser.add_argument("--size", type=size, metavar="WxH", help="pixels (default: the picture's, or the bundle's)")
    parser.add_argument(
        "--compat", choices=("diffusers",), help="follow that library's sampler conventions, quirks included"
    )
    parser.add_argument("--timesteps", type=numbers, metavar="T,T,...", help="explicit timesteps instead of a schedule")
    parser.add_argument("--sigmas", type=numbers, metavar="S,S,...", help="explicit sigmas, the last one where it ends")
    add_sampler_options(parser)


def defaults_line(defaults: Defaults) -> str:
    """What a request without options gets, in words."""
    sampler = f"{defaults.sampler or 'the scheduler of the checkpoint'}"
    schedule = f" under {defaults.schedule}" if defaults.schedule else ""
    steps = f"{defaults.steps} step{'' if defaults.steps == 1 else 's'}"
    return f"{sampler}{schedule}, {steps}, guidance {defaults.guidance:g}, {defaults.width}x{defaults.height}"


def register_torch(backend: str) -> None:
    """Have the export room offer its backend in memory, where that is the one asked for."""
    from ..engines.backends.registry import makes_in_memory

    if makes_in_memory(backend):
        from .. import export  # noqa: F401


def emit(options: argparse.Namespace, data: dict[str, Any], text: str) -> None:
    """Print data as JSON, or as text, on stdout; what others wrote moves no cursor, and needs no encoding."""
    encoding = sys.stdout.encoding
    print(printable_json(data, encoding) if options.json else printable(text, encoding))


def say(message: str) -> None:
    """A remark for people, on stderr."""
    print(printable(message, sys.stderr.encoding), file=sys.stderr, flush=True)


@contextmanager
def bar(total: int | None, unit: str, description: str = "") -> Iterator[Any]:
    """A progress bar on stderr; silent when that is not a terminal."""
    from tqdm import tqdm

    scale = unit == "B"
    with tqdm(
        total=total,
        unit=unit,
        unit_scale=scale,
        desc=description,
        disable=not sys.stderr.isatty(),
        leave=False,
        file=sys.stderr,
    ) as drawn:
        yield drawn


def stage_lines(timings: dict[str, Any]) -> str:
    """Timings as one line: milliseconds by stage."""
    evaluations = timings["evaluations"]
    each = f" ({len(evaluations)} x {sum(evaluations) / len(evaluations):.1f})" if evaluations else ""
    parts = [f"text {timings['text']:.1f}"]
    if timings["encode_image"] >= 0.05:
        parts.append(f"encode image {timings['encode_image']:.1f}")
    parts += [
        f"denoise {timings['denoise']:.1f}{each}",
        f"decode {timings['decode']:.1f}",
        f"total {timings['total']:.1f}",
    ]
    return ", ".join(parts) + " ms"
