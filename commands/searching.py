"""`fewstep schedule search BUNDLE` finds schedules for its model; `schedule check` says what they are worth."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError, MissingError
from .asking import lora_use
from .common import BUNDLE_HELP, add_engine_options, between, emit, numbers, open_bundle, register_torch, say, size

if TYPE_CHECKING:
    from ..bundle import Bundle
    from ..runtime import Pipeline
    from ..schedules import FoundSchedules

METHODS = ("auto", "klub", "trajectory", "endpoint", "rows")
WORK = ".work"
"""What a search's folder is named, after its output."""
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def duration(text: str) -> float:
    """`20m`, `90s`, `1.5h`, or a number of seconds."""
    number, unit = (text[:-1], text[-1]) if text[-1:] in UNITS else (text, "s")
    try:
        seconds = float(number) * UNITS[unit]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration, like 20m or 90s") from error
    if not 0.0 < seconds <= 1e7:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration, like 20m or 90s")
    return seconds


def counts(text: str) -> list[int]:
    """`5,8,10` as numbers of steps."""
    try:
        return [int(v) for v in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of steps, like 5,8,10") from error


def _define_both(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help=BUNDLE_HELP)
    parser.add_argument("--prompts", metavar="FILE", help="a prompt a line (default: general captions)")
    parser.add_argument("--negative", help="negative prompt")
    parser.add_argument("--teacher-steps", type=between(100, 1000), default=100, help="default: %(default)s")
    parser.add_argument(
        "--batch", type=between(1, 32), default=8, help="images in one evaluation (default: %(default)s)"
    )
    add_engine_options(parser)


def define_search(parser: argparse.ArgumentParser) -> None:
    _define_both(parser)
    parser.add_argument("--sampler", help="any name of `fewstep samplers` (default: the bundle's)")
    parser.add_argument("--steps", type=counts, metavar="N,N,...", help="default: 5,8,10,20; of students 1,2,4")
    parser.add_argument("--guidance", type=float, help="guidance scale it is found at (default: the bundle's)")
    parser.add_argument("--size", type=size, metavar="WxH", help="pixels it is found at (default: the bundle's)")
    parser.add_argument("--budget", type=duration, default=1200.0, metavar="TIME", help="20m, 90s, 2h (default: 20m)")
    parser.add_argument("--method", choices=METHODS, default="auto", help="default: all of them, and the best is taken")
    parser.add_argument(
        "--pairs",
        type=between(4, 4096),
        default=32,
        help="prompts with seeds to search on, and as many to choose by (default: %(default)s)",
    )
    parser.add_argument(
        "--held-out", type=between(8, 4096), default=256, help="and to be judged by (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first pair (default: %(default)s)")
    parser.add_argument(
        "--student",
        action=argparse.BooleanOptionalAction,
        help="whether the model was distilled to few "
        "steps, and is judged by its own eight (default: as its bundle says)",
    )
    parser.add_argument(
        "--pictures", metavar="FOLDER", help="pictures that klub's bound is estimated on, beside made ones"
    )
    parser.add_argument(
        "--output", default="searched.json", metavar="FILE", help="what is found (default: %(default)s)"
    )
    parser.add_argument("--plot", metavar="FILE", help="draw levels and errors beside known schedules")


def define_check(parser: argparse.ArgumentParser) -> None:
    _define_both(parser)
    parser.add_argument("file", metavar="FILE", help="found schedules")
    parser.add_argument("--guidance", type=numbers, metavar="G,G,...", help="default: what it was found at")
    parser.add_argument("--size", type=size, action="append", metavar="WxH", help="repeatable; likewise")
    parser.add_argument("--steps", type=counts, metavar="N,N,...", help="default: all that were searched")
    parser.add_argument(
        "--lora", dest="loras", type=lora_use, action="append", metavar="FILE[:SCALE]", help="repeatable"
    )
    parser.add_argument("--pairs", type=between(2, 4096), default=64, help="prompts with seeds (default: %(default)s)")
    parser.add_argument("--force-schedule", action="store_true", help="with another model than it was found for")


def search(options: argparse.Namespace) -> int:
    from ..search import search_schedules

    output = _output(options.output, ".json")
    if options.plot:
        _output(options.plot, "")
    bundle, pipeline = _opened(options, options.size)
    usual = (1, 2, 4) if bundle.defaults.steps <= 4 else (5, 8, 10, 20)
    work = output.with_name(output.name + WORK)
    if work.exists():
        say(f"continuing what {work} holds")
    found: FoundSchedules = search_schedules(
        pipeline,
        sampler=options.sampler,
        steps=options.steps or usual,
        prompts=_prompts(options),
        guidance=options.guidance,
        size=options.size,
        negative=options.negative,
        method=options.method,
        budget=options.budget,
        pairs=options.pairs,
        held_out=options.held_out,
        teacher_steps=options.teacher_steps,
        seed=options.seed,
        student=options.student,
        pictures=_latents(pipeline, options),
        work=work,
        progress=lambda stage, spent: say(f"[{100 * spent:3.0f}%] {stage}"),
    )
    found.save(output)
    forget(work)
    if options.plot:
        from ..search.plot import plot_found

        plot_found(found, options.plot, noise_config=bundle.noise_config)
    emit(options, {"output": str(output), "digest": found.digest, **found.to_json()}, _report(found, output))
    return 0


def check(options: argparse.Namespace) -> int:
    from ..schedules import load_schedules
    from ..search import check_schedules

    found = load_schedules(options.file, force=options.force_schedule)
    _, pipeline = _opened(options, options.size[0] if options.size else None)
    rows = check_schedules(
        pipeline,
        found,
        prompts=_prompts(options),
        guidances=options.guidance,
        sizes=options.size,
        steps=options.steps,
        negative=options.negative,
        loras=dict(options.loras) if options.loras else None,
        pairs=options.pairs,
        teacher_steps=options.teacher_steps,
        progress=lambda stage, _: say(stage),
    )
    from ..schedules.listing import format_table

    cells = [
        [f"{r['guidance']:g}", "x".join(map(str, r["size"])), str(r["steps"]), *_cells(r), r["best_known"]]
        for r in rows
    ]
    heading = ["guidance", "size", "steps", "found", "best known", "ratio", "wins", "which"]
    emit(options, {"schedule": found.digest, "rows": rows}, format_table(heading, cells))
    return 0


def _opened(options: argparse.Namespace, asked: tuple[int, int] | None) -> tuple[Bundle, Pipeline]:
    from ..runtime import load

    register_torch(options.backend)
    bundle = open_bundle(options.bundle)
    return bundle, load(bundle, backend=options.backend, threads=options.threads, size=asked, batch=options.batch)


def _output(name: str, suffix: str) -> Path:
    """Where a file can be written, asked before anything is computed."""
    path = Path(name)
    if path.is_dir() or not path.name or (suffix and path.suffix != suffix):
        raise ArgumentError(
            f"the output is {name!r}", expected=f"the name of a file{f' that ends in {suffix}' if suffix else ''}"
        )
    if not path.parent.is_dir():
        raise MissingError(f"no folder {str(path.parent)!r} to write into", remedy="Make it first.")
    return path


def _prompts(options: argparse.Namespace) -> list[str] | None:
    from ..search.sets import read_prompts

    return None if options.prompts is None else read_prompts(Path(options.prompts))


def _latents(pipeline: Pipeline, options: argparse.Namespace) -> list[Any]:
    """The latents of the pictures in a folder, at the size that is searched at."""
    if options.pictures is None:
        return []
    from ..search.pictures import encode_folder

    return encode_folder(pipeline, Path(options.pictures), options.size or pipeline.size)


def forget(work: Path) -> None:
    import shutil

    shutil.rmtree(work, ignore_errors=True)


def _report(found: FoundSchedules, output: Path) -> str:
    """What was found, a line a number of steps."""
    from ..schedules.listing import format_table

    reports, equal = found.made["found"], found.made["equal_error"]
    lines = []
    for n, r in reports.items():
        needs = equal.get(n, {})
        more = "" if not needs else f"{needs['table_needs']:.3g}" if needs["table_needs"] else f"> {needs['more_than']}"
        kept = r["method"] if r["beats_known"] else f"none: {r['best_known']} is kept"
        lines.append([n, kept, *_cells(r), r["best_known"], more])
    heading = ["steps", "method", "found", "best known", "ratio", "wins", "which", "best table needs"]
    teacher, pairs = found.made["teacher"], found.made["pairs"]["held_out"]
    words = [
        format_table(heading, lines),
        f"distances to {teacher['steps']} steps of {teacher['sampler']}, whose own to twice as many is "
        f"{teacher['noise_floor']:.2g}; {pairs} held-out pairs, 95% intervals over them",
    ]
    if null := found.made.get("null"):
        words.append(
            f"rows fitted to shuffled targets at {null['steps']} steps: {null['shuffled']:.3g}, to the right ones "
            f"{null['fitted']:.3g}"
        )
    if found.made["cut"]:
        words.append("the budget cut the descent short; a larger one (--budget) finds more")
    return "\n".join([*words, f"{output}: {found.sampler}, digest {found.digest[:12]}"])


def _cells(row: dict[str, Any]) -> list[str]:
    """The found distance, the best known one, their ratio with its interval, and the share of pairs won."""
    best = row["known"][row["best_known"]]
    spread = f"{row['ratio']['mean']:.3f} [{row['ratio']['low']:.3f}, {row['ratio']['high']:.3f}]"
    return [f"{row['latent_rmse']['mean']:.4f}", f"{best['mean']:.4f}", spread, f"{100 * row['wins']:.0f}%"]
