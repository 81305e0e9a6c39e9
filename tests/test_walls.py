"""The walls between the rooms: what a lean import may load, and who may know whom."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

import fewstep
import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "diffusers", "onnx", "transformers", "onnxruntime"}
FLOORS = (
    ("errors", "version"),
    ("families", "schedules"),
    ("bundle",),
    ("presets", "engines"),
    ("runtime",),
    ("serving", "export"),
    ("bench",),
    ("commands",),
    ("cli",),
    ("__init__", "__main__"),
)
"""Rooms and files from the ground up: one may know what is below it, and itself."""
ROOMS = {room for floor in FLOORS for room in floor}
TORCH_ROOMS = {"export", "bench"}
TORCH_FILES = {
    "runtime/device/clock.py": "the CUDA device",
    "runtime/device/memory.py": "the CUDA device",
    "runtime/device/torch_device.py": "the CUDA device",
    "runtime/device/torch_slots.py": "the CUDA device",
    "runtime/device/torch_tables.py": "the CUDA device",
    "runtime/device/cuda_graphs.py": "the CUDA device",
    "runtime/device/torch_update.py": "the CUDA device",
    "engines/gate/gate.py": "copies buffers of GPU engines",
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
    ["fewstep.schedules", "fewstep.engines", "fewstep.runtime", "fewstep.bundle", "fewstep.cli", "fewstep.export"],
)
def test_rooms_load_nothing_heavy(module: str) -> None:
    assert not loaded_by(f"import {module}") & HEAVY


def test_schedules_need_numpy_alone() -> None:
    third_party = loaded_by("import fewstep.schedules") - loaded_by("import numpy")
    assert third_party - set(sys.stdlib_module_names) == {"fewstep"}


@dataclass(frozen=True)
class Import:
    """One file of the package names another: where, and whom."""

    source: str
    target: str
    line: int


def package_files() -> dict[str, Path]:
    """The package's files by their module names, `engines.backends` for a folder's own."""
    paths = [
        p
        for room in ROOMS
        for p in ([ROOT / f"{room}.py"] if (ROOT / f"{room}.py").is_file() else sorted((ROOT / room).rglob("*.py")))
    ]
    names = (".".join(p.relative_to(ROOT).with_suffix("").parts) for p in paths)
    return {n.removesuffix(".__init__"): p for n, p in zip(names, paths, strict=True)}


def imported_modules(path: Path) -> list[tuple[str, int]]:
    """Every module that an import statement names, wherever it stands: in the file, in a function, under a condition.

    Of the package's own their names in it ("engines.base"), of others the whole ("torch.cuda").
    """
    folder = path.relative_to(ROOT).parts[:-1]
    names: list[tuple[str, int]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [(a.name, node.lineno) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] if node.level else ()
            module = ".".join((*base, *((node.module or "").split(".") if node.module else ())))
            names += [(f"{module}.{a.name}".strip("."), node.lineno) for a in node.names]
    return [(n.removeprefix("fewstep."), line) for n, line in names]


def graph() -> list[Import]:
    files = package_files()
    arrows = []
    for source, path in files.items():
        for name, line in imported_modules(path):
            module = name if name in files else name.rpartition(".")[0]
            if module in files and module != source:
                arrows.append(Import(source, module, line))
    return arrows


def circles(arrows: list[Import]) -> list[list[str]]:
    """Files that know each other by whatever way: Tarjan's strongly connected components of more than one."""
    known: dict[str, set[str]] = {}
    for arrow in arrows:
        known.setdefault(arrow.source, set()).add(arrow.target)
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = lowest[name] = len(order)
        stack.append(name)
        for other in sorted(known.get(name, ())):
            if other not in order:
                visit(other)
                lowest[name] = min(lowest[name], lowest[other])
            elif other in stack:
                lowest[name] = min(lowest[name], order[other])
        if lowest[name] == order[name]:
            place = stack.index(name)
            component, stack[place:] = stack[place:], []
            found.extend([component] if len(component) > 1 else [])

    for name in sorted(known):
        if name not in order:
            visit(name)
    return found


def test_no_files_know_each_other_in_a_circle() -> None:
    arrows = graph()
    assert len(arrows) > 500, "the imports are not seen"
    for circle in circles(arrows):
        lines = [f"{a.source}:{a.line} -> {a.target}" for a in arrows if {a.source, a.target} <= set(circle)]
        pytest.fail("a circle of imports:\n" + "\n".join(lines))


def test_no_arrow_points_upwards() -> None:
    """`pytest -s` prints the floors with whom each room knows."""
    height = {room: i for i, floor in enumerate(FLOORS) for room in floor}
    room_of = {n: n.partition(".")[0] for n in package_files()}
    knows: dict[str, set[str]] = {room: set() for room in ROOMS}
    for arrow in graph():
        source, target = room_of[arrow.source], room_of[arrow.target]
        knows[source].add(target)
        upwards = height[target] >= height[source] and source != target
        assert not upwards, f"{arrow.source}:{arrow.line} imports {arrow.target}, which stands no lower"
    for floor in FLOORS:
        print(" | ".join(f"{room}: {', '.join(sorted(knows[room] - {room})) or '-'}" for room in floor))


def test_the_graph_sees_what_it_should(tmp_path: Path) -> None:
    """A circle through a function and a condition is a circle."""
    arrows = [Import("a", "b", 1), Import("b", "c", 2), Import("c", "a", 3), Import("c", "d", 4)]
    assert [sorted(c) for c in circles(arrows)] == [["a", "b", "c"]]
    assert circles(arrows[1:]) == []
    assert ("engines.open", 15) in [(a.target, 15) for a in graph() if a.source == "engines"]


def test_the_version_is_one() -> None:
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert stated == fewstep.__version__


def test_torch_stays_where_it_belongs() -> None:
    for name, path in package_files().items():
        if name.partition(".")[0] in TORCH_ROOMS:
            continue
        place = str(path.relative_to(ROOT))
        heavy = {m.partition(".")[0] for m, _ in imported_modules(path)} & {"torch", "diffusers", "transformers"}
        assert not heavy or (place in TORCH_FILES and heavy == {"torch"}), f"{place} imports {heavy}"
