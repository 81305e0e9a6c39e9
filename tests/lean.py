"""Installations with some extras alone: what they bring lies in a folder of links, and Python sees nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
RUNNER = """
import contextlib, io, json, sys, traceback
from fewstep.cli import main
outcomes = []
for command in json.load(sys.stdin):
    out, err, code = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(command)
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            traceback.print_exc()
    outcomes.append({"code": code, "out": out.getvalue(), "err": err.getvalue()})
json.dump(outcomes, sys.stdout)
"""


def declared(extras: Iterable[str]) -> list[Requirement]:
    """What fewstep itself asks for, and for these extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *(project["optional-dependencies"][e] for e in extras)]
    return [Requirement(r) for of in lists for r in of]


def installed(extras: Iterable[str]) -> dict[str, Distribution]:
    """The distributions that these extras bring, by name; `PackageNotFoundError` where one is not installed here."""
    found: dict[str, Distribution] = {}
    waiting = declared(extras)
    while waiting:
        asked = waiting.pop()
        name = canonicalize_name(asked.name)
        if name in found or (asked.marker is not None and not asked.marker.evaluate({"extra": ""})):
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            if asked in declared(extras):
                raise
            continue
        waiting += [Requirement(r) for r in found[name].requires or ()]
    return found


def lean_path(folder: Path, extras: Sequence[str]) -> Path:
    """A folder for `PYTHONPATH` with fewstep and what these extras bring."""
    folder.mkdir(parents=True)
    (folder / "fewstep").symlink_to(ROOT)
    for found in installed(extras).values():
        tops = {f.parts[0] for f in found.files or () if f.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            target = Path(str(found.locate_file(top)))
            if target.exists() and not (folder / top).exists():
                (folder / top).symlink_to(target)
    return folder


def run_lean(path: Path, script: str, *, cwd: Path, given: str = "") -> subprocess.CompletedProcess[str]:
    """A script where Python sees the folder and its own library, and nothing that is installed."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {"PYTHONPATH": str(path)}
    return subprocess.run(
        [sys.executable, "-S", "-c", script],
        cwd=cwd,
        env=environment,
        input=given,
        capture_output=True,
        text=True,
        check=False,
    )


def commands_run(path: Path, commands: Sequence[Sequence[str]], *, cwd: Path) -> list[dict[str, Any]]:
    """Commands of `fewstep` one after the other: each with its exit code (`None`: an error escaped), out and err."""
    done = run_lean(path, RUNNER, cwd=cwd, given=json.dumps([list(c) for c in commands]))
    assert done.returncode == 0, done.stderr
    outcomes: list[dict[str, Any]] = json.loads(done.stdout)
    return outcomes
