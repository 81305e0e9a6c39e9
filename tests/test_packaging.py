"""What a wheel and an image hold, and that nothing needs a system that a reader may not have."""

from __future__ import annotations

import ast
import fnmatch
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from lean import ROOT, lean_path, run_lean
from packaging.requirements import Requirement
from packaging.version import Version

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT, SETUPTOOLS = PYPROJECT["project"], PYPROJECT["tool"]["setuptools"]
OUTSIDE = {"tests", "tools", "examples", "docs", "build", "dist"}
GIT = shutil.which("git") or "git"
POSIX = ("resource", "fcntl", "grp", "pwd", "termios", "tty", "pty", "syslog")
"""Modules of Python's library that Windows lacks."""


def sources() -> list[Path]:
    tops = [p for p in ROOT.iterdir() if p.name not in OUTSIDE and not p.name.startswith(".")]
    return [f for top in tops for f in (top.rglob("*.py") if top.is_dir() else [top]) if f.suffix == ".py"]


def test_every_package_is_in_the_wheel() -> None:
    folders = {f.parent.relative_to(ROOT) for f in sources() if f.name == "__init__.py"}
    names = {".".join(("fewstep", *f.parts)) for f in folders}
    assert set(SETUPTOOLS["packages"]) == names
    assert {n: ROOT / p for n, p in SETUPTOOLS["package-dir"].items()} == {
        n: ROOT.joinpath(*n.split(".")[1:]) for n in names
    }


def test_every_file_that_the_package_reads_is_in_the_wheel() -> None:
    """What is neither source nor text about it, in the folders of packages."""
    patterns = {n: tuple(p) for n, p in SETUPTOOLS["package-data"].items()}
    apart = {"README.md", "SECURITY.md", "LICENSE", "Makefile", "Containerfile", "MANIFEST.in"}
    apart |= {"pyproject.toml", "constraints.txt", ".gitignore", ".dockerignore"}
    listed = subprocess.run([GIT, "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, listed):
        path = Path(name)
        if path.suffix == ".py" or path.parts[0] in OUTSIDE | {".ci", "bench"} or name in apart:
            continue
        owners = [".".join(("fewstep", *path.parts[:n])) for n in range(len(path.parts))]
        rests = {o: "/".join(path.parts[n:]) for n, o in enumerate(owners)}
        held = [o for o, rest in rests.items() for p in patterns.get(o, ()) if fnmatch.fnmatch(rest, p)]
        assert held, f"{name} is in no wheel"


def test_the_metadata_say_who_what_and_for_which_python() -> None:
    for field in ("description", "readme", "license", "license-files", "requires-python", "keywords", "authors"):
        assert PROJECT.get(field), field
    stated = {c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)}
    assert stated == {"3.11", "3.12", "3.13"}
    assert f">={min(stated, key=Version)}" == PROJECT["requires-python"]
    assert "Typing :: Typed" in PROJECT["classifiers"]
    assert (ROOT / "py.typed").is_file()


def test_ranges_admit_what_is_tested_and_what_comes() -> None:
    """An upper bound keeps a whole major version in, so that no neighbour has to be held back for us."""
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    for requirement in (Requirement(r) for of in lists for r in of):
        bounds = [s for s in requirement.specifier if s.operator in ("<", "<=", "==", "~=")]
        assert all(s.operator == "<" and Version(s.version).minor == 0 for s in bounds), str(requirement)
    for requirement in map(Requirement, PROJECT["dependencies"]):
        assert requirement.specifier.contains(distribution(requirement.name).version, prereleases=True)
    numpy, pillow = (
        next(r for r in map(Requirement, PROJECT["dependencies"]) if r.name == n) for n in ("numpy", "pillow")
    )
    assert numpy.specifier.contains("2.4.6")
    assert pillow.specifier.contains("12.0.0")  # gradio 6 wants less than 13
    constrained = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for requirement in (Requirement(r) for of in lists for r in of):
        if requirement.name in constrained:
            assert requirement.specifier.contains(constrained[requirement.name]), str(requirement)


def test_whoever_runs_on_a_gpu_gets_torch() -> None:
    for extra in ("cuda", "tensorrt", "tensorrt-rtx"):
        names = {Requirement(r).name for r in PROJECT["optional-dependencies"][extra]}
        assert {"torch", "nvidia-ml-py"} <= names


def test_every_extra_is_used() -> None:
    """Something imports what an extra brings, or says in words how to get it."""
    text = "".join(f.read_text(encoding="utf-8") for f in sources())
    documents = "".join(f.read_text(encoding="utf-8") for f in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
    for extra in PROJECT["optional-dependencies"].keys() - {"dev"}:
        assert f'"{extra}"' in text or re.search(rf"\[[\w,-]*\b{re.escape(extra)}\b[\w,-]*\]", documents), extra


def test_the_context_of_an_image_holds_no_environment() -> None:
    """Every folder of the working tree that git ignores, and its history, stays out."""
    ignored = {line.strip("/") for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()}
    assert {".git", ".venv", "build", "dist", "**/__pycache__"} <= ignored
    copied = re.findall(r"^COPY (?:--chmod=\d+ )?([\w/.]+) ", (ROOT / "Containerfile").read_text(), re.MULTILINE)
    assert not ignored & {c.split("/")[0] for c in copied}


def unguarded(tree: ast.Module) -> Iterator[str]:
    """Modules that are imported whenever a file is: not within a function, and not within `try`."""
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (a.name.partition(".")[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def test_nothing_needs_a_module_of_unix_to_be_imported() -> None:
    assert set(unguarded(ast.parse("import resource\ntry:\n    import fcntl\nexcept ImportError: ..."))) == {"resource"}
    faults = {str(f): m for f in sources() for m in unguarded(ast.parse(f.read_text("utf-8"))) if m in POSIX}
    assert not faults


ABROAD = f"""
import sys
for name in {POSIX!r}:
    sys.modules[name] = None
import json, os
for name in ("geteuid", "getuid", "sched_getaffinity", "fork"):
    if hasattr(os, name):
        delattr(os, name)
from fewstep.cli import VERBS, main, make_parser
make_parser()
from fewstep.export.embedded import embedded_checkpoint
codes = [
    main(["export", str(embedded_checkpoint("student")), "bundle", "--no-gate", "--json"]),
    main(["build", "bundle"]),
    main(["run", "bundle", "--prompt", "a red circle", "--output", "x.png"]),
    main(["memory", "bundle", "--no-measure"]),
    main(["memory", "bundle", "--stage", "unet"]),
]
print(json.dumps(codes))
"""


def test_a_checkpoint_becomes_a_picture_without_what_windows_lacks(tmp_path: Path) -> None:
    """On this system, with those modules and functions taken away; the rest of another system is not to be had."""
    lean = lean_path(tmp_path / "lean", ["cpu"])
    done = run_lean(lean, ABROAD, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    *_, last = done.stdout.splitlines()
    codes = json.loads(last)
    assert codes[:4] == [0, 0, 0, 0], done.stderr
    assert '"peak_memory_bytes": null' in done.stdout
    assert codes[4] in (0, 4)


def setuptools_reads_it() -> bool:
    try:
        return Version(distribution("setuptools").version) >= Version("77")
    except PackageNotFoundError:
        return False


@pytest.mark.skipif(not setuptools_reads_it(), reason="no setuptools here that reads this pyproject.toml")
def test_a_wheel_holds_the_package_and_its_data(tmp_path: Path) -> None:
    build = f"from setuptools import build_meta; print(build_meta.build_wheel({str(tmp_path)!r}))"
    copy = subprocess.run([GIT, "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    tree = tmp_path / "tree"
    for name in (n.decode() for n in copy if n and not n.startswith((b"tests/", b"docs/", b"bench/results/"))):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).symlink_to(ROOT / name)
    done = subprocess.run([sys.executable, "-c", build], cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"fewstep"}
    for needed in ("py.typed", "presets.json", "serving/live/page/page.html", "export/fused/__init__.py"):
        assert f"fewstep/{needed}" in names
    metadata = next(n for n in names if n.endswith("METADATA"))
    text = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).read(metadata).decode()
    assert "Author: The fewstep authors" in text
    assert "License-Expression: Apache-2.0" in text
