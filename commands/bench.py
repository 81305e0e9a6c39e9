"""`fewstep bench BUNDLE`: fewstep beside its peers, in one run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError, MissingError, UnknownNameError
from .common import BACKENDS, BUNDLE_HELP, EMBEDDED, between, emit, open_bundle, say, size

if TYPE_CHECKING:
    from ..bundle import Bundle

PEERS = ("diffusers", "compile", "optimum", "openvino", "nncf", "optimum-intel")
PROMPT = "a red circle on a blue background"


def define(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help=BUNDLE_HELP)
    parser.add_argument("--against", default="", metavar="NAMES", help=f"peers, of {','.join(PEERS)} (default: none)")
    parser.add_argument("--checkpoint", help="the diffusers folder that the bundle was made from, for the peers")
    parser.add_argument("--steps", default=None, metavar="N[,N]", help="evaluations (default: the bundle's)")
    parser.add_argument("--size", type=size, metavar="WxH")
    parser.add_argument("--batch", type=between(1, 64), default=1)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--repeat", type=between(1, 10_000), default=20, help="rounds (default: %(default)s)")
    parser.add_argument("--warm-up", type=between(0, 100), default=2, help="requests before the first round")
    parser.add_argument(
        "--lead-in",
        type=between(0, 100),
        default=1,
        help="requests that begin each turn and are not counted (default: %(default)s)",
    )
    parser.add_argument("--cold", type=between(0, 100), default=3, help="cold starts of each (default: %(default)s)")
    parser.add_argument("--unet", action="store_true", help="one evaluation of the UNet instead of whole requests")
    parser.add_argument("--precision", default="float32", help="of the peers: float32, bfloat16 or both, by commas")
    parser.add_argument(
        "--peers-at-once", type=between(0, 100), default=0, help="so many share the memory with fewstep (0: all)"
    )
    parser.add_argument("--keep-prompts", action="store_true", help="let fewstep keep the prompt's embedding")
    parser.add_argument("--backend", choices=BACKENDS, default="auto")
    parser.add_argument(
        "--also",
        default="",
        metavar="BACKENDS",
        help="fewstep on other backends too, in an environment of the peers' where this one cannot run them",
    )
    parser.add_argument(
        "--budget", metavar="BUDGET", help="each of fewstep's once more with what the bundle has within a budget"
    )
    parser.add_argument("--threads", type=between(0, 1024), default=0, help="for all contenders (default: one a core)")
    parser.add_argument("--environments", type=Path, default=Path("build/bench"), help="where the peers' are")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them")


def execute(options: argparse.Namespace) -> int:
    from ..bench.machine import describe
    from ..bench.measure import run
    from ..bench.table import lines, plot

    bundle, checkpoint = _subject(options.bundle, options.checkpoint)
    plan, about = _plan(options, bundle, checkpoint)
    report = {"what": about, "machine": describe(options.threads), **run(plan, say)}
    text = json.dumps(report, indent=1) + "\n"
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text, encoding="utf-8")
    if options.plot:
        plot(report, plan.steps, options.plot)
    emit(options, report, "\n".join(lines(report, plan.steps)))
    own = [report["contenders"][name] for name in plan.variants]
    if all("error" in figures for figures in own):
        raise MissingError(f"nothing of fewstep's could be measured: {own[0]['error']}")
    return 0


def _subject(name: str, checkpoint: str | None) -> tuple[Bundle, Path | None]:
    """The bundle, and the diffusers folder its weights came from."""
    if name in EMBEDDED and not Path(name).exists():
        from ..export.embedded import embedded_checkpoint

        return open_bundle(name), embedded_checkpoint(name)
    return open_bundle(name), None if checkpoint is None else Path(checkpoint).absolute()


def _plan(options: argparse.Namespace, bundle: Bundle, checkpoint: Path | None) -> tuple[Any, dict[str, Any]]:
    from ..bench.measure import OURS, Plan
    from ..bench.workers import backend_python, contender

    peers = tuple(p for p in options.against.split(",") if p)
    for peer in peers:
        contender(peer)
    if peers and checkpoint is None:
        raise MissingError("the peers have nothing to load", remedy="Name the diffusers folder with --checkpoint.")
    try:
        steps = tuple(int(v) for v in (options.steps or str(bundle.defaults.steps)).split(","))
    except ValueError as error:
        raise ArgumentError(f"--steps is {options.steps!r}", expected="numbers, like 1,2,4") from error
    width, height = options.size or (bundle.defaults.width, bundle.defaults.height)
    guidance = bundle.defaults.guidance if options.guidance is None else options.guidance
    cache = (options.environments / "models" / (bundle.components["unet"].weights_sha256[:16])).absolute()
    load = {
        "bundle": str(bundle.folder.absolute()),
        "checkpoint": str(checkpoint or ""),
        "threads": options.threads,
        "size": [width, height],
        "batch": options.batch,
        "cache": str(cache),
        "warm_prompts": options.keep_prompts,
        "calibration": {"steps": bundle.defaults.steps, "guidance": guidance},
    }
    request = {
        "prompt": options.prompt,
        "guidance": guidance,
        "seeds": list(range(options.seed, options.seed + options.batch)),
        "size": [width, height],
    }
    about = {
        "bundle": bundle.name,
        "graphs": {n: c.graph_sha256 for n, c in bundle.components.items()},
        "weights": {n: c.weights_sha256 for n, c in bundle.components.items()},
        "measured": "one evaluation of the UNet" if options.unet else "whole requests",
        **request,
        "steps": list(steps),
        "keep_prompts": options.keep_prompts,
    }
    backends = {OURS: options.backend} | {f"{OURS} {b}": b for b in options.also.split(",") if b}
    for backend in backends.values():
        if backend not in BACKENDS:
            raise UnknownNameError("backend", backend, tuple(BACKENDS))
    variants: dict[str, dict[str, Any]] = {n: {"backend": b} for n, b in backends.items()}
    if options.budget:
        bundle.within(options.budget)
        variants |= {f"{n}, {options.budget}": {**v, "budget": options.budget} for n, v in variants.items()}
    plan = Plan(
        load=load,
        request=request,
        steps=(1,) if options.unet else steps,
        against=peers,
        variants=variants,
        python={
            name: python
            for name, own in variants.items()
            if (python := backend_python(own["backend"], options.environments)) is not None
        },
        precisions=tuple(options.precision.split(",")),
        repeat=options.repeat,
        warm_up=options.warm_up,
        lead_in=options.lead_in,
        cold=0 if options.unet else options.cold,
        peers_at_once=options.peers_at_once,
        unet=_unet_shapes(bundle, width, height, options.batch * (2 if guidance > 1 else 1)) if options.unet else None,
        environments=options.environments,
    )
    return plan, about


def _unet_shapes(bundle: Bundle, width: int, height: int, rows: int) -> dict[str, list[int]]:
    """The shapes of the UNet's inputs for these rows, by name."""
    factor = bundle.latent.factor
    dims = {"rows": rows, "height": height // factor, "width": width // factor, "tokens": bundle.tokens}
    return {s.name: list(s.resolve(dims)) for s in bundle.component("unet").inputs}
