"""ONNX Runtime's engine: bindings that stay, threads that share, requests that are refused in words."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from fewstep.bundle import Bundle
from fewstep.engines import Engine, RunOptions, TensorSpec
from fewstep.engines.backends.ort import (
    ALIGNMENT,
    OrtEngine,
    aligned_array,
    check_provider,
    import_onnxruntime,
    session_options,
)
from fewstep.engines.backends.ort_cuda import CUDA
from fewstep.errors import ArgumentError, CorruptError, MismatchError, MissingExtraError, UnsupportedError
from small_bundle import SPECS, example

DIMS = {"rows": 2, "height": 6, "width": 8, "tokens": 77, "batch": 1, "prompts": 3}


def engine_of(bundle: Bundle, component: str, **options: object) -> OrtEngine:
    part = bundle.component(component)
    run = RunOptions(threads=1, **options)  # type: ignore[arg-type]
    return OrtEngine.from_onnx(bundle.path(part.graph), inputs=part.inputs, outputs=part.outputs, run=run)


def plain(bundle: Bundle, component: str, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The graph in a session that nobody configured."""
    session = onnxruntime.InferenceSession(str(bundle.path(f"{component}.onnx")), providers=["CPUExecutionProvider"])
    return list(session.run([s.name for s in SPECS[component][1]], inputs))


@pytest.mark.parametrize("component", list(SPECS))
def test_outputs_are_those_of_a_plain_session(bundle: Bundle, component: str) -> None:
    engine = engine_of(bundle, component)
    binding, inputs = engine.bind(DIMS), example(component, DIMS)
    for name, value in inputs.items():
        binding.inputs[name][...] = value
    binding.enqueue()
    for found, expected in zip(binding.outputs.values(), plain(bundle, component, inputs), strict=True):
        assert found.shape == expected.shape
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(found.astype(float), expected.astype(float), rtol=1e-5, atol=1e-5)


def test_an_engine_says_what_it_is(bundle: Bundle) -> None:
    engine = engine_of(bundle, "unet")
    assert isinstance(engine, Engine)
    assert (engine.backend, engine.device, engine.capture) == ("ort-cpu", "cpu", "none")
    assert engine.providers == ("CPUExecutionProvider",)
    assert list(engine.inputs) == ["sample", "timestep", "encoder_hidden_states"]


def test_buffers_never_move_and_are_aligned(bundle: Bundle) -> None:
    binding = engine_of(bundle, "unet").bind(DIMS)
    arrays = [*binding.inputs.values(), *binding.outputs.values()]
    before = [a.ctypes.data for a in arrays]
    results = []
    for seed in range(3):
        for name, value in example("unet", DIMS, seed).items():
            binding.inputs[name][...] = value
        binding.enqueue()
        results.append(binding.outputs["out"].copy())
    assert [a.ctypes.data for a in (*binding.inputs.values(), *binding.outputs.values())] == before
    assert all(address % ALIGNMENT == 0 for address in before)
    assert not np.array_equal(results[0], results[1])


def test_one_engine_serves_many_sizes(bundle: Bundle) -> None:
    engine = engine_of(bundle, "unet")
    for rows, height, width, tokens in ((1, 4, 4, 77), (3, 8, 6, 154), (2, 16, 16, 77)):
        dims = {"rows": rows, "height": height, "width": width, "tokens": tokens}
        binding, inputs = engine.bind(dims), example("unet", dims)
        for name, value in inputs.items():
            binding.inputs[name][...] = value
        binding.enqueue()
        np.testing.assert_allclose(binding.outputs["out"], plain(bundle, "unet", inputs)[0], rtol=1e-4, atol=1e-5)


def test_threads_share_an_engine_each_with_its_binding(bundle: Bundle) -> None:
    engine = engine_of(bundle, "unet")
    expected = [plain(bundle, "unet", example("unet", DIMS, seed))[0] for seed in range(6)]

    def work(seed: int) -> bool:
        binding = engine.bind(DIMS)
        for name, value in example("unet", DIMS, seed).items():
            binding.inputs[name][...] = value
        for _ in range(20):
            binding.enqueue()
            if not np.allclose(binding.outputs["out"], expected[seed], rtol=1e-4, atol=1e-5):
                return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(6)))


def test_two_threads_on_one_binding_are_refused(bundle: Bundle) -> None:
    dims = {**DIMS, "rows": 4, "height": 64, "width": 64}
    binding = engine_of(bundle, "unet").bind(dims)
    refused, stop = threading.Event(), threading.Event()

    def work() -> None:
        while not stop.is_set():
            try:
                binding.enqueue()
            except ArgumentError:
                refused.set()
                stop.set()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    refused.wait(20)
    stop.set()
    for thread in threads:
        thread.join()
    assert refused.is_set()


@pytest.mark.parametrize(("spinning", "entries"), [("run", "11"), ("always", "10"), ("off", "00")])
def test_threads_wait_busily_as_asked(spinning: str, entries: str) -> None:
    """Whether they spin at all, and whether they stop when a run ends."""
    options = session_options(onnxruntime, RunOptions(spinning=spinning), "disabled")
    keys = ("session.intra_op.allow_spinning", "session.force_spinning_stop")
    assert "".join(map(options.get_session_config_entry, keys)) == entries


@pytest.mark.parametrize(
    ("threads", "places"), [(0, ""), (1, ""), (2, ""), (3, "5;8")], ids=["default", "one", "some", "all"]
)
def test_threads_have_places_of_their_own_where_every_processor_gets_one(
    monkeypatch: pytest.MonkeyPatch, threads: int, places: str
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {7, 1, 4}, raising=False)
    options = session_options(onnxruntime, RunOptions(threads=threads), "disabled")
    assert options.intra_op_num_threads == threads
    key = "session.intra_op_thread_affinities"
    if places:
        assert options.get_session_config_entry(key) == places
    else:
        with pytest.raises(RuntimeError, match=key):
            options.get_session_config_entry(key)


def test_a_cuda_stream_on_the_cpu_is_refused(bundle: Bundle) -> None:
    with pytest.raises(ArgumentError, match="CUDA stream"):
        engine_of(bundle, "unet").bind(DIMS).enqueue(stream=7)


@pytest.mark.parametrize(
    ("dims", "words"), [({}, "no size is given"), ({**DIMS, "rows": 0}, "rows"), ({**DIMS, "rows": -1}, "rows")]
)
def test_impossible_dimensions_are_refused(bundle: Bundle, dims: dict[str, int], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        engine_of(bundle, "unet").bind(dims)


def test_cuda_that_silently_became_the_cpu_is_an_error(bundle: Bundle) -> None:
    session = onnxruntime.InferenceSession(str(bundle.path("unet.onnx")), providers=["CPUExecutionProvider"])
    with pytest.raises(MismatchError, match="runs the model on CPUExecutionProvider"):
        check_provider(session, CUDA)


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="the wheel has CUDA")
def test_cuda_without_its_wheel_names_the_extra() -> None:
    with pytest.raises(MissingExtraError, match=r"fewstep\[cuda\]"):
        import_onnxruntime(CUDA)


def test_a_graph_that_is_not_the_manifests_is_refused(bundle: Bundle) -> None:
    part = bundle.component("unet")
    wrong = (*part.inputs[:2], replace(part.inputs[2], name="context"))
    with pytest.raises(MismatchError, match="'context' of the model is absent"):
        OrtEngine.from_onnx(bundle.path(part.graph), inputs=wrong, outputs=part.outputs)
    narrow = (TensorSpec(name="out", dtype="float16", shape=part.outputs[0].shape),)
    with pytest.raises(MismatchError, match="float16 with 4 dimensions"):
        OrtEngine.from_onnx(bundle.path(part.graph), inputs=part.inputs, outputs=narrow)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x0a" * 50], ids=["empty", "text", "no graph"])
def test_a_file_that_is_no_model_is_refused(bundle: Bundle, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "unet.onnx"
    path.write_bytes(content)
    part = bundle.component("unet")
    with pytest.raises(CorruptError, match="refuses the model") as caught:
        OrtEngine.from_onnx(path, inputs=part.inputs, outputs=part.outputs)
    assert str(tmp_path) not in str(caught.value)


def test_bfloat16_has_no_numpy_buffer() -> None:
    with pytest.raises(UnsupportedError, match="bfloat16"):
        aligned_array((2, 2), "bfloat16")
