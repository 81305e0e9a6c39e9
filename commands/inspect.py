"""`fewstep inspect PATH`: a bundle's contents, or the command that made a picture."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import MissingError
from .carrying import bundle_nearby, say_left
from .common import BUNDLE_HELP, defaults_line, emit, open_bundle


def define(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help=f"{BUNDLE_HELP}; an engine's folder; or a picture of fewstep's or A1111's")


def execute(options: argparse.Namespace) -> int:
    path = Path(options.path)
    if path.is_dir() and (path / "manifest.json").is_file():
        return _engine(options, path)
    if path.is_dir() or not path.exists():
        if path.suffix and not path.exists():
            raise MissingError(f"there is no file {options.path!r}", expected="a picture, or a bundle's folder")
        return _bundle(options)
    return _picture(options, path)


def _engine(options: argparse.Namespace, path: Path) -> int:
    from ..engines import Store
    from ..engines.inventory import show_engine

    entry = show_engine(Store(path.resolve().parent), path.resolve().name)
    data = {
        "name": entry.name,
        "key": entry.key.to_json(),
        "bytes": entry.length,
        "built": entry.built,
        "gate": entry.gate,
    }
    emit(options, data, "\n".join(f"{k}: {v}" for k, v in data.items()))
    return 0


def _picture(options: argparse.Namespace, path: Path) -> int:
    from ..runtime.pictures.parameters import command_line, read_call
    from ..runtime.pictures.workflow import comfy_prompt

    carried = read_call(path)
    parameters = dict(carried.parameters)
    nearby = bundle_nearby(parameters)
    command = command_line(parameters if nearby is None else {**parameters, "bundle": nearby}, path.name)
    say_left(carried.left)
    data = {"command": command, "parameters": parameters, "not_carried_over": list(carried.left)}
    emit(options, {**data, "comfyui": comfy_prompt(parameters)}, command)
    return 0


def _bundle(options: argparse.Namespace) -> int:
    bundle = open_bundle(options.path)
    d, latent = bundle.defaults, bundle.latent
    origin = f"from {bundle.source.get('checkpoint')}, licence {bundle.licence or 'not stated'}"
    lines = [
        f"{bundle.name}: {bundle.family}, {d.width}x{d.height}, {origin}",
        f"  latent: {latent.channels} channels, {latent.factor} pixels a cell; sizes in multiples of {latent.unit}",
        *([f"  clips of up to {latent.frames} frames from a picture"] if latent.frames else []),
        f"  scheduler: {bundle.scheduler.get('_class_name')}, {bundle.noise_config.get('prediction_type', 'epsilon')}",
        f"  {f'preset {d.preset}' if d.preset else 'defaults'}: {defaults_line(d)}",
    ]
    for name, c in bundle.components.items():
        megabytes = bundle.path(c.weights).stat().st_size / 1e6
        lines.append(
            f"  {name:15} {c.dtype:9} {megabytes:9.2f} MB  weights {c.weights_sha256[:12]}  graph {c.graph_key[:12]}"
        )
    if bundle.schedules:
        lines.append(f"  searched schedules: {', '.join(s.sampler for s in bundle.schedules)}")
    lines.append(f"  gate: {bundle.gate.get('status')}")
    emit(options, bundle.to_json(), "\n".join(lines))
    return 0
