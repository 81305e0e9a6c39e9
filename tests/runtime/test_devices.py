"""Pipelines on a device and on several: the device's code on CPU tensors against the NumPy pipeline."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fewstep
import numpy as np
import pytest
import torch
from device_models import psnr
from fewstep.bundle import Bundle
from fewstep.engines import RunOptions
from fewstep.engines.memory import largest_batch, predicted_peak
from fewstep.errors import ArgumentError, CancelledError, MismatchError, MissingError, OutOfMemoryError
from fewstep.export.torch_engine import open_torch_engine
from fewstep.runtime.device.base import check_engine
from fewstep.runtime.device.host_engine import HostEngine, HostLane
from fewstep.runtime.device.memory import guard_memory, out_of_memory
from fewstep.runtime.device.numpy_slots import NumpyDevice
from fewstep.runtime.device.torch_device import TorchDevice
from fewstep.runtime.group import PipelineGroup

CALL: dict[str, Any] = {"steps": 3, "guidance": 3.0, "sampler": "dpmpp_2m", "seed": [4, 9, 2]}


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    from fewstep.export.embedded import embedded_bundle

    return embedded_bundle("base")[0]


@pytest.fixture(scope="module")
def pipe(bundle: Bundle) -> fewstep.Pipeline:
    return fewstep.load(bundle, backend="ort-cpu")


@pytest.fixture(scope="module")
def captured(bundle: Bundle) -> fewstep.Pipeline:
    import fewstep.export  # registers the torch backend

    return fewstep.load(bundle, backend="torch", device="cpu:torch", graphs=True)


@pytest.mark.parametrize("mode", ["latency", "shared"])
def test_the_devices_pictures_are_those_of_the_numpy_device(bundle: Bundle, pipe: Any, mode: str) -> None:
    device = fewstep.load(bundle, backend="ort-cpu", device="cpu:torch", mode=mode)
    expected, found = pipe("a red circle", **CALL), device("a red circle", **CALL)
    assert psnr(found.latents, expected.latents) >= 60.0
    assert np.abs(found.images.astype(int) - expected.images).max() <= 1
    assert found.parameters == expected.parameters
    picture = expected.images[0]
    again = [p("a blue star", image=picture, strength=0.7, **CALL) for p in (pipe, device)]
    assert np.abs(again[0].images.astype(int) - again[1].images).max() <= 1
    assert set(found.timings) == set(expected.timings)


def test_whole_requests_are_recorded_once(captured: fewstep.Pipeline, pipe: Any) -> None:
    """Other prompts, seeds and samplers of a length replay one recording, in every set of slots."""
    for i, sampler in enumerate(("euler", "dpmpp_2m", "lcm")):
        call = {**CALL, "sampler": sampler, "seed": [i, i + 10]}
        found, expected = captured(f"a large ring {i}", **call), pipe(f"a large ring {i}", **call)
        assert psnr(found.latents, expected.latents) >= 60.0
    counts = captured.graph_counts
    assert (counts["captures"], counts["replays"], counts["failures"]) == (1, 3, 0)
    assert captured.memory_bytes > 0


def test_requests_that_are_too_large_for_one_evaluation_tick(bundle: Bundle, pipe: Any) -> None:
    device = fewstep.load(bundle, backend="ort-cpu", device=TorchDevice("cpu:torch", most_rows=8))
    call = {"steps": 1, "sampler": "euler", "guidance": 2.0, "seed": list(range(5))}
    found, expected = device("a star", **call), pipe("a star", **call)
    assert np.abs(found.images.astype(int) - expected.images).max() <= 1
    assert len(found.timings["evaluations"]) == 2  # ten rows are two evaluations, and no whole request


def test_warming_up_records_the_steps_that_are_asked_for(bundle: Bundle) -> None:
    device = fewstep.load(bundle, backend="torch", device="cpu:torch", graphs=True)
    device.warm_up(steps=[2])
    before = device.graph_counts["captures"]
    device("a star", steps=2, seed=1)
    assert device.graph_counts["captures"] == before
    device("a star", steps=3, seed=1)
    assert device.graph_counts["captures"] == before + 1


def test_an_engine_that_admits_no_recording_is_run_without(bundle: Bundle) -> None:
    """Either engine may say so: the UNet's or the decoder's."""
    for name in ("unet", "vae_decoder"):
        device = fewstep.load(bundle, backend="torch", device="cpu:torch", graphs=True)
        engine = device._on_device[name]
        engine._owns_graph = True  # type: ignore[attr-defined]
        assert engine.capture == "own_graph"
        assert device("a star", steps=1, seed=1).images.any()
        assert device.graph_counts["captures"] == 0


def test_several_threads_take_slots_of_their_own(captured: fewstep.Pipeline) -> None:
    seeds = list(range(6))
    expected = [captured("a star", steps=2, seed=s).images for s in seeds]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda s: captured("a star", steps=2, seed=s).images, seeds))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert len(captured._pool) <= 4


def test_results_are_numpy_pillow_and_tensors(captured: fewstep.Pipeline, pipe: Any) -> None:
    result = captured("a star", steps=2, seed=1)
    assert result.tensor.dtype == torch.uint8
    assert torch.equal(torch.from_dlpack(result), torch.from_numpy(result.images))
    assert result.to_pil()[0].size == (64, 64)
    kept = result.tensor.clone()
    captured("a circle", steps=2, seed=2)
    assert torch.equal(result.tensor, kept), "a later request must not write into an earlier result"
    plain = pipe("a star", steps=2, seed=1)
    assert plain.tensor is None
    np.testing.assert_array_equal(np.from_dlpack(plain), plain.images)


def test_latency_mode_has_one_step_and_shared_mode_all(bundle: Bundle) -> None:
    for mode, count in (("latency", 1), ("shared", 4)):
        device = fewstep.load(bundle, backend="ort-cpu", device="cpu:torch", mode=mode)
        steps: list[Any] = []
        device("a star", steps=4, sampler="euler", seed=1, on_step=steps.append)
        assert [s.index for s in steps] == list(range(4))[-count:]
        previews = [s.preview() for s in device.stream(device.request("a star", steps=2, seed=1), previews=True)]
        assert len(previews) == 2


def test_images_are_spread_over_devices(bundle: Bundle, pipe: Any) -> None:
    group = fewstep.load(bundle, backend="ort-cpu", devices=["cpu", "cpu:torch"])
    assert isinstance(group, PipelineGroup)
    group.warm_up()
    for count in (1, 3):
        call = {**CALL, "seed": list(range(count))}
        found, expected = group("a red circle", **call), pipe("a red circle", **call)
        assert np.abs(found.images.astype(int) - expected.images).max() <= 1
        assert psnr(found.latents, expected.latents) >= 60.0
        assert (found.seeds, found.parameters) == (expected.seeds, expected.parameters)
        assert [d["device"] for d in found.timings["devices"]] == ["cpu", "cpu:torch"][:count]
    together = {**CALL, "shared_stream": True}
    found, expected = group("a ring", **together), pipe("a ring", **together)
    assert np.abs(found.images.astype(int) - expected.images).max() <= 1
    assert len(found.timings["devices"]) == 1


def test_a_group_is_cancelled_and_fails_as_one(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    group = fewstep.load(bundle, backend="ort-cpu", devices=["cpu", "cpu"])
    cancel = threading.Event()
    with pytest.raises(CancelledError, match="after 1 of 9 evaluations"):
        group("a star", steps=9, sampler="euler", seed=[1, 2], cancel=cancel, on_step=lambda _: cancel.set())
    request = group.request("a star", steps=9, sampler="euler", seed=[1, 2])
    bad = group.pipelines[1]
    monkeypatch.setattr(bad.vae, "decode", lambda *_: (_ for _ in ()).throw(MissingError("the second one is gone")))
    with pytest.raises(MissingError, match="second one is gone"):
        group.run(request)


def test_devices_that_are_not_there_are_refused_in_words(bundle: Bundle) -> None:
    with pytest.raises(ArgumentError, match=r"device is 'tpu'.*cpu, cuda"):
        fewstep.load(bundle, device="tpu")
    with pytest.raises(ArgumentError, match="devices is"):
        fewstep.load(bundle, devices=[])
    with pytest.raises(ArgumentError, match="mode is 'fast'"):
        fewstep.load(bundle, device="cpu:torch", mode="fast")
    with pytest.raises(ArgumentError, match=r"graphs=True on the device 'cpu'.*cpu:torch"):
        fewstep.load(bundle, backend="ort-cpu", device="cpu", graphs=True)
    if not torch.cuda.is_available():
        with pytest.raises(MissingError, match="torch sees no CUDA devices"):
            fewstep.load(bundle, device="cuda:0")


def test_a_backend_brings_its_device(bundle: Bundle, pipe: Any) -> None:
    """On a machine without a GPU nothing else is used in its place, and NumPy slots take no CUDA engine."""
    if not torch.cuda.is_available():
        with pytest.raises(MissingError, match="torch sees no CUDA devices"):
            fewstep.load(bundle, backend="ort-cuda")
    engine = HostEngine(pipe.engines["unet"], HostLane(torch.device("cpu"), records=False))
    engine.device = "cuda"
    with pytest.raises(MismatchError, match=r"runs on cuda.*a backend for cpu"):
        check_engine(engine, NumpyDevice())


def test_an_engine_of_another_device_is_refused(bundle: Bundle) -> None:
    class Elsewhere(TorchDevice):
        def __init__(self) -> None:
            super().__init__("cpu:torch")
            self.engines = "cuda"

    with pytest.raises(MismatchError, match=r"'ort-cpu' runs on cpu"):
        fewstep.load(bundle, backend="ort-cpu", device=Elsewhere())


def test_engines_on_a_device_are_fed_from_the_host(pipe: Any) -> None:
    engine = pipe.engines["vae_decoder"]
    wrapped = HostEngine(engine, HostLane(torch.device("cpu"), records=True)).bind(
        {"batch": 1, "height": 8, "width": 8}
    )
    plain = engine.bind({"batch": 1, "height": 8, "width": 8})
    rng = np.random.default_rng(0)
    for _ in range(4):  # eagerly, recorded, and replayed
        latent = rng.standard_normal(plain.inputs["latent"].shape).astype(np.float32)
        for binding in (wrapped, plain):
            np.copyto(binding.inputs["latent"], latent)
            binding.enqueue()
        np.testing.assert_array_equal(wrapped.outputs["image"], plain.outputs["image"])


def test_what_the_host_feeds_a_second_time_is_recorded(bundle: Bundle) -> None:
    engine = open_torch_engine(bundle, bundle.text_encoders[0], RunOptions())
    wrapped = HostEngine(engine, HostLane(torch.device("cpu"), records=True)).bind({"prompts": 2})
    plain = engine.bind({"prompts": 2})
    rng = np.random.default_rng(0)
    for _ in range(4):
        for name, given in {"input_ids": rng.integers(0, 100, plain.inputs["input_ids"].shape), "clip_skip": 0}.items():
            for binding in (wrapped, plain):
                binding.inputs[name][...] = given
        for binding in (wrapped, plain):
            binding.enqueue()
        for name, array in plain.outputs.items():
            np.testing.assert_array_equal(wrapped.outputs[name], array)
    assert wrapped._graphs is not None
    assert (wrapped._graphs.captures, wrapped._graphs.replays, wrapped._graphs.failures) == (1, 3, 0)


def test_memory_that_does_not_suffice_is_an_error_with_a_type(bundle: Bundle) -> None:
    """An allocation that the system's own allocator refuses; what a GPU says is not run on a GPU."""
    with (
        pytest.raises(OutOfMemoryError, match="does not suffice for a decoder"),
        guard_memory(torch.device("cpu"), "a decoder"),
    ):
        torch.empty(1 << 60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="other"), guard_memory(torch.device("cpu"), "a decoder"):
        raise RuntimeError("other")
    error = out_of_memory("a tick", 1 << 30, 80 << 30)
    assert "1.0 of 80.0 GiB are free" in str(error)
    assert error.exit_code == 3


def test_a_request_that_does_not_fit_says_what_would(bundle: Bundle) -> None:
    """In a process that may have 250 MB more than it has: its allocator refuses, as a full device would."""
    code = """
import resource, sys
from pathlib import Path
import fewstep, fewstep.export
from fewstep.errors import OutOfMemoryError
pipe = fewstep.load(sys.argv[1], backend="torch", device="cpu:torch")
pipe("a star", steps=1, seed=1)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (250 << 20), resource.RLIM_INFINITY))
try:
    pipe("a star", steps=1, seed=[1, 2, 3], size=(512, 512), guidance=1.0)
except OutOfMemoryError as error:
    print(error)
pipe("a star", steps=1, seed=1)
print("and goes on")
"""
    command = [sys.executable, "-c", code, str(bundle.folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "MALLOC_ARENA_MAX": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert "the device's memory does not suffice for" in done.stdout
    assert "expected at most about 2 images of 512x512 at once" in done.stdout
    assert "and goes on" in done.stdout


def test_the_largest_batch_is_the_last_that_fits(bundle: Bundle) -> None:
    free = 200 << 20
    most = largest_batch(bundle, (64, 64), free_bytes=free)
    assert predicted_peak(bundle, (64, 64), most) <= free < predicted_peak(bundle, (64, 64), most + 1)
    assert largest_batch(bundle, (64, 64), free_bytes=1 << 20) == 0
    assert largest_batch(bundle, (128, 128), free_bytes=free) < most
