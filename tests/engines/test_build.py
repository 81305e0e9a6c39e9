"""Building and opening: what is reused, what is refused and in which words, and what opening must not load."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fewstep.bundle import Bundle, read_bundle
from fewstep.engines import (
    BuildOptions,
    Engine,
    RunOptions,
    Store,
    build_engines,
    choose_backend,
    open_engine,
    open_engines,
    register_in_memory,
    weights,
)
from fewstep.engines.backends import ort_build
from fewstep.engines.backends.registry import _in_memory
from fewstep.engines.gate.gate import compare, engine_function
from fewstep.engines.graph.float16 import convert_saved
from fewstep.engines.machine import available_memory
from fewstep.engines.plan import check_resources, plan_build
from fewstep.errors import (
    ArgumentError,
    CancelledError,
    CorruptError,
    MismatchError,
    MissingError,
    UnknownNameError,
    UnsupportedError,
)
from small_bundle import example, write_bundle

DIMS = {"rows": 2, "height": 12, "width": 16, "tokens": 77}


def run(engine: Engine, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    binding = engine.bind(DIMS)
    for name, value in inputs.items():
        binding.inputs[name][...] = value
    binding.enqueue()
    return np.array(binding.outputs["out"])


def test_a_built_engine_is_reused_and_force_makes_it_anew(bundle: Bundle, store: Store) -> None:
    first = build_engines(bundle, backend="ort-cpu", store=store)
    assert {n: b.reused for n, b in first.items()} == dict.fromkeys(bundle.components, False)
    again = build_engines(bundle, backend="ort-cpu", store=store)
    assert [(b.reused, b.reason) for b in again.values()] == [(True, "already built")] * 3
    anew = build_engines(bundle, backend="ort-cpu", components=["unet"], store=store, force=True)
    assert (anew["unet"].reused, anew["unet"].reason) == (False, "it was asked for anew")


def test_weights_that_the_optimiser_left_alone_are_not_copied(bundle: Bundle, store: Store) -> None:
    entry = build_engines(bundle, backend="ort-cpu", components=["text_encoder"], store=store)["text_encoder"].entry
    model = onnx.load_model_from_string(bytes(entry.read()))
    external = {i.name for i in model.graph.initializer if i.data_location == onnx.TensorProto.EXTERNAL}
    assert "embedding.weight" in external
    assert entry.length < bundle.path("text_encoder.safetensors").stat().st_size


@pytest.mark.parametrize("layout", ["shared and small", "shared and large", "beside"])
def test_an_opened_engine_computes_what_the_graph_computes(
    bundle: Bundle, store: Store, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if layout == "beside":
        monkeypatch.setattr(ort_build, "INLINE_BYTES", 0)
    if layout == "shared and large":
        monkeypatch.setattr(weights, "SMALL_BYTES", 0)
    monkeypatch.setattr(weights, "_SETTLED_NS", 0)
    built = build_engines(bundle, backend="ort-cpu", components=["unet"], store=store)["unet"].entry
    assert (built.data is not None) == (layout == "beside")
    inputs = example("unet", DIMS)
    part = bundle.component("unet")
    plain = ort_build.OrtEngine.from_onnx(bundle.path(part.graph), inputs=part.inputs, outputs=part.outputs)
    for _ in range(2):
        engine = open_engine(bundle, "unet", backend="ort-cpu", store=store, build="never")
        np.testing.assert_allclose(run(engine, inputs), run(plain, inputs), rtol=1e-4, atol=1e-5)
    assert len(list(store.root.glob(".checked.*.json"))) == (layout != "shared and small")


def test_weights_beside_an_engine_are_checked(bundle: Bundle, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_build, "INLINE_BYTES", 0)
    monkeypatch.setattr(weights, "_SETTLED_NS", 0)
    entry = build_engines(bundle, backend="ort-cpu", components=["unet"], store=store)["unet"].entry
    open_engine(bundle, "unet", backend="ort-cpu", store=store, build="never")
    assert entry.data is not None
    path = entry.folder / entry.data[0]
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptError, match="the weights of the engine"):
        open_engine(bundle, "unet", backend="ort-cpu", store=store, build="never")
    path.unlink()
    with pytest.raises(MissingError, match="has lost its file"):
        open_engine(bundle, "unet", backend="ort-cpu", store=store, build="never")


@pytest.mark.parametrize("small", [True, False])
def test_changed_weights_and_graphs_of_a_bundle_are_refused(
    tmp_path: Path, store: Store, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    if not small:
        monkeypatch.setattr(weights, "SMALL_BYTES", 0)
        monkeypatch.setattr(weights, "_SETTLED_NS", 0)
    build_engines(bundle, backend="ort-cpu", store=store)
    open_engine(bundle, "unet", backend="ort-cpu", store=store)
    for name in ("unet.safetensors", "unet.onnx"):
        path = bundle.path(name)
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(CorruptError, match=f"{name} in the bundle has SHA-256"):
            build_engines(bundle, backend="ort-cpu", components=["unet"], store=store, force=True)
        if name == "unet.safetensors":
            with pytest.raises(CorruptError, match="export the checkpoint again"):
                open_engine(bundle, "unet", backend="ort-cpu", store=store)
        path.write_bytes(content)


def test_a_missing_engine_names_the_command_that_makes_it(bundle: Bundle, store: Store) -> None:
    with pytest.raises(MissingError) as caught:
        open_engine(bundle, "unet", backend="ort-cpu", dims=DIMS, store=store, build="never")
    assert caught.value.exit_code == 3
    assert "no engine of 'unet' for ort-cpu is in the store" in caught.value.found
    assert "fewstep build small --backend ort-cpu --size 64x48 --batch 2" in caught.value.remedy
    assert isinstance(open_engine(bundle, "unet", backend="ort-cpu", dims=DIMS, store=store), Engine)
    open_engine(bundle, "unet", backend="ort-cpu", dims=DIMS, store=store, build="never")


CHANGED = {
    "backend_version": ("1.2.3", "backend version 1.2.3 (expected "),
    "graph_sha256": ("f" * 64, "graph ffffffffffff (expected "),
    "weights_sha256": ("f" * 64, "weights ffffffffffff (expected "),
    "dtype": ("float16", "precision float16 (expected float32)"),
    "system": ("plan9 mips", "operating system plan9 mips (expected "),
    "device": ("Another CPU", "device Another CPU (expected "),
    "capability": ("sse4_1", "compute capability or instruction set sse4_1 (expected "),
}


@pytest.mark.parametrize("field", list(CHANGED))
def test_a_mismatch_names_field_found_expected_and_command(bundle: Bundle, store: Store, field: str) -> None:
    """An engine of this bundle that was built elsewhere: put under its own key, as a copied store would hold it."""
    entry = build_engines(bundle, backend="ort-cpu", components=["unet"], store=store)["unet"].entry
    value, words = CHANGED[field]
    other = replace(entry.key, **{field: value})
    folder = store.entry_folder(other)
    entry.folder.rename(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "key": other.to_json()}))
    with pytest.raises(MismatchError) as caught:
        open_engine(bundle, "unet", backend="ort-cpu", store=store, build="never")
    assert caught.value.exit_code == 4
    assert words in caught.value.found
    assert "fewstep build small --backend ort-cpu" in caught.value.remedy
    open_engine(bundle, "unet", backend="ort-cpu", store=store)
    assert len(list(store.entries("unet"))) == 2


def test_options_are_part_of_the_key_and_foreign_ones_are_refused(bundle: Bundle, store: Store) -> None:
    basic = BuildOptions(optimization="basic")
    one = build_engines(bundle, backend="ort-cpu", components=["unet"], store=store, options=basic)["unet"]
    assert one.entry.key.options == {"optimization": "basic", "float16": False, "refittable": False}
    open_engine(bundle, "unet", backend="ort-cpu", store=store, build="never")
    with pytest.raises(MismatchError, match=r"build options optimization='basic' \(expected optimization='all'"):
        open_engine(bundle, "unet", backend="ort-cpu", store=store, build="never", options=BuildOptions())
    two = build_engines(bundle, backend="ort-cpu", components=["unet"], store=store)["unet"]
    assert two.entry.name != one.entry.name
    with pytest.raises(ArgumentError, match="workspace_bytes means nothing"):
        build_engines(bundle, backend="ort-cpu", store=store, options=BuildOptions(workspace_bytes=1 << 30))
    with pytest.raises(UnsupportedError, match="half precision on the CPU"):
        build_engines(bundle, backend="ort-cpu", store=store, options=BuildOptions(float16=True))


def test_bfloat16_on_the_cpu_is_refused_with_what_computes_it(bundle: Bundle, store: Store) -> None:
    components = {n: replace(c, dtype="bfloat16") for n, c in bundle.components.items()}
    with pytest.raises(UnsupportedError, match="Name --backend torch"):
        build_engines(replace(bundle, components=components), backend="ort-cpu", store=store)


@pytest.mark.parametrize("component", ["unet", "vae_decoder"])
def test_a_fused_graph_converted_to_half_precision_stays_close(
    bundle: Bundle, store: Store, component: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The conversion that ONNX Runtime on CUDA gets, run on the CPU, whose own fusions are kept out of it."""
    monkeypatch.setattr(ort_build, "INLINE_BYTES", 0)
    extended = BuildOptions(optimization="extended")
    entry = build_engines(bundle, backend="ort-cpu", components=[component], store=store, options=extended)[
        component
    ].entry
    assert entry.data is not None
    model, data = entry.path, entry.folder / entry.data[0]
    dims = {**DIMS, "batch": 1, "prompts": 1}
    inputs, part = example(component, dims), bundle.component(component)

    def outputs() -> dict[str, np.ndarray]:
        engine = ort_build.OrtEngine.from_onnx(model, inputs=part.inputs, outputs=part.outputs, optimization="disabled")
        return dict(engine_function(engine)(inputs, dims))

    before, size = outputs(), data.stat().st_size
    assert convert_saved(model, data) > 0
    assert data.stat().st_size < 0.7 * size
    for name, value in outputs().items():
        report = compare(value, before[name])
        assert report.rel_l2 < 5e-3
        assert report.rel_l2 > 0 or value.dtype == np.bool_


@pytest.mark.parametrize(
    "options", [{"optimization": "most"}, {"optimization_level": 9}, {"workspace_bytes": -1}, {"auxiliary_streams": -2}]
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(options))):
        BuildOptions(**options)


@pytest.mark.parametrize("options", [{"spinning": "yes"}, {"threads": -1}, {"device": -1}, {"graph_strategy": "most"}])
def test_run_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(options))):
        RunOptions(**options)


def test_a_cancelled_build_leaves_nothing(bundle: Bundle, store: Store) -> None:
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(CancelledError):
        build_engines(bundle, backend="ort-cpu", store=store, cancel=cancel)
    stages: list[str] = []

    def stop(component: str, stage: str, fraction: float) -> None:
        stages.append(f"{component} {stage} {fraction}")
        if stage == "optimising":
            cancel.set()

    cancel.clear()
    with pytest.raises(CancelledError, match="'text_encoder' was cancelled"):
        build_engines(bundle, backend="ort-cpu", store=store, cancel=cancel, progress=stop)
    assert "text_encoder optimising 0.0" in stages
    assert list(store.entries()) == []
    assert not [p for p in store.root.rglob("*") if p.suffix in {".part", ".onnx"}]


def test_backends_are_known_by_name(bundle: Bundle, store: Store) -> None:
    with pytest.raises(UnknownNameError, match="expected one like ort-cpu"):
        open_engine(bundle, "unet", backend="ort-cpuu", store=store)
    with pytest.raises(ArgumentError, match="build is 'maybe'"):
        open_engine(bundle, "unet", backend="ort-cpu", store=store, build="maybe")
    with pytest.raises(MissingError, match="no component 'vae_encoder'"):
        open_engine(bundle, "vae_encoder", backend="ort-cpu", store=store)
    with pytest.raises(MissingError, match="makes no engine files"):
        build_engines(bundle, backend="torch", store=store)
    with pytest.raises(UnknownNameError):
        register_in_memory("ort-cpu", lambda bundle, component, run: None)  # type: ignore[arg-type, return-value]


@pytest.mark.skipif(Path("/proc/driver/nvidia/version").exists(), reason="this machine has a GPU")
def test_without_a_gpu_auto_is_the_cpu_and_gpu_backends_say_why_not(bundle: Bundle, store: Store) -> None:
    assert choose_backend() == ("ort-cpu", "no NVIDIA driver is loaded")
    for backend in ("tensorrt-rtx", "ort-cuda", "tensorrt"):
        with pytest.raises(MissingError):
            open_engine(bundle, "unet", backend=backend, dims=DIMS, store=store)


def test_a_registered_backend_makes_its_engine_without_a_build(
    bundle: Bundle, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_in_memory, "torch", None)
    with pytest.raises(MissingError, match=r"fewstep\.export"):
        open_engine(bundle, "unet", backend="torch", store=store)
    made = open_engine(bundle, "unet", backend="ort-cpu", store=store)
    asked: list[tuple[str, RunOptions]] = []

    def factory(where: Bundle, component: str, run: RunOptions) -> Engine:
        asked.append((component, run))
        return made

    monkeypatch.setitem(_in_memory, "torch", made)  # so that what was there before comes back
    register_in_memory("torch", factory)
    options = RunOptions(threads=1)
    assert open_engine(bundle, "unet", backend="torch", run=options) is made
    assert asked == [("unet", options)]


def test_opening_loads_neither_torch_nor_onnx_and_is_fast(bundle: Bundle, store: Store) -> None:
    build_engines(bundle, backend="ort-cpu", store=store)
    script = (
        "import sys, time\n"
        "import fewstep.engines\n"
        "print(sorted({m.partition('.')[0] for m in sys.modules} & {'torch', 'onnx', 'onnxruntime', 'tensorrt_rtx'}))\n"
        "from pathlib import Path\n"
        "from fewstep.bundle import read_bundle\n"
        "import onnxruntime\n"
        "began = time.perf_counter()\n"
        "bundle = read_bundle(sys.argv[1])\n"
        "store = fewstep.engines.Store(Path(sys.argv[2]))\n"
        "names = list(bundle.components)\n"
        "found = fewstep.engines.open_engines(bundle, names, backend='ort-cpu', store=store, build='never')\n"
        "print(len(found), time.perf_counter() - began)\n"
        "print(sorted({m.partition('.')[0] for m in sys.modules} & {'torch', 'onnx', 'filelock'}))\n"
    )
    command = [sys.executable, "-c", script, str(bundle.folder), str(store.root)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    first, opened, last = done.stdout.splitlines()
    assert (first, last) == ("[]", "[]")
    count, seconds = opened.split()
    assert count == "3"
    assert float(seconds) < 1.0


def test_engines_open_side_by_side(bundle: Bundle, store: Store) -> None:
    found = open_engines(bundle, list(bundle.components), backend="ort-cpu", store=store)
    assert list(found) == list(bundle.components)
    assert all(isinstance(e, Engine) for e in found.values())


def test_a_plan_says_what_would_be_built_and_writes_nothing(bundle: Bundle, store: Store) -> None:
    planned = plan_build(bundle, backend="ort-cpu", store=store)
    assert [(p.exists, p.component) for p in planned] == [(False, c) for c in bundle.components]
    assert list(store.root.iterdir()) == []
    built = build_engines(bundle, backend="ort-cpu", components=["unet"], store=store)["unet"]
    again = {p.component: p for p in plan_build(bundle, backend="ort-cpu", store=store)}
    assert again["unet"].exists
    assert again["unet"].name == built.entry.name
    assert again["unet"].length == built.entry.length
    assert again["vae_decoder"].reason.startswith("none is stored; ort-cpu")
    assert json.loads(json.dumps(again["unet"].to_json()))["reason"] == "already built"
    assert not plan_build(bundle, backend="ort-cpu", store=store, components=["unet"], force=True)[0].exists


def test_too_little_memory_or_disk_is_said_before_the_build(bundle: Bundle, store: Store) -> None:
    (one,) = plan_build(bundle, backend="ort-cpu", components=["unet"], store=store)
    check_resources([one], store.root)
    with pytest.raises(MissingError, match=r"GB of memory are free.*to build 'unet'"):
        check_resources([replace(one, memory=1 << 60)], store.root)
    with pytest.raises(MissingError, match=r"GB of disk are free.*engines prune"):
        check_resources([replace(one, length=1 << 60)], store.root)
    check_resources([replace(one, memory=1 << 60, exists=True)], store.root)
    found = available_memory()
    assert found is None or found > 0


KILLED = """
import sys
from pathlib import Path
from fewstep.bundle import read_bundle
from fewstep.engines import Store, build_engines
bundle, store = read_bundle(sys.argv[1]), Store(Path(sys.argv[2]))
print("ready", flush=True)
while True:
    build_engines(bundle, backend="ort-cpu", components=["unet", "vae_decoder"], store=store, force=True)
    print("built", flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_killed_at_random_moments_it_leaves_a_whole_engine_or_none(bundle: Bundle, store: Store) -> None:
    """A process that builds without end is killed, again and again; what is stored then loads, and no lock is held."""
    moments = np.random.default_rng(4).uniform(0.0, 0.12, 12)
    inputs, expected, alive = example("unet", DIMS), None, 0
    command = [sys.executable, "-c", KILLED, str(bundle.folder), str(store.root)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for moment in moments:
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(moment)
            process.send_signal(signal.SIGKILL)
        for entry in store.entries():
            assert entry.read()
            alive += 1
        engine = open_engine(read_bundle(bundle.folder), "unet", backend="ort-cpu", store=store)
        found = run(engine, inputs)
        expected = found if expected is None else expected
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert alive
    build_engines(bundle, backend="ort-cpu", components=["unet", "vae_decoder"], store=store, force=True)
    assert not list(store.root.rglob("*.part"))
