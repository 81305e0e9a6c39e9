"""What no file of this project does: unpickle, run text as code, start a shell, or give a file a second name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = (
    "families",
    "weights",
    "schedules",
    "engines",
    "runtime",
    "serving",
    "export",
    "commands",
    "bench",
    "tools",
    "examples",
)
FILES = [*sorted(ROOT.glob("*.py")), *(p for r in ROOMS for p in sorted((ROOT / r).rglob("*.py")))]
UNPICKLING = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "pickletools"}
"""Modules that make objects of bytes, with whatever code the bytes name."""
SHELLS = {
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "asyncio.create_subprocess_shell",
}
LINKS = {"os.link", "link_to", "hardlink_to"}
"""Calls that give a file a second name: `onnx.load` refuses weights that have two."""
CODE = {"eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec", "runpy.run_path", "code.interact"}
LOADERS = {"torch.load", "yaml.load", "yaml.unsafe_load", "torch.hub.load"}
"""Calls that unpickle; torch's does not where it is told that there are weights alone."""
REMOTE = {"trust_remote_code", "allow_pickle"}
"""Arguments with which a library would run code of a checkpoint's."""


def dangers(text: str) -> Iterator[tuple[int, str]]:
    """The line and the words of everything in a source that must not be there."""
    tree = ast.parse(text)
    names = _names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for module in _modules(node):
                if module.partition(".")[0] in UNPICKLING:
                    yield node.lineno, f"imports {module}"
        elif isinstance(node, ast.Call):
            called = _called(node.func, names)
            if called == "torch.load" and _says(node, "weights_only", value=True):
                continue
            last = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            if last in LINKS or called in SHELLS | CODE | LOADERS | LINKS or called.partition(".")[0] in UNPICKLING:
                yield node.lineno, f"calls {called}"
            for keyword in node.keywords:
                if keyword.arg in {"shell", *REMOTE} and not _says(node, keyword.arg, value=False):
                    yield node.lineno, f"passes {keyword.arg}="


def _says(call: ast.Call, argument: str, *, value: bool) -> bool:
    """Whether a call passes this argument with this very value, readable in the source."""
    return any(
        k.arg == argument and isinstance(k.value, ast.Constant) and k.value.value is value for k in call.keywords
    )


def _names(tree: ast.AST) -> dict[str, str]:
    """What each imported name stands for, so that an alias hides nothing."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.asname: a.name for a in node.names if a.asname}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return found


def _modules(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [a.name for a in node.names]
    return [] if node.level else [node.module or ""]


def _called(function: ast.expr, names: dict[str, str]) -> str:
    """The dotted name that is called, with aliases resolved; empty for what is no name."""
    parts: list[str] = []
    while isinstance(function, ast.Attribute):
        parts.insert(0, function.attr)
        function = function.value
    if not isinstance(function, ast.Name):
        return ""
    return ".".join([names.get(function.id, function.id), *parts])


def test_no_file_unpickles_evaluates_starts_a_shell_or_links() -> None:
    assert len(FILES) > 250
    found = [
        f"{path.relative_to(ROOT)}:{line} {words}"
        for path in FILES
        for line, words in dangers(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


BAD = """
import pickle
import pickle as quiet
from pickle import loads
from _pickle import Unpickler
import marshal, json
def f(): import dill.source
from subprocess import getoutput as ask; ask("ls")
import os as system; system.system("ls")
import subprocess; subprocess.run("ls", shell=True)
import subprocess as s; s.Popen("ls", shell=bool(1))
subprocess.run(["ls"], **{}, shell=flag)
eval("1")
exec("x = 1")
compile("1", "x", "eval")
__import__("os")
from builtins import exec as run; run("1")
import torch as t; t.load("x.pt")
import torch; torch.load("x.pt", weights_only=flag)
x = load(name, allow_pickle=True)
model = AutoModel.from_pretrained(name, trust_remote_code=True)
asyncio.create_subprocess_shell("ls")
import os as o; o.link("a", "b")
from os import link as share; share("a", "b")
Path("b").hardlink_to("a")
"""
GOOD = """
import json, subprocess, re
subprocess.run(["ls"], shell=False)
model.eval()
import torch; torch.load("x.pt", weights_only=True)
pattern = re.compile("x")
from .pickle import not_the_module
program = compile_program("euler")
pipe = fewstep.load("bundle")
AutoModel.from_pretrained(name, trust_remote_code=False)
text = "pickle.loads(eval(exec))"
"""


@pytest.mark.parametrize("line", [n for n in BAD.splitlines() if n])
def test_each_way_to_do_it_is_noticed(line: str) -> None:
    assert list(dangers(line)), line


def test_what_only_looks_like_it_is_not() -> None:
    assert list(dangers(GOOD)) == []


def test_no_check_is_an_assert() -> None:
    """They vanish under `python -O`; pytest's own are in tests alone, and in benchmarks that are run by hand."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in FILES
        if not path.name.startswith("gpu_")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assert) or (isinstance(node, ast.Name) and node.id == "__debug__")
    ]
    assert not found, "\n".join(found)
