"""The TensorRT code against the real bindings: stubs are made from their modules, and mypy checks every call.

So a call that does not exist is found without a GPU: against TensorRT-RTX where it is installed, and against every
wheel of TensorRT's bindings in `build/bindings` (`make bindings-check` fetches them).
"""

from __future__ import annotations

import ast
import shutil
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")

from bindings import ROOT, WHEELS, Bindings, from_wheel, installed_rtx

pytestmark = pytest.mark.slow  # make bindings-check runs it
FILES = tuple(f"fewstep.engines.backends.tensorrt{part}" for part in ("", "_build", "_refit"))
RTX_ALONE = {
    "BuilderFlag.REQUIRE_USER_ALLOCATION",
    "ComputeCapability",
    "CudaGraphStrategy",
    "CudaGraphStrategy.DISABLED",
    "CudaGraphStrategy.WHOLE_GRAPH_CAPTURE",
    "DynamicShapesKernelSpecializationStrategy",
    "DynamicShapesKernelSpecializationStrategy.EAGER",
    "EngineInvalidityDiagnostics",
    "EngineInvalidityDiagnostics.__members__",
    "EngineInvalidityDiagnostics.__members__.items",
    "EngineValidity",
    "EngineValidity.INVALID",
}
"""What the code reaches only when it runs TensorRT-RTX, or behind a `hasattr` that TensorRT does not pass."""
BY_VERSION = {
    "IAttentionInputLayer",  # since 10.14; `check_operators` refuses the graphs that need it
    "IStreamWriter",  # with `Builder.build_serialized_network_to_stream`, since 10.13
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED",  # until 10.16: 11 knows no other kind of network
}
"""What the code reaches behind a `hasattr`, because not every supported version has it."""


def _wheels() -> list[str]:
    return sorted(p.name for p in WHEELS.glob(f"tensorrt_cu*_bindings-*-cp3{sys.version_info.minor}-*linux*.whl"))


@pytest.fixture(scope="module", params=["tensorrt-rtx", *(_wheels() or ["tensorrt"])])
def bindings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bindings:
    folder = tmp_path_factory.mktemp("stubs")
    if request.param == "tensorrt-rtx":
        pytest.importorskip("tensorrt_rtx")
        return installed_rtx(folder)
    if request.param == "tensorrt":
        pytest.skip("no wheel of TensorRT's bindings lies in build/bindings: fetch them with `make bindings-check`")
    if shutil.which("cc") is None:
        pytest.skip("no C compiler is installed, and the bindings need libraries to be imported")
    return from_wheel(WHEELS / request.param, folder)


def module_names(path: Path) -> list[str]:
    """Every dotted name that a file takes from the library's module: `module.X`, `self._trt.X`, and through aliases."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    aliases = {"module": "", "self._trt": ""}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            dotted = _dotted(node.value)
            for root in ("module.", "self._trt."):
                if dotted.startswith(root):
                    aliases[node.targets[0].id] = dotted.removeprefix(root)
    found = set()
    for node in ast.walk(tree):
        dotted = _dotted(node)
        for alias, full in aliases.items():
            if dotted.startswith(f"{alias}."):
                found.add(f"{full}.{dotted.removeprefix(alias + '.')}".lstrip("."))
    return sorted(n for n in found if n != "__version__")


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        inner = _dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return node.id if isinstance(node, ast.Name) else ""


def test_every_call_exists_in_the_bindings(bindings: Bindings) -> None:
    assert bindings.check(*(part for name in FILES for part in ("-m", name))) == ""


def test_every_name_of_the_module_exists(bindings: Bindings) -> None:
    names = [n for f in FILES for n in module_names(ROOT / f"{f.partition('.')[2].replace('.', '/')}.py")]
    assert "Builder" in names
    assert "BuilderFlag.TF32" in names
    known = BY_VERSION | (set() if bindings.name == "tensorrt-rtx" else RTX_ALONE)
    assert set(bindings.missing(names)) <= known


def test_a_name_that_does_not_exist_is_found(bindings: Bindings) -> None:
    assert bindings.missing(["Builder", "BuilderFlag.FP4_MAGIC", "Bilder"]) == ["BuilderFlag.FP4_MAGIC", "Bilder"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("builder.create_networks(0)", 'has no attribute "create_networks"'),
        ("builder.create_network(0, 1, 2)", "Too many arguments"),
        ("config.set_timing_cache('cache')", "set_timing_cache"),
        ("config.fp17 = True", 'has no attribute "fp17"'),
        ("profile.set_shape('x', 1, 2, 3)", "incompatible type"),
    ],
)
def test_a_call_that_does_not_exist_is_found(bindings: Bindings, tmp_path: Path, line: str, words: str) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "import tensorrt_rtx as trt\n"
        "def use(builder: trt.Builder, config: trt.IBuilderConfig, profile: trt.IOptimizationProfile) -> None:\n"
        f"    {line}\n"
    )
    assert words in bindings.check(str(wrong))
