"""Trace the graphs that travel with the package, and write the embedded checkpoints' references.

python tools/package_graphs.py export/demo/base export/demo/student
python tools/package_graphs.py --standard sd1 sd2 sd21 sdxl sd1-lcm sdxl-lcm --dtypes float32 float16 bfloat16
python tools/package_graphs.py --prune

What is there already is not traced again, and a UNet in float32 or bfloat16 is made of its float16 graph where there
is one (retype.py). --prune deletes graphs that no known configuration asks for.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from architectures import CLASSES, family_of, standard_configs
from fewstep.export.checkpoint.folder import open_checkpoint
from fewstep.export.plan import PRECISIONS, component_config, plan_components
from fewstep.export.trace.graphs import find_graph, graph_key, keep_graph
from fewstep.families import Family, find_family

PACKAGED = Path(__file__).parents[1] / "export" / "graphs"
STANDARD = ("sd1", "sd2", "sd21", "sdxl", "sd1-lcm", "sdxl-lcm", "taesd")
EMBEDDED = ("base", "student")


def standard_components(name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The kinds and configurations of an architecture's components, UNet first."""
    configs = standard_configs(name)
    for part in sorted(configs, reverse=True):
        kinds = ("vae_decoder", "vae_encoder") if part == "vae" else (part,)
        for kind in kinds:
            yield kind, component_config(kind, configs[part], CLASSES[part], find_family(family_of(name)))


def package(kind: str, config: Mapping[str, Any], dtype: str, family: Family) -> None:
    key = graph_key(kind, config, dtype)
    if (PACKAGED / f"{key}.graph").is_file():
        return
    from fewstep.export.trace.trace import trace_component
    from retype import retype

    began = time.monotonic()
    half = find_graph(graph_key(kind, config, "float16")) if kind == "unet" and dtype != "float16" else None
    graph = retype(half, dtype, key) if half else trace_component(kind, config, dtype, family, key=key)
    path = keep_graph(graph, PACKAGED)
    path.chmod(0o644)
    how = "retyped" if half else "traced"
    print(f"{kind} {dtype}: {how}, {path.stat().st_size} bytes, {time.monotonic() - began:.0f} s", flush=True)


def embed(folder: str) -> None:
    from fewstep.export.gate.reference import make_reference

    checkpoint = open_checkpoint(folder)
    for plan in plan_components(checkpoint):
        package(plan.kind, plan.config, plan.dtype, plan.family)
    path = checkpoint.folder / "reference.safetensors"
    make_reference(checkpoint, path, dtypes={})
    path.chmod(0o644)
    print(f"{folder}: reference written", flush=True)


def prune() -> None:
    demo = PACKAGED.parent / "demo"
    wanted = {p.key for n in EMBEDDED for p in plan_components(open_checkpoint(demo / n))}
    wanted |= {graph_key(k, c, d) for n in STANDARD for k, c in standard_components(n) for d in PRECISIONS}
    for path in PACKAGED.glob("*.graph"):
        if path.stem not in wanted:
            path.unlink()
            print(f"{path.name} deleted", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="*")
    parser.add_argument("--standard", nargs="*", default=[], choices=STANDARD)
    parser.add_argument("--dtypes", nargs="*", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--prune", action="store_true")
    options = parser.parse_args()
    for dtype in sorted(options.dtypes, key=lambda d: d != "float16"):
        for name in options.standard:
            for kind, config in standard_components(name):
                package(kind, config, dtype, find_family(family_of(name)))
    for folder in options.folders:
        embed(folder)
    if options.prune:
        prune()
    return 0


if __name__ == "__main__":
    sys.exit(main())
