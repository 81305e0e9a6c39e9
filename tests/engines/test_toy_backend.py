"""A backend is a file: one that fewstep has never heard of is added here, builds, stores, opens, runs, and goes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import fewstep
import numpy as np
import pytest
from commandline import call
from fewstep.bundle import Bundle, TensorSpec
from fewstep.engines import (
    BuildOptions,
    Engine,
    RunOptions,
    Store,
    backend_names,
    build_engines,
    choose_backend,
    open_engine,
)
from fewstep.engines.backends.ort import OrtEngine
from fewstep.engines.backends.registry import Backend, BuildJob, OpenJob, register, unregister
from fewstep.engines.gate.verify import engines_here, verify_bundle
from fewstep.engines.inventory import list_engines
from fewstep.engines.measured import choose_measured
from fewstep.errors import ArgumentError, MismatchError, UnknownNameError


class Toy(Backend):
    """Keeps the graph as it is and has ONNX Runtime run it, unoptimised, from the bundle's own weights."""

    name, suffix, heeds = "toy", "toy", ("optimization",)
    release = "1"

    def version(self) -> str:
        return self.release

    def available(self) -> bool:
        return True

    def target(self, options: BuildOptions | None) -> tuple[str, str]:
        return "a toy", "none"

    def memory(self, job_bytes: int) -> int:
        return job_bytes

    def build(self, job: BuildJob) -> Mapping[str, Any]:
        job.target.write_bytes(job.bundle.path(job.component.graph).read_bytes())
        return {"toys": 1}

    def open(self, job: OpenJob) -> Engine:
        graph = Path(job.bundle.folder) / job.component.graph
        assert bytes(job.data) == graph.read_bytes()
        part = job.component
        return ToyEngine(OrtEngine.from_onnx(graph, inputs=part.inputs, outputs=part.outputs, optimization="disabled"))


class ToyEngine:
    backend, device, capture = "toy", "cpu", "none"

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.inputs: Mapping[str, TensorSpec] = engine.inputs
        self.outputs: Mapping[str, TensorSpec] = engine.outputs
        self.bind = engine.bind


@pytest.fixture(autouse=True)
def toy() -> Iterator[Toy]:
    register(backend := Toy())
    yield backend
    unregister("toy")


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    from fewstep.export.embedded import embedded_bundle

    return embedded_bundle("student")[0]


def test_it_makes_pictures(bundle: Bundle, tmp_path: Path) -> None:
    store = Store(tmp_path)
    pipe = fewstep.load(bundle, backend="toy", store=store)
    assert {e.backend for e in pipe.engines.values()} == {"toy"}
    expected = fewstep.load(bundle, backend="ort-cpu")("a star", seed=1).images
    assert np.abs(pipe("a star", seed=1).images.astype(int) - expected).max() <= 1
    assert {e.key.backend for e in store.entries()} == {"toy"}
    with fewstep.Server(pipe, most_slots=2, most_rows=2) as server:
        assert np.abs(server.generate("a star", seed=1).images.astype(int) - expected).max() <= 1


def test_its_engines_have_keys_facts_and_a_gate(bundle: Bundle, tmp_path: Path, toy: Toy) -> None:
    store = Store(tmp_path)
    built = build_engines(bundle, backend="toy", components=["unet"], store=store)["unet"]
    assert (built.entry.key.device, built.entry.key.backend_version, built.entry.facts["toys"]) == ("a toy", "1", 1)
    assert built.entry.gate["passed"]
    assert build_engines(bundle, backend="toy", components=["unet"], store=store)["unet"].reused
    toy.release = "2"
    with pytest.raises(MismatchError, match=r"backend version 1 \(expected 2\)"):
        open_engine(bundle, "unet", backend="toy", store=store, build="never", run=RunOptions())
    with pytest.raises(ArgumentError, match="float16 means nothing to this backend"):
        build_engines(bundle, backend="toy", store=store, options=BuildOptions(float16=True))


def test_the_command_line_offers_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert "toy" in backend_names()
    code, out, _ = call(capsys, "build", "student", "--backend", "toy", "--json")
    assert (code, '"toy"' in out) == (0, True)
    unregister("toy")
    code, _, errors = call(capsys, "build", "student", "--backend", "toy")
    assert (code, "toy" in errors) == (2, True)
    with pytest.raises(UnknownNameError, match="unknown backend 'toy'"):
        choose_backend("toy")


def test_engines_of_a_backend_that_is_not_here_are_passed_over(bundle: Bundle, tmp_path: Path) -> None:
    store = Store(tmp_path)
    build_engines(bundle, backend="toy", components=["unet"], store=store)
    build_engines(bundle, backend="ort-cpu", components=["unet"], store=store)
    assert {e.key.backend for e in engines_here(bundle, "unet", store)} == {"toy", "ort-cpu"}
    unregister("toy")
    assert {e.key.backend for e in engines_here(bundle, "unet", store)} == {"ort-cpu"}
    assert not any("toy" in r.subject for r in verify_bundle(bundle, store=store, components=["unet"]))
    assert {e.state for e in list_engines(store)} == {"ready", "other machine or version"}


def test_it_is_timed_against_the_cpus_and_not_chosen_once_it_failed(bundle: Bundle, tmp_path: Path, toy: Toy) -> None:
    toy.measured = True
    store = Store(tmp_path)
    assert choose_measured(bundle, "unet", store=store, build="never").reason == "nothing was measured"
    choice = choose_measured(bundle, "unet", store=store)
    assert choice.milliseconds.keys() == {"ort-cpu", "toy"}
    assert choose_measured(bundle, "unet", store=store, build="never") == choice
    entry = build_engines(bundle, backend="toy", components=["text_encoder"], store=store)["text_encoder"].entry
    store.record_gate(entry, {"passed": False, "reason": "it is a toy"})
    choice = choose_measured(bundle, "text_encoder", store=store)
    assert choice.backend == "ort-cpu"
    assert "toy cannot run it: the engine text_encoder.toy" in choice.reason
