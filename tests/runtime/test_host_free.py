"""Slots on tensors that are on no CPU and have no memory: whatever would touch the host is seen. No GPU is used.

An operation that mixes a device with a CPU tensor, even of no dimensions, copies from the host and waits for the
stream; assigning a number to a part of a CUDA tensor does just that; one that reads a value waits too. Uploads through
pinned memory are the only way in; reading back is done by name. Torch's `meta` device stands for CUDA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fewstep.engines import Engine, TensorSpec
from fewstep.runtime.conditioning import Conditioning
from fewstep.runtime.device import torch_records, torch_tables
from fewstep.runtime.device.base import Sampling
from fewstep.runtime.device.torch_slots import TorchSlots
from fewstep.runtime.noise.seeds import TorchCpuGenerator
from fewstep.runtime.pictures.inpaint import make_blend
from fewstep.schedules import NoiseSchedule, compile_program
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SHAPE = (4, 8, 8)
SPECS = (
    TensorSpec(name="sample", dtype="float16", shape=("rows", 4, "height", "width")),
    TensorSpec(name="timestep", dtype="float32", shape=("rows",)),
    TensorSpec(name="encoder_hidden_states", dtype="float32", shape=("rows", "tokens", 16)),
    TensorSpec(name="time_ids", dtype="float32", shape=("rows", 6)),
)


META = torch.device("meta")


class NoHost(TorchDispatchMode):  # type: ignore[misc]
    """Notes every operation that touches a tensor of the host, or reads a value, and counts the others' kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.touched: list[str] = []
        self.kernels = 0
        self._assignments = _NoNumbers(self.touched)

    def __enter__(self) -> NoHost:
        self._assignments.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._assignments.__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.is_view:
            return out
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        if any(t.device != META for t in tensors) or torch.Tag.data_dependent_output in func.tags:
            self.touched.append(str(func))
        else:
            self.kernels += 1
        return out


class _NoNumbers(TorchFunctionMode):  # type: ignore[misc]
    """Notes assignments of the host's numbers to parts of tensors: on CUDA they are copies of no dimensions."""

    def __init__(self, touched: list[str]) -> None:
        super().__init__()
        self._touched = touched

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.Tensor.__setitem__ and not isinstance(args[2], torch.Tensor):
            self._touched.append("an assignment of a number")
        return function(*args, **(kwargs or {}))


class FakeEngine:
    """A UNet's inputs and outputs, and nothing in between."""

    backend, device, capture = "fake", "meta", "whole_request"
    inputs: Mapping[str, TensorSpec] = {s.name: s for s in SPECS}
    outputs: Mapping[str, TensorSpec] = {
        "out": TensorSpec(name="out", dtype="float16", shape=("rows", 4, "height", "width"))
    }

    def bind(self, dims: Mapping[str, int]) -> FakeBinding:
        return FakeBinding(dims)


class FakeBinding:
    def __init__(self, dims: Mapping[str, int]) -> None:
        def buffers(specs: Mapping[str, TensorSpec]) -> dict[str, Any]:
            return {
                n: torch.zeros(s.resolve(dims), dtype=getattr(torch, s.dtype), device=META) for n, s in specs.items()
            }

        self.inputs, self.outputs = buffers(FakeEngine.inputs), buffers(FakeEngine.outputs)

    def enqueue(self, stream: int | None = None) -> None: ...


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Uploads by their shapes; there is nowhere to put them."""
    done: list[tuple[int, ...]] = []

    def upload(target: torch.Tensor, values: np.ndarray[Any, Any] | torch.Tensor) -> None:
        assert target.device == META
        assert target.shape == values.shape
        done.append(tuple(values.shape))

    monkeypatch.setattr(torch_tables, "upload", upload)
    monkeypatch.setattr(torch_records, "send", upload)
    return done


def sampling(name: str, *, blends: bool, guided: bool) -> Sampling:
    program = compile_program(name, schedule="trailing", steps=4, noise=NoiseSchedule.scaled_linear())
    arrays = {"encoder_hidden_states": np.zeros((77, 16), np.float32), "time_ids": np.zeros(6, np.float32)}
    mask, latent = np.ones(SHAPE[1:], np.float32), np.zeros(SHAPE, np.float32)
    return Sampling(
        program=program,
        noise=TorchCpuGenerator(1),
        conditioning=Conditioning(positive=arrays, negative=dict(arrays) if guided else None, tokens=77),
        guidance=3.0 if guided else 1.0,
        blend=make_blend(program, mask, latent, latent) if blends else None,
    )


@pytest.mark.parametrize("blends", [False, True])
@pytest.mark.parametrize("name", ["euler", "euler_ancestral", "dpmpp_2m", "dpmpp_sde", "unipc"])
def test_admission_ticks_and_release_leave_the_host_alone(
    uploads: list[tuple[int, ...]], name: str, blends: bool
) -> None:
    engine: Engine = FakeEngine()  # type: ignore[assignment]
    slots = TorchSlots(engine, slots=3, shape=SHAPE, device=META)
    gaussian = np.zeros(SHAPE, np.float32)
    for _ in range(2):
        asked = [sampling(name, blends=blends, guided=g) for g in (True, False)]
        admitted = [slots.admit(s, gaussian) for s in asked]
        slots.tick(admitted)  # makes the buffers of such an evaluation
        for slot in admitted:
            slots.release(slot)
    asked, before = [sampling(name, blends=blends, guided=g) for g in (True, False)], len(uploads)
    with NoHost() as seen:
        admitted = [slots.admit(s, gaussian) for s in asked]
        assert seen.kernels == 0, "an admission does nothing on the device"
        slots.tick(admitted)
        assert seen.touched == [], "admission and a tick"
        # both images' records at once, their draws, what they keep; and the prompt of each
        brought = 1 + bool(np.any(asked[0].program.draws)) + blends
        assert len(uploads) - before == brought + 2
        before, first = seen.kernels, len(uploads)
        slots.tick(admitted)
        tick = seen.kernels - before
        assert len(uploads) == first, "a tick brings nothing"
        before = seen.kernels
        for slot in admitted:
            slots.release(slot)
        assert seen.touched == [], "release"
        released = (seen.kernels - before) / len(admitted)
    assert released == 2 + bool(np.any(asked[0].program.draws)) + 2 * blends
    words = f"{brought} uploads for two images, {tick} kernels a tick beside the UNet, {released:.0f} a release"
    print(f"{name}{', blended' if blends else ''}: {words}")


def test_what_is_known_is_not_brought_again(uploads: list[tuple[int, ...]]) -> None:
    """Another request with a prompt that is kept: its record, and nothing else."""
    engine: Engine = FakeEngine()  # type: ignore[assignment]
    slots = TorchSlots(engine, slots=1, shape=SHAPE, device=META)
    first = sampling("euler", blends=False, guided=True)
    slot = slots.admit(sampling("euler", blends=False, guided=True), np.zeros(SHAPE, np.float32))
    slots.tick([slot])
    slots.release(slot)
    for again in range(3):
        conditioning = Conditioning(  # a request's own, of arrays that are kept, and of numbers that are equal
            positive={n: a.copy() if n == "time_ids" else a for n, a in first.conditioning.positive.items()},
            negative=dict(first.conditioning.negative or {}),
            tokens=77,
        )
        before = len(uploads)
        with NoHost() as seen:
            slot = slots.admit(replace(first, conditioning=conditioning, position=0), np.zeros(SHAPE, np.float32))
            slots.tick([slot])
            slots.release(slot)
        assert seen.touched == []
        assert len(uploads) - before == (1 if again else 2), "its prompt too, the first time"


def test_a_read_and_a_number_from_the_host_are_seen(uploads: list[tuple[int, ...]]) -> None:
    table = torch.zeros(4, device=META)
    with NoHost() as seen:
        table[1] = 2.0
    assert seen.touched, "an assignment copies a number from the host"
    with NoHost() as seen, pytest.raises(RuntimeError, match="meta"):
        float(table[0])
