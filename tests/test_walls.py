"""The walls between the rooms: what a lean import may load, and who may import whom.

`pytest -s` prints the floors, with whom each room imports.
"""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
import time
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import fewstep
import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "diffusers", "onnx", "transformers", "onnxruntime"}
FLOORS = (
    ("errors", "version"),
    ("values", "places", "precision"),
    ("families", "schedules", "tensors"),
    ("weights",),
    ("agreement", "manifest"),
    ("bundle",),
    ("presets", "engines"),
    ("runtime",),
    ("search", "serving", "export"),
    ("quantize",),
    ("bench", "integrations"),
    ("commands",),
    ("cli",),
    ("__init__", "__main__"),
)
"""Rooms and single files from the ground up: each may import itself and what stands on a lower floor."""
HEIGHT = {name: height for height, floor in enumerate(FLOORS) for name in floor}
OUTSIDE = {"tests", "tools", "examples", "build", "dist"}
TORCH_ROOMS = {"export", "bench"}
TORCH_FILES = {
    "integrations/comfyui/nodes.py": "what ComfyUI's sockets carry",
    "runtime/device/clock.py": "the CUDA device",
    "runtime/device/host_engine.py": "the CUDA device",
    "runtime/device/memory.py": "the CUDA device",
    "runtime/device/torch_decoder.py": "the CUDA device",
    "runtime/device/torch_device.py": "the CUDA device",
    "runtime/device/torch_factors.py": "the CUDA device",
    "runtime/device/torch_records.py": "the CUDA device",
    "runtime/device/torch_slots.py": "the CUDA device",
    "runtime/device/torch_tables.py": "the CUDA device",
    "runtime/device/cuda_graphs.py": "the CUDA device",
    "runtime/device/torch_update.py": "the CUDA device",
    "runtime/device/triton_state.py": "the CUDA device",
    "runtime/device/triton_update.py": "the CUDA device",
    "engines/gate/gate.py": "copies buffers of GPU engines",
    "engines/gate/sizes.py": "has torch compute without TF32 where it is there",
    "engines/backends/ort_cuda.py": "buffers of GPU engines",
    "engines/backends/tensorrt.py": "buffers of GPU engines",
}


def loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint('\\n'.join(m for m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    return {m.split(".")[0] for m in done.stdout.split()}


def test_import_fewstep_is_lean() -> None:
    began = time.perf_counter()
    loaded = loaded_by("import fewstep")
    print(f"import fewstep, with the interpreter's start: {1e3 * (time.perf_counter() - began):.0f} ms")
    assert not loaded & (HEAVY | {"numpy", "PIL"})


@pytest.mark.parametrize(
    "module",
    [
        *("fewstep.schedules", "fewstep.engines", "fewstep.runtime", "fewstep.runtime.diffusers_adapter"),
        *("fewstep.bundle", "fewstep.cli", "fewstep.export"),
    ],
)
def test_rooms_load_nothing_heavy(module: str) -> None:
    assert not loaded_by(f"import {module}") & HEAVY


def test_schedules_need_numpy_alone() -> None:
    third_party = loaded_by("import fewstep.schedules") - loaded_by("import numpy")
    assert third_party - set(sys.stdlib_module_names) == {"fewstep"}


class Import(NamedTuple):
    """One module of the package imports another on this line."""

    source: str
    target: str
    line: int

    def __str__(self) -> str:
        path = modules()[self.source].relative_to(ROOT) if self.source in modules() else self.source
        return f"{path}:{self.line} imports {self.target}"


@functools.cache
def modules() -> dict[str, Path]:
    """The package's files by their names as modules; a folder's own is `__init__.py`."""
    tops = [p for p in ROOT.iterdir() if p.name not in OUTSIDE and not p.name.startswith(".")]
    paths = [p for top in sorted(tops) for p in (sorted(top.rglob("*.py")) if top.is_dir() else [top])]
    names = {".".join(("fewstep", *p.relative_to(ROOT).with_suffix("").parts)): p for p in paths if p.suffix == ".py"}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


def room(module: str) -> str:
    """The room, or the file beside the rooms, that a module is in."""
    return module.removeprefix("fewstep").lstrip(".").partition(".")[0] or "__init__"


def imported(tree: ast.AST, folder: tuple[str, ...]) -> list[tuple[str, int]]:
    """What every import statement names, wherever it stands: in the file, in a function, under a condition.

    `from x import y` names `x.y`, since y may be a module.
    """
    names: list[tuple[str, int]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [(a.name, node.lineno) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ("fewstep", *folder)[: len(folder) + 2 - node.level] if node.level else ()
            base = ".".join((*above, *([node.module] if node.module else [])))
            names += [(f"{base}.{a.name}", node.lineno) for a in node.names]
    return names


def resolve(name: str, folder: tuple[str, ...]) -> str | None:
    """The module of the package that a name is, or is in; scripts of one folder import each other without it."""
    sibling = ".".join(("fewstep", *folder, name.partition(".")[0]))
    candidates = (name, name.rpartition(".")[0], *([sibling] if folder else ()))
    return next((c for c in candidates if c in modules()), None)


@functools.cache
def imports() -> tuple[Import, ...]:
    """Every import of one module of the package by another."""
    arrows = []
    for source, path in modules().items():
        folder = path.relative_to(ROOT).parts[:-1]
        for name, line in imported(ast.parse(path.read_text(encoding="utf-8")), folder):
            target = resolve(name, folder)
            if target is not None and target != source:
                arrows.append(Import(source, target, line))
    return tuple(arrows)


def circles(arrows: Iterable[Import]) -> list[list[Import]]:
    """For each strongly connected component one circle of imports through it, the shortest from its first module."""
    ahead: dict[str, dict[str, Import]] = defaultdict(dict)
    for arrow in arrows:
        ahead[arrow.source].setdefault(arrow.target, arrow)
    ways = {name: _ways(name, ahead) for name in sorted(ahead)}
    rings, seen = [], set()
    for name, way in ways.items():
        if name in way and name not in seen:
            seen |= {other for other in way if name in ways.get(other, ())}
            rings.append(way[name])
    return rings


def _ways(start: str, ahead: Mapping[str, Mapping[str, Import]]) -> dict[str, list[Import]]:
    """The shortest chain of imports from a module to each that it reaches, itself included where there is a circle."""
    ways: dict[str, list[Import]] = {}
    frontier: list[tuple[str, list[Import]]] = [(start, [])]
    for name, chain in frontier:
        for target, arrow in ahead.get(name, {}).items():
            if target not in ways:
                ways[target] = [*chain, arrow]
                frontier.append((target, ways[target]))
    return ways


def upward(arrows: Iterable[Import]) -> list[Import]:
    """The imports of another room that stands no lower."""
    rooms = [(a, room(a.source), room(a.target)) for a in arrows]
    return [a for a, source, target in rooms if source != target and HEIGHT[target] >= HEIGHT[source]]


def test_every_room_has_a_floor() -> None:
    assert set(map(room, modules())) == HEIGHT.keys()


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert len(imports()) > 500, "the imports are not seen"
    drawn = ["\n  ".join(["a circle:", *map(str, circle)]) for circle in circles(imports())]
    assert not drawn, "\n".join(drawn)


def test_no_room_imports_upwards() -> None:
    below: dict[str, set[str]] = defaultdict(set)
    for arrow in imports():
        below[room(arrow.source)].add(room(arrow.target))
    for floor in FLOORS:
        print(" | ".join(f"{name}: {', '.join(sorted(below[name] - {name})) or 'nothing'}" for name in floor))
    assert not upward(imports()), "\n".join(map(str, upward(imports())))


def test_circles_and_upward_arrows_are_noticed() -> None:
    a, b, c = (f"fewstep.engines.{n}" for n in "abc")
    ring = [Import(a, b, 1), Import(b, c, 2), Import(c, a, 3)]
    beside = [Import(c, "fewstep.bundle", 4), Import("fewstep.runtime.x", a, 5), Import(b, a, 6)]
    assert circles([*ring, *beside]) == [[ring[0], beside[2]]]
    assert circles([*ring, *beside[:2]]) == [ring]
    assert circles([*ring[:2], *beside[:2]]) == []
    climbs = [
        Import("fewstep.bundle", "fewstep.engines.base", 1),
        Import("fewstep.serving.job", "fewstep.export.plan", 2),
        Import("fewstep.cli", "fewstep", 3),
    ]
    assert upward([*ring, *beside, *climbs]) == climbs


@pytest.mark.parametrize(
    ("statement", "target"),
    [
        ("import fewstep.engines.base", "fewstep.engines.base"),
        ("import fewstep", "fewstep"),
        ("from fewstep import __version__", "fewstep"),
        ("from fewstep.engines import base", "fewstep.engines.base"),
        ("from fewstep.engines.base import Engine", "fewstep.engines.base"),
        ("def f():\n    from ..base import Engine", "fewstep.engines.base"),
        ("if TYPE_CHECKING:\n    from ... import bundle", "fewstep.bundle"),
        ("from ... import __version__", "fewstep"),
        ("from . import ort", "fewstep.engines.backends.ort"),
        ("from .. import backend_names", "fewstep.engines"),
        ("from ort import OrtEngine", "fewstep.engines.backends.ort"),
        ("import onnxruntime.capi", None),
        ("import json", None),
    ],
)
def test_each_kind_of_import_is_seen(statement: str, target: str | None) -> None:
    folder = ("engines", "backends")
    ((name, _),) = imported(ast.parse(statement), folder)
    assert resolve(name, folder) == target


def test_the_version_is_one() -> None:
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert fewstep.__version__ == stated


def test_a_class_name_means_one_thing() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for path in modules().values():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                places[node.name].append(str(path.relative_to(ROOT)))
    assert not {name: files for name, files in places.items() if len(files) > 1}


def test_torch_stays_where_it_belongs() -> None:
    for path in modules().values():
        place, folder = path.relative_to(ROOT), path.relative_to(ROOT).parts[:-1]
        if place.parts[0] in TORCH_ROOMS:
            continue
        tops = {n.split(".")[0] for n, _ in imported(ast.parse(path.read_text(encoding="utf-8")), folder)}
        heavy = tops & {"torch", "diffusers", "transformers"}
        assert not heavy or (str(place) in TORCH_FILES and heavy == {"torch"}), f"{place} imports {heavy}"


MEANT = re.compile(r"_?(\w+_)?(device|slots|engines?|bindings?|pipelines?|backend|unet|decoder|encoder|graphs?|pool)")


def annotated(tree: ast.AST) -> Iterator[tuple[str, ast.expr, int]]:
    """Every name with the type beside it: arguments, variables, attributes, and functions with their results."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.annotation is not None:
            yield node.arg, node.annotation, node.lineno
        elif isinstance(node, ast.AnnAssign):
            name = node.target.attr if isinstance(node.target, ast.Attribute) else ast.unparse(node.target)
            yield name, node.annotation, node.lineno
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.returns is not None:
            yield node.name, node.returns, node.lineno


def test_devices_slots_bindings_and_engines_have_types() -> None:
    seen, untyped = 0, []
    for path in modules().values():
        if path.relative_to(ROOT).parts[0] not in ("runtime", "serving", "engines", "export"):
            continue
        for name, annotation, line in annotated(ast.parse(path.read_text(encoding="utf-8"))):
            if MEANT.fullmatch(name):
                seen += 1
                untyped += [f"{path.relative_to(ROOT)}:{line}: {name}"] if "Any" in ast.unparse(annotation) else []
    assert seen > 200, "the annotations are not seen"
    assert not untyped, "\n".join(untyped)
