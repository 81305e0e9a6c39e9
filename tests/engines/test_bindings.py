"""The TensorRT code against the real bindings: stubs are made from the installed module, and mypy checks every call.

So a call that does not exist is found without a GPU, on any machine that has the module.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import fewstep
import pytest

pytest.importorskip("tensorrt_rtx")
pytest.importorskip("mypy")

ROOT = Path(fewstep.__file__).parent
FILES = ("fewstep.engines.tensorrt", "fewstep.engines.tensorrt_build")


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stubs of the bindings, with what the extension module cannot say about itself put right."""
    folder = tmp_path_factory.mktemp("stubs")
    command = [sys.executable, "-c", "from mypy.stubgen import main; main()", "--inspect-mode"]
    command += ["-m", "tensorrt_rtx_bindings.tensorrt_rtx", "-o", str(folder)]
    subprocess.run(command, check=True, capture_output=True, cwd=folder)
    stub = folder / "tensorrt_rtx_bindings" / "tensorrt_rtx.pyi"
    text = stub.read_text()
    # The module's own `bool` hides Python's; tuples pass for Dims; the plan can be read as a buffer.
    text = re.sub(r"^bool: .*\n", "", text, flags=re.M)
    text = re.sub(r"(\w+): Dims\b", r"\1: Dims | tuple[int, ...]", text)
    text = re.sub(r"def add_scale_nd\(.*\) ->", "def add_scale_nd(self, *args, **kwargs) ->", text)
    text = re.sub(
        r"(class IHostMemory:\n)", r"\1    def __buffer__(self, flags: int, /) -> memoryview[int]: ...\n", text
    )
    stub.write_text(text)
    (folder / "tensorrt_rtx").mkdir()
    (folder / "tensorrt_rtx" / "__init__.pyi").write_text("from tensorrt_rtx_bindings.tensorrt_rtx import *\n")
    (folder / "fewstep").symlink_to(ROOT)
    return folder


def check(stubs: Path, *arguments: str) -> str:
    """What mypy finds, the stubs' own shortcomings apart."""
    flags = [
        "--strict",
        "--disable-error-code",
        "no-untyped-call",
        "--follow-imports",
        "silent",
        "--ignore-missing-imports",
    ]
    command = [sys.executable, "-m", "mypy", *flags, "--config-file", os.devnull, "--cache-dir", str(stubs / "cache")]
    environment = {**os.environ, "MYPYPATH": str(stubs)}
    done = subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, check=False, cwd=stubs
    )
    assert done.returncode in (0, 1), done.stderr
    return "\n".join(line for line in done.stdout.splitlines() if "error:" in line and "_bindings" not in line)


def test_every_call_exists_in_the_bindings(stubs: Path) -> None:
    assert check(stubs, *(part for name in FILES for part in ("-m", name))) == ""


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("builder.create_networks(0)", 'has no attribute "create_networks"'),
        ("builder.create_network(0, 1, 2)", "Too many arguments"),
        ("config.set_timing_cache('cache')", "set_timing_cache"),
        ("config.fp16 = True", 'has no attribute "fp16"'),
        ("profile.set_shape('x', 1, 2, 3)", "incompatible type"),
    ],
)
def test_a_call_that_does_not_exist_is_found(stubs: Path, tmp_path: Path, line: str, words: str) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "import tensorrt_rtx as trt\n"
        "def use(builder: trt.Builder, config: trt.IBuilderConfig, profile: trt.IOptimizationProfile) -> None:\n"
        f"    {line}\n"
    )
    assert words in check(stubs, str(wrong))
