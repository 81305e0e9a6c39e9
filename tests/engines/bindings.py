"""TensorRT's Python bindings as they can be read without a GPU, and without their libraries.

The wheels of TensorRT's bindings hold one extension module and none of the libraries that it is linked to. For reading
what it defines, three shared libraries that export the names it looks for are enough: nothing in them is ever called.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import fewstep

ROOT = Path(fewstep.__file__).parent
WHEELS = ROOT / "build" / "bindings"
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
SYMBOLS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bindings:
    """One library's bindings: stubs for mypy in `folder`, and how a process of its own can import the module."""

    name: str
    folder: Path
    module: str
    environment: dict[str, str]

    def check(self, *arguments: str) -> str:
        """What mypy finds against these stubs, the stubs' own shortcomings apart."""
        flags = ["--strict", "--disable-error-code", "no-untyped-call", "--disable-error-code", "unused-ignore"]
        flags += ["--follow-imports", "silent", "--ignore-missing-imports", "--config-file", os.devnull]
        command = [sys.executable, "-m", "mypy", *flags, "--cache-dir", str(self.folder / "cache"), *arguments]
        environment = {**os.environ, "MYPYPATH": str(self.folder)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=self.folder)
        assert done.returncode in (0, 1), done.stderr
        return "\n".join(line for line in done.stdout.splitlines() if "error:" in line and "_bindings" not in line)

    def missing(self, names: list[str]) -> list[str]:
        """Those of some dotted names that the module does not have."""
        code = (
            f"import sys, functools, {self.module} as module\n"
            "for name in sys.stdin.read().split():\n"
            "    try: functools.reduce(getattr, name.split('.'), module)\n"
            "    except AttributeError: print(name)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            input="\n".join(names),
            env=self.environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.split()


def installed_rtx(folder: Path) -> Bindings:
    """Those of the TensorRT-RTX that is installed here."""
    return _make(folder, "tensorrt-rtx", "tensorrt_rtx_bindings.tensorrt_rtx", "tensorrt_rtx", dict(os.environ))


def from_wheel(wheel: Path, folder: Path) -> Bindings:
    """Those in a wheel of `tensorrt_cu12_bindings` or `tensorrt_cu13_bindings`."""
    unpacked, libraries = folder / "wheel", folder / "libraries"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    libraries.mkdir()
    source = libraries / "names.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in SYMBOLS))
    major = wheel.name.split("-")[1].split(".")[0]
    compiler = shutil.which("cc") or "gcc"
    for name in LIBRARIES:
        target = libraries / f"lib{name}.so.{major}"
        subprocess.run([compiler, "-shared", "-fPIC", "-o", str(target), str(source)], check=True, capture_output=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries), "PYTHONPATH": str(unpacked)}
    return _make(folder, wheel.name.split("-cp")[0], "tensorrt_bindings.tensorrt", "tensorrt_bindings", environment)


def _make(folder: Path, name: str, extension: str, module: str, environment: dict[str, str]) -> Bindings:
    """Stubs of an extension module, with what it cannot say about itself put right, under either library's name."""
    command = [sys.executable, "-c", "from mypy.stubgen import main; main()", "--inspect-mode"]
    command += ["-m", extension, "-o", str(folder)]
    subprocess.run(command, check=True, capture_output=True, cwd=folder, env=environment)
    stub = folder.joinpath(*extension.split(".")).with_suffix(".pyi")
    text = stub.read_text()
    # The module's own `bool` hides Python's; tuples pass for Dims; an enumeration's name is text; the plan can
    # be read as a buffer.
    text = re.sub(r"^bool: .*\n", "", text, flags=re.M)
    text = re.sub(r"(\w+): Dims\b", r"\1: Dims | tuple[int, ...]", text)
    text = re.sub(r"def name\(self, \*args, \*\*kwargs\)[^\n]*", "name: str", text)
    text = re.sub(r"def add_scale_nd\(.*\) ->", "def add_scale_nd(self, *args, **kwargs) ->", text)
    text = re.sub(
        r"(class IHostMemory:\n)", r"\1    def __buffer__(self, flags: int, /) -> memoryview[int]: ...\n", text
    )
    stub.write_text(text)
    for alias in ("tensorrt_rtx", "tensorrt"):
        (folder / alias).mkdir()
        (folder / alias / "__init__.pyi").write_text(f"from {extension} import *\n")
    (folder / "fewstep").symlink_to(ROOT)
    return Bindings(name=name, folder=folder, module=module, environment=environment)
