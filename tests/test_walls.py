"""The walls between the rooms: what a lean import may load, and who may know whom."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "diffusers", "onnx", "transformers", "onnxruntime"}
MAY_KNOW = {
    "families": {"families"},
    "schedules": {"schedules"},
    "engines": {"engines", "families"},
    "runtime": {"runtime", "engines", "schedules", "families"},
    "serving": {"serving", "runtime", "engines", "schedules", "families"},
    "export": {"export", "engines", "schedules", "runtime", "families"},
}
ROOMS = {*MAY_KNOW, "commands", "cli"}
TORCH_ROOMS = {"export"}
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


def imports(path: Path) -> list[tuple[str, int]]:
    """(top-level room or module, relative level) of every import statement, wherever in the file it stands."""
    found = []
    depth = len(path.relative_to(ROOT).parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(a.name.removeprefix("fewstep.").split(".")[0], 0) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").removeprefix("fewstep.").split(".")[0]
            if node.level == 0:
                found.append((module, 0))
            elif node.level == depth:
                found += [(module, node.level)] if module else [(a.name, node.level) for a in node.names]
    return found


@pytest.mark.parametrize("room", MAY_KNOW)
def test_no_room_imports_upwards(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        known = {name for name, _ in imports(path)} & ROOMS
        assert known <= MAY_KNOW[room], f"{path.relative_to(ROOT)} imports {known - MAY_KNOW[room]}"


def test_torch_stays_where_it_belongs() -> None:
    for room in ROOMS - TORCH_ROOMS - {"cli"}:
        for path in (ROOT / room).rglob("*.py"):
            name = str(path.relative_to(ROOT))
            heavy = {m for m, _ in imports(path)} & {"torch", "diffusers", "transformers"}
            assert not heavy or (name in TORCH_FILES and heavy == {"torch"}), f"{name} imports {heavy}"
