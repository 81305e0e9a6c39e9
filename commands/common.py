"""What several verbs share: argument types, progress on stderr, data on stdout."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..values import printable, printable_json

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


def open_bundle(name: str, budget: str | None = None) -> Bundle:
    """The bundle in a folder; `student` and `base` are the embedded models where no folder of that name lies here.

    budget: take the lowered components that it holds within one.
    """
    if name in EMBEDDED and not Path(name).exists():
        from ..export.embedded import embedded_bundle

        bundle = embedded_bundle(name)[0]
    else:
        from ..bundle import read_bundle

        bundle = read_bundle(name)
    return bundle if budget is None else bundle.within(budget)


def size(text: str) -> tuple[int, int]:
    """`512x768` as (width, height)."""
    width, x, height = text.lower().partition("x")
    if not (x and width.isdigit() and height.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, like 512x512")
    return int(width), int(height)


def schedule(text: str) -> str | Path:
    """A schedule's name, or the path of a file of found ones, which ends in .json."""
    return Path(text) if text.lower().endswith(".json") else text


def opened_schedule(named: str | Path | None, *, force: bool) -> Any:
    """The name of a schedule, or what is in its file. force: use that with whatever model and sampler."""
    if not isinstance(named, Path):
        return named
    from ..schedules import load_schedules

    return load_schedules(named, force=force)


def add_force_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--force-schedule",
        action="store_true",
        help="use the schedules of a file with another model or sampler than they were found for",
    )


def numbers(text: str) -> list[float]:
    """`999,749` as a list of numbers."""
    try:
        return [float(v) for v in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers, like 999,749,499") from error


def guidance(text: str) -> float | list[float]:
    """`7.5` as a number, `1,1.5,2` as one for each frame of a clip."""
    try:
        found = numbers(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, nor one a frame, like 1,1.5,2") from error
    return found[0] if len(found) == 1 else found


def between(low: int, high: int) -> Callable[[str], int]:
    """An argument type: an integer from `low` to `high`."""

    def parse(text: str) -> int:
        if not text.isdigit() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer from {low} to {high}")
        return int(text)

    return parse


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what runs it")
    group.add_argument(
        "--backend", choices=BACKENDS, default="auto", help="what runs the graphs (default: %(default)s)"
    )
    group.add_argument("--threads", type=between(0, 4096), default=0, help="CPU threads (default: one a core)")


def add_budget_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--budget",
        metavar="PSNR",
        help='take layers in fewer bits that `fewstep quantize` found within this, as "psnr>=30"; never without it',
    )


def add_image_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the picture, and how it is sampled")
    group.add_argument("--negative", help="negative prompt")
    group.add_argument("--steps", type=int, help="default: the bundle's")
    group.add_argument("--sampler", help="any name of `fewstep samplers` (default: the bundle's)")
    group.add_argument(
        "--schedule",
        type=schedule,
        metavar="NAME|FILE",
        help="any schedule of `fewstep samplers`, searched: the bundle's own, or a .json file of found ones "
        "(default: the sampler's)",
    )
    group.add_argument("--schedule-digest", metavar="HEX", help="how the digest of found schedules must begin")
    add_force_option(group)
    group.add_argument(
        "--guidance",
        type=guidance,
        metavar="G",
        help="1 or less: no negative prompt; of a clip also one a frame, as G,G,... (default: the bundle's)",
    )
    group.add_argument("--size", type=size, metavar="WxH", help="pixels (default: the picture's, or the bundle's)")
    group.add_argument(
        "--compat", choices=("diffusers",), help="follow that library's sampler conventions, quirks included"
    )
    group.add_argument("--timesteps", type=numbers, metavar="T,T,...", help="explicit timesteps instead of a schedule")
    group.add_argument("--sigmas", type=numbers, metavar="S,S,...", help="explicit sigmas, the last one where it ends")


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
def log_shown(shown: bool) -> Iterator[None]:
    """Have everything that the library logs on stderr, a line each, if it is to be shown."""
    import logging

    handler, logger = logging.StreamHandler(sys.stderr), logging.getLogger("fewstep")
    before = logger.level
    if shown:
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


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
