"""Every engine and binding is held to one protocol, and every backend's record to another."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fewstep.bundle import Bundle, TensorSpec
from fewstep.engines import BuildOptions, Engine, RunOptions, backend_names
from fewstep.engines.backends.ort import OrtEngine
from fewstep.engines.backends.registry import (
    Backend,
    device_of,
    load_backend,
    makes_in_memory,
    measured_backends,
    plain_backend,
    registered,
    registered_backend,
)
from fewstep.engines.base import Binding
from fewstep.engines.options import relevant
from fewstep.engines.parallel import ParallelEngine
from fewstep.errors import ArgumentError, FewstepError, MissingError
from fewstep.export.torch_engine import open_torch_engine
from fewstep.runtime.device.host_engine import HostEngine, HostLane
from torch import device

DIMS = {"rows": 3, "height": 8, "width": 8, "tokens": 77}


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    from fewstep.export.embedded import embedded_bundle

    return embedded_bundle("student")[0]


def ort(bundle: Bundle) -> Engine:
    part = bundle.component("unet")
    return OrtEngine.from_onnx(bundle.path(part.graph), inputs=part.inputs, outputs=part.outputs)


def parallel(bundle: Bundle) -> Engine:
    return ParallelEngine(ort(bundle), ways=2)


def torch(bundle: Bundle) -> Engine:
    return open_torch_engine(bundle, "unet", RunOptions())


def host(bundle: Bundle) -> Engine:
    return HostEngine(ort(bundle), HostLane(device("cpu"), records=True))


@pytest.fixture(scope="module", params=[ort, parallel, torch, host], ids=lambda make: make.__name__)
def engine(request: pytest.FixtureRequest, bundle: Bundle) -> Engine:
    make: Callable[[Bundle], Engine] = request.param
    return make(bundle)


def words(protocol: type) -> set[str]:
    return {n for n in vars(protocol) if not n.startswith("_")}


def fill(binding: Binding) -> None:
    draw = np.random.default_rng(1)
    for value in binding.inputs.values():
        value[...] = draw.standard_normal(value.shape)


def test_what_had_a_backends_name_has_it_again() -> None:
    before = registered("torch")
    with registered_backend("torch", lambda bundle, component, run: None):  # type: ignore[arg-type, return-value]
        assert registered("torch") is not before
    assert registered("torch") is before


def test_engines_and_bindings_have_every_word(engine: Engine, bundle: Bundle) -> None:
    assert isinstance(engine, Engine)
    binding = engine.bind(DIMS)
    assert words(Engine) <= set(dir(engine))
    assert words(Binding) <= set(dir(binding))
    assert list(inspect.signature(binding.enqueue).parameters) == ["stream"]
    assert list(inspect.signature(engine.bind).parameters) == ["dims"]
    assert engine.backend in backend_names()
    assert engine.device in {"cpu", "cuda"}
    assert engine.capture in {"whole_request", "own_graph", "none"}
    part = bundle.component("unet")
    assert dict(engine.inputs) == {s.name: s for s in part.inputs}
    assert dict(engine.outputs) == {s.name: s for s in part.outputs}
    assert all(isinstance(s, TensorSpec) for s in engine.inputs.values())


def test_buffers_stay_where_they_are_and_agree(engine: Engine, bundle: Bundle) -> None:
    """What any implementation computes from its buffers is what ONNX Runtime does; a second binding is another."""
    binding, other, expected = engine.bind(DIMS), engine.bind(DIMS), ort(bundle).bind(DIMS)
    places = {n: a.ctypes.data for n, a in (*binding.inputs.items(), *binding.outputs.items())}
    for one in (binding, expected):
        fill(one)
        one.enqueue()
    np.testing.assert_allclose(binding.outputs["out"], expected.outputs["out"], atol=2e-5)
    first = binding.outputs["out"].copy()
    fill(other)
    other.inputs["sample"][...] *= 2.0
    other.enqueue()
    np.testing.assert_array_equal(binding.outputs["out"], first)
    binding.enqueue()
    assert places == {n: a.ctypes.data for n, a in (*binding.inputs.items(), *binding.outputs.items())}


def test_wrong_uses_are_typed_errors(engine: Engine) -> None:
    for dims in ({}, {**DIMS, "rows": 0}, {"rows": 1, "height": 8, "width": 8}):
        with pytest.raises((FewstepError, KeyError)) as error:
            engine.bind(dims)
        assert isinstance(error.value, FewstepError), f"{dims}: {error.value!r}"
    if engine.device == "cpu":
        with pytest.raises(ArgumentError, match="CUDA stream"):
            engine.bind(DIMS).enqueue(stream=7)


@pytest.mark.parametrize("name", [n for n in backend_names() if not makes_in_memory(n)])
def test_records_say_what_the_rest_asks(name: str) -> None:
    backend: Any = load_backend(name)
    assert isinstance(backend, Backend)
    assert not inspect.isabstract(type(backend))
    assert (backend.name, device_of(name)) == (name, backend.device)
    assert backend.device in {"cpu", "cuda"}
    assert backend.suffix.isalnum()
    assert set(backend.heeds) <= set(BuildOptions().to_json())
    assert relevant(BuildOptions(), backend.heeds).keys() == set(backend.heeds)
    assert isinstance(backend.available(), bool)
    assert backend.memory(1 << 30) >= 1 << 30
    for method in ("version", "available", "target", "memory", "build", "open", "suits"):
        ours, theirs = (inspect.signature(getattr(c, method)) for c in (type(backend), Backend))
        assert list(ours.parameters) == list(theirs.parameters), method
    assert backend.rank is None or backend.device == "cuda", "on a machine without a GPU nothing ranks"


def test_what_auto_may_choose_keeps_the_precision() -> None:
    assert plain_backend() in measured_backends()
    assert all(b.computes is None and b.device == "cpu" for b in measured_backends())
    ranks = [b.rank for n in backend_names() if not makes_in_memory(n) and (b := load_backend(n)).rank is not None]
    assert len(ranks) == len(set(ranks))
    for name in filter(makes_in_memory, backend_names()):
        with pytest.raises(MissingError, match="makes no engine files"):
            load_backend(name)


def test_a_backend_is_a_file_of_its_own() -> None:
    """No record is made outside the backends' room, and each file there that registers one is imported there."""
    import fewstep.engines.backends as room

    folder = Path(room.__file__).parent
    files = {p.stem for p in folder.glob("*.py") if "\nregister" in p.read_text(encoding="utf-8")}
    assert files == {"ort_cpu", "openvino", "ort_cuda", "tensorrt_build", "torch"}
    assert all(f" {name}" in (folder / "__init__.py").read_text(encoding="utf-8") for name in files)
