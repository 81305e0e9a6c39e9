"""`fewstep inspect PATH`: a bundle's contents, or the command that made a picture."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import BUNDLE_HELP, defaults_line, emit, open_bundle


def define(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help=f"{BUNDLE_HELP}; an engine's folder; or a PNG that fewstep made")


def execute(options: argparse.Namespace) -> int:
    path = Path(options.path)
    if path.is_dir() and (path / "manifest.json").is_file():
        return _engine(options, path)
    if path.is_dir() or not path.exists():
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
    from ..runtime.pictures.parameters import command_line, read_parameters

    parameters = read_parameters(path)
    command = command_line(parameters, path.name)
    emit(options, {"command": command, "parameters": parameters}, command)
    return 0


def _bundle(options: argparse.Namespace) -> int:
    bundle = open_bundle(options.path)
    d, latent = bundle.defaults, bundle.latent
    origin = f"from {bundle.source.get('checkpoint')}, licence {bundle.licence or 'not stated'}"
    lines = [
        f"{bundle.name}: {bundle.family}, {d.width}x{d.height}, {origin}",
        f"  latent: {latent.channels} channels, {latent.factor} pixels a cell; sizes in multiples of {latent.unit}",
        f"  scheduler: {bundle.scheduler.get('_class_name')}, {bundle.noise_config.get('prediction_type', 'epsilon')}",
        f"  {f'preset {d.preset}' if d.preset else 'defaults'}: {defaults_line(d)}",
    ]
    for name, c in bundle.components.items():
        megabytes = bundle.path(c.weights).stat().st_size / 1e6
        lines.append(
            f"  {name:15} {c.dtype:9} {megabytes:9.2f} MB  weights {c.weights_sha256[:12]}  graph {c.graph_key[:12]}"
        )
    lines.append(f"  gate: {bundle.gate.get('status')}")
    emit(options, bundle.to_json(), "\n".join(lines))
    return 0
