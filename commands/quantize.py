"""`fewstep quantize BUNDLE --budget "psnr>=30"`: put layers into integers, as many as pictures take."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bundle import LOWERED
from ..errors import ArgumentError
from ..values import read_json
from .common import BUNDLE_HELP, between, emit, open_bundle, say, size

if TYPE_CHECKING:
    from ..bundle import Bundle

WORK = ".quantize"
"""What a search's folder is named, after its bundle."""


def define(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help=BUNDLE_HELP)
    parser.add_argument(
        "--precision",
        choices=LOWERED,
        default="int8",
        help="int8, and fp8 for GPUs: weights and activations, for speed; the others for memory (default: %(default)s)",
    )
    parser.add_argument(
        "--budget",
        default="psnr>=30",
        help="how near held-out pictures must stay to those of the plain engines, in dB (default: %(default)s)",
    )
    parser.add_argument(
        "--component",
        action="append",
        metavar="NAME",
        help="only this component; repeatable (default: unet and vae_decoder, and for memory the text encoders)",
    )
    parser.add_argument("--prompts", metavar="FILE", help="a prompt a line (default: general captions)")
    parser.add_argument(
        "--pairs", type=between(1, 1024), default=4, help="pictures to try each layer on (default: %(default)s)"
    )
    parser.add_argument("--choose", type=between(1, 1024), default=16, help="to choose by (default: %(default)s)")
    parser.add_argument("--held-out", type=between(2, 4096), default=32, help="to be judged by (default: %(default)s)")
    parser.add_argument("--seed", type=between(0, 2**31), default=0, help="of the first picture (default: %(default)s)")
    parser.add_argument("--size", type=size, metavar="WxH", help="pixels of the pictures (default: the bundle's)")
    parser.add_argument("--steps", type=between(1, 1000), help="of the pictures (default: the bundle's)")
    parser.add_argument("--sampler", help="any name of `fewstep samplers` (default: the bundle's)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the bundle's)")
    parser.add_argument(
        "--by",
        choices=("layer", "block", "component"),
        help="what is tried alone (default: layers, or blocks where there are many)",
    )
    parser.add_argument("--threads", type=between(0, 4096), default=0, help="CPU threads (default: one a core)")


def execute(options: argparse.Namespace) -> int:
    from ..quantize import quantize_bundle
    from ..search.sets import read_prompts
    from .searching import forget

    bundle = open_bundle(options.bundle)
    asked = {"steps": options.steps, "sampler": options.sampler, "guidance": options.guidance}
    work = bundle.folder.with_name(bundle.folder.name + WORK)
    if work.exists():
        say(f"continuing what {work} holds")
    changed = quantize_bundle(
        bundle,
        precision=options.precision,
        budget=options.budget,
        components=options.component,
        prompts=None if options.prompts is None else read_prompts(Path(options.prompts)),
        pairs=options.pairs,
        choose=options.choose,
        held_out=options.held_out,
        seed=options.seed,
        size=options.size,
        calls={k: v for k, v in asked.items() if v is not None},
        by=options.by,
        threads=options.threads,
        work=work,
        progress=lambda stage, share: say(f"[{100 * share:3.0f}%] {stage}"),
    )
    forget(work)
    stored = changed.precisions[-1]
    table = read_table(changed.folder / stored.file)
    emit(options, {"bundle": str(changed.folder), "psnr": stored.psnr, **table}, report(options.bundle, changed, table))
    return 0


def read_table(path: Path) -> dict[str, Any]:
    """The table of lowered layers that a bundle holds."""
    data = read_json(path, path.name, remedy="Quantize the bundle again.")
    if not isinstance(data, dict):
        raise ArgumentError(f"{path.name} is no table of layers", remedy="Quantize the bundle again.")
    return data


def report(name: str, bundle: Bundle, table: dict[str, Any]) -> str:
    """What was found last, in lines: the layers by component, bytes and times, and what pictures reached."""
    lines, stored = [], bundle.precisions[-1]
    for component, times in table["evaluations"].items():
        groups = [g for g in table["groups"] if g["component"] == component]
        what = "multiplications" if "multiplications" in groups[0] else "bytes_saved"
        low = [g for g in groups if g["lowered"]]
        share = sum(g[what] for g in low) / sum(g[what] for g in groups)
        plain, own = (_megabytes(bundle, c[component].weights) for c in (bundle.components, stored.components))
        lines.append(
            f"{component:14} {len(low)} of {len(groups)} groups lowered, {100 * share:.0f}% of the "
            f"{what.replace('_', ' ')}; {plain:.1f} to {own:.1f} MB of weights; {times['plain_ms']:.1f} to "
            f"{times['ms']:.1f} ms ({times['ratio']:.2f}x) on ort-cpu"
        )
    reached = table["reached"]
    lines.append(
        f"{stored.budget}: {reached['psnr']:.1f} dB over {reached['pictures']} held-out pictures, the worst "
        f"{reached['worst']:.1f}"
    )
    asked = stored.budget if len(bundle.precisions) == 1 else f"{stored.precision} {stored.budget}"
    return "\n".join([*lines, f'Use it with: fewstep run {name} --budget "{asked}" --prompt ...'])


def _megabytes(bundle: Bundle, file: str) -> float:
    return bundle.path(file).stat().st_size / 1e6
