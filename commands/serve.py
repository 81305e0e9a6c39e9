"""`fewstep serve BUNDLE`: images over HTTP, as OpenAI's clients ask for them, and live sessions at /live."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ..bundle import Bundle
from ..errors import ArgumentError, MissingExtraError
from .asking import add_adapter_options
from .carrying import plain_name
from .common import BUNDLE_HELP, add_budget_option, add_engine_options, between, open_bundle, register_torch, say, size

if TYPE_CHECKING:
    from ..serving import Server
    from ..serving.http import Metrics
    from ..serving.resident import ServedModel

USUAL_RANK = 32
"""Of LoRAs, for the estimate of what a model takes that is served with some."""
LOG_FORMATS = ("auto", "plain", "json")
LOG_LEVELS = ("debug", "info", "warning", "error")


def define(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help=BUNDLE_HELP)
    parser.add_argument("--host", default="127.0.0.1", help="beyond loopback FEWSTEP_TOKEN or --keys (%(default)s)")
    parser.add_argument("--port", type=between(0, 65535), default=8000, help="(default: %(default)s)")
    parser.add_argument("--name", help="what requests call the model (default: the bundle's name, or its folder's)")
    parser.add_argument("--alias", action="append", default=[], help="another name of the model; repeatable")
    parser.add_argument(
        "--model",
        type=named_bundle,
        action="append",
        default=[],
        metavar="NAME=BUNDLE",
        help="another model, which requests name; repeatable",
    )
    parser.add_argument(
        "--models-folder", metavar="DIR", help="bundles that may be loaded over HTTP, by the names of their folders"
    )
    parser.add_argument(
        "--memory-mib",
        type=between(1, 1 << 30),
        help="estimated memory of the models that are loaded at a time; the one used least recently makes room",
    )
    parser.add_argument(
        "--keys", metavar="FILE", help="TOML with a table for each caller: key or sha256, per_minute, concurrent, admin"
    )
    parser.add_argument(
        "--cors",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let pages of this origin call, like https://example.org, or * for all; repeatable",
    )
    parser.add_argument("--size", type=size, action="append", metavar="WxH", help="repeatable (default: the bundle's)")
    parser.add_argument("--slots", type=between(1, 4096), default=32, help="images in progress (default: %(default)s)")
    parser.add_argument(
        "--rows", type=between(1, 1024), default=16, help="most UNet rows a tick (default: %(default)s)"
    )
    parser.add_argument("--bucket", type=between(1, 1024), action="append", help="evaluate with these row counts only")
    parser.add_argument(
        "--queue", type=between(0, 1_000_000), default=64, help="images that wait (default: %(default)s)"
    )
    parser.add_argument("--most-work", type=float, default=60.0, metavar="SECONDS", help="accepted ahead (%(default)s)")
    parser.add_argument("--most-images", type=between(1, 1024), default=8, help="of a request (default: %(default)s)")
    parser.add_argument("--most-steps", type=between(1, 1000), default=100, help="of a request (default: %(default)s)")
    parser.add_argument("--deadline", type=float, default=120.0, metavar="SECONDS", help="of a request (%(default)s)")
    parser.add_argument(
        "--log-format",
        choices=LOG_FORMATS,
        default="auto",
        help="plain lines on a terminal and JSON elsewhere, or always one of them (default: %(default)s)",
    )
    parser.add_argument("--log-level", choices=LOG_LEVELS, default="info", help="(default: %(default)s)")
    parser.add_argument("--drain", type=float, default=30.0, metavar="SECONDS", help="SIGTERM waits (%(default)s)")
    add_adapter_options(parser)
    add_engine_options(parser)
    add_budget_option(parser)


def execute(options: argparse.Namespace) -> int:
    try:
        from ..serving.http import Metrics, Service, Settings, make_app
        from ..serving.http.callers import read_keys
        from ..serving.http.logs import logging_to
        from ..serving.http.run import allowed_hosts, listen, serve
        from ..serving.live.socket import add_live
        from ..serving.model_folder import ModelFolder
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "starlette", "serve", purpose="fewstep serve") from error
    token = os.environ.get("FEWSTEP_TOKEN") or None
    keys = {} if options.keys is None else read_keys(options.keys)
    hosts = allowed_hosts(options.host, guarded=token is not None or bool(keys))
    bundle = open_bundle(options.bundle, options.budget)
    settings = Settings(
        model=options.name or bundle.name,
        aliases=other_names(options, bundle),
        token=token,
        keys=keys,
        origins=tuple(options.cors),
        hosts=hosts,
        images=min(options.most_images, options.slots),
        steps=options.most_steps,
        deadline_s=options.deadline,
        drain_s=options.drain,
    )
    listening = listen(options.host, options.port)
    metrics = Metrics()
    bundles = {settings.model: bundle, **_others(options, settings.models)}
    budget = None if options.memory_mib is None else options.memory_mib << 20
    describe = partial(_model, options, metrics)
    models = [describe(name, b, words=options.embedding if b is bundle else ()) for name, b in bundles.items()]
    folder = None if options.models_folder is None else ModelFolder(options.models_folder, describe)
    service = Service(models, budget=budget, observer=metrics, folder=folder)
    waiting = (options.slots + options.queue) * len(bundles)
    largest = max((s for b in bundles.values() for s in _sizes(options, b)), key=lambda s: s[0] * s[1])
    bound = settings.uploads_bytes(waiting, largest, beside=max(m.pictures for m in models)) / 2**30
    say(f"bodies and pictures that come in take {bound:.2f} GiB at most, beside the model's memory")
    if folder is not None:
        say(
            f"in {options.models_folder}: {', '.join(folder.names) or 'no bundle yet'}; each takes as much for pictures"
        )
    say(f"loading {', '.join(bundles)}")
    app = make_app(service, settings, metrics=metrics, routes=add_live(service, settings, metrics))
    with logging_to(sys.stderr, form=options.log_format, level=options.log_level):
        serve(app, service, listening, drain_s=options.drain)
    if service.error is not None:
        raise service.error
    return 0


def other_names(options: argparse.Namespace, bundle: Bundle) -> tuple[str, ...]:
    """The other names of the first model: without a `--name`, the word by which the command line has it too."""
    from ..serving.model_folder import NAME

    word = plain_name(options.bundle)
    own = options.name is None and NAME.fullmatch(word) is not None and word != bundle.name
    taken = (*options.alias, *(n for n, _ in options.model))
    return (*options.alias, *([word] if own and word not in taken else []))


def named_bundle(text: str) -> tuple[str, str]:
    """`NAME=BUNDLE`, for `--model`."""
    from ..serving.model_folder import NAME

    name, _, bundle = text.partition("=")
    if not NAME.fullmatch(name) or not bundle:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=BUNDLE, with a name of letters, digits, . _ and -")
    return name, bundle


def _others(options: argparse.Namespace, taken: Sequence[str]) -> dict[str, Bundle]:
    """The bundles beside the first, by name."""
    names = [n for n, _ in options.model]
    twice = sorted({n for n in names if names.count(n) > 1 or n in taken})
    if twice:
        raise ArgumentError(f"two models are called {', '.join(twice)}", expected="a name of its own for each")
    return {name: open_bundle(folder) for name, folder in options.model}


def _sizes(options: argparse.Namespace, bundle: Bundle) -> list[tuple[int, int]]:
    return options.size or [(bundle.defaults.width, bundle.defaults.height)]


def _model(
    options: argparse.Namespace, metrics: Metrics, name: str, bundle: Bundle, *, words: Sequence[Any] = ()
) -> ServedModel:
    from ..engines.backends.registry import choose_backend, load_backend, makes_in_memory
    from ..engines.memory import predicted_peak
    from ..runtime.pictures.control import pictures_beside
    from ..serving.resident import ServedModel
    from ..serving.server import refuse_clips

    refuse_clips(bundle)
    backend, _ = choose_backend(options.backend)
    on_cpu = makes_in_memory(backend) or load_backend(backend).device == "cpu"
    sizes = _sizes(options, bundle)
    images = max(1, options.rows // (2 if bundle.defaults.guidance > 1 else 1))
    largest = max(sizes, key=lambda s: s[0] * s[1])
    rank = None if options.lora_folder is None else USUAL_RANK
    return ServedModel(
        name=name,
        load=partial(_load, options, bundle, metrics, words=words),
        nbytes=predicted_peak(bundle, largest, images, on_cpu=on_cpu, lora_rank=rank),
        sizes=tuple(sizes),
        pictures=pictures_beside(bundle),
    )


def _load(options: argparse.Namespace, bundle: Bundle, metrics: Metrics, *, words: Sequence[Any]) -> Server:
    from ..serving import Server

    register_torch(options.backend)
    return Server(
        bundle,
        sizes=options.size,
        most_slots=options.slots,
        most_rows=options.rows,
        buckets=options.bucket,
        queue=options.queue,
        most_work_s=options.most_work,
        image="vae_encoder" in bundle.components,
        observer=metrics,
        backend=options.backend,
        threads=options.threads,
        lora_folder=options.lora_folder,
        embeddings=words or (),
        **({"size": options.size[0]} if options.size else {}),
    )
