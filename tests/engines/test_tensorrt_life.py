"""The whole life of TensorRT-RTX engines: the real builder, and a stand-in for its runtime and the GPU. No GPU is used.

Build, gate, store, open, run, record, replay and evict, with engines of many exact profiles, against ONNX Runtime's
pictures.
"""

from __future__ import annotations

import gc
import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fewstep
import numpy as np
import pytest
from fewstep.bundle import Bundle
from fewstep.engines import BuildOptions, Engine, RunOptions, Store, build_engines, open_engine, profiles_for
from fewstep.engines.backends import registry
from fewstep.errors import GateError, MismatchError, MissingExtraError
from fewstep.runtime.device.cuda_graphs import TapeGraph
from standin_tensorrt import Library, Plan, stand_in_tensorrt
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("tensorrt_rtx")

CAPTURABLE = BuildOptions(compute_capabilities=("8.9",), capturable=True)
SMALL = [1, 2, 4]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    with stand_in_tensorrt(monkeypatch) as library:
        yield library


@pytest.fixture(scope="module")
def student() -> Bundle:
    from fewstep.export.embedded import embedded_bundle

    return embedded_bundle("student")[0]


def sizes_of(bundle: Bundle) -> list[tuple[int, int]]:
    """Two sizes in the ratio of 512 to 1024, the larger first: an order that text and numbers see otherwise.

    Latents of 10 and 5 cells a side, which no UNet halves without a rest.
    """
    side = bundle.latent.unit * 5
    return [(2 * side, 2 * side), (side, side)]


def build(
    bundle: Bundle, store: Store, batches: list[int], *, sizes: Any = None, components: list[str] | None = None
) -> None:
    built = build_engines(
        bundle,
        backend="tensorrt-rtx",
        store=store,
        components=components,
        options=CAPTURABLE,
        profiles=profiles_for(bundle, sizes=sizes or sizes_of(bundle), batches=batches),
    )
    for engine in built.values():
        gate, profiles = engine.entry.gate, engine.entry.key.profiles
        assert gate["passed"]
        cases = {c["case"].rpartition("/")[0] for c in gate["cases"]}
        assert len(cases) >= len(profiles), f"{engine.component}: {len(cases)} cases for {len(profiles)} profiles"
        assert gate["realised"]["precision"]["float32"] > 0


@pytest.fixture(scope="module")
def engines(student: Bundle, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Plan]]:
    """The student's engines of its smaller size and of `SMALL` batches, built once, and the plans of those builds."""
    root = tmp_path_factory.mktemp("engines")
    with pytest.MonkeyPatch.context() as patch, stand_in_tensorrt(patch) as library:
        build(student, Store(root), SMALL, sizes=sizes_of(student)[1:])
        return root, dict(library.plans)


@pytest.fixture
def stored(engines: tuple[Path, dict[str, Plan]], library: Library, tmp_path: Path) -> Store:
    """A copy of the student's engines, which the library knows."""
    root, plans = engines
    library.plans.update(plans)
    return Store(shutil.copytree(root, tmp_path / "store"))


@pytest.mark.parametrize(
    ("family", "batches"),
    [
        ("sd2_bundle", [1, 2]),
        pytest.param("student", [1, 8], marks=pytest.mark.slow),
        pytest.param("sdxl_bundle", [1, 2], marks=pytest.mark.slow),
    ],
)
def test_a_life_from_the_graph_to_the_replay(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, family: str, batches: list[int]
) -> None:
    """Of the student at most rows; what other families differ in, their inputs, is there at few."""
    bundle: Bundle = request.getfixturevalue(family)  # exported before there is a stand-in
    with stand_in_tensorrt(monkeypatch) as library:
        live(bundle, library, Store(tmp_path), batches)


def live(bundle: Bundle, library: Library, store: Store, batches: list[int]) -> None:
    """Every profile; every batch at both sizes, with guidance or without, against ONNX Runtime; then replays."""
    build(bundle, store, batches)
    for entry in store.entries():
        assert [p.order for p in entry.key.profiles] == sorted(p.order for p in entry.key.profiles)
        engine = open_engine(bundle, entry.key.component, backend="tensorrt-rtx", store=store)
        for profile in entry.key.profiles:
            engine.bind(profile.optimum).enqueue()
        if entry.key.component == "unet":
            with pytest.raises(MismatchError, match="rows=3"):
                engine.bind({**profile.optimum, "rows": 3})
    options: dict[str, Any] = {"build": "never", "size": sizes_of(bundle)[0], "most_contexts": 32}
    pipe = fewstep.load(bundle, backend="tensorrt-rtx", device="cuda", store=store, **options)
    exact = fewstep.load(bundle, backend="ort-cpu", device="cpu")
    euler = {"steps": 2, "sampler": "euler", "schedule": "trailing"}
    for larger, size in enumerate(sizes_of(bundle)):
        for index, images in enumerate(batches):
            call = {"seed": list(range(images)), "size": size, **euler}
            call["guidance"] = 3.0 if (index + larger) % 2 else 1.0  # each batch has both, at one size each
            prompts = [f"picture {i}" for i in range(images)]
            got, expected = pipe(prompts, **call).images.astype(int), exact(prompts, **call).images
            assert np.abs(got - expected).max() <= 1
    before = dict(pipe.graph_counts)
    again = {"seed": 0, "size": sizes_of(bundle)[1], "guidance": 3.0}
    first = pipe("a circle", **again, **euler).images
    other = pipe("a ring", **again, **{**euler, "sampler": "dpmpp_2m"}).images
    counts = pipe.graph_counts
    assert counts["failures"] == 0
    assert counts["replays"] - before["replays"] == 2, "another prompt and sampler replay what is recorded"
    assert counts["captures"] == before["captures"]
    assert np.abs(first.astype(int) - exact("a circle", **again, **euler).images).max() <= 1
    assert not np.array_equal(first, other)
    assert library.driver.device_synchronisations == 0
    assert library.slow_runs == 0, "a fallback kernel was run, and so recorded"


def test_a_manifest_with_profiles_in_another_order_is_refused(student: Bundle, library: Library, stored: Store) -> None:
    library.plans.update({d: replace(p, profiles=p.profiles[::-1]) for d, p in library.plans.items()})
    with pytest.raises(MismatchError, match="profile 0 of the engine takes"):
        open_engine(student, "unet", backend="tensorrt-rtx", store=stored, run=RunOptions())


def test_ticks_evict_and_capture_again(student: Bundle, library: Library, stored: Store) -> None:
    exact = fewstep.load(student, backend="ort-cpu", device="cpu")
    with fewstep.Server(
        student, device="cuda", backend="tensorrt-rtx", store=stored, build="never", graphs_kept=1,
        sizes=[sizes_of(student)[1]], size=sizes_of(student)[1], most_slots=4, buckets=[1, 2, 4, 8],
    ) as server:  # fmt: skip
        tickets = [
            server.submit("a circle", seed=i, steps=2 + i % 2, guidance=3.0 * (i % 2), size=sizes_of(student)[1])
            for i in range(6)
        ]
        for i, ticket in enumerate(tickets):
            call = {"seed": i, "steps": 2 + i % 2, "guidance": 3.0 * (i % 2), "size": sizes_of(student)[1]}
            assert np.abs(ticket.result(60).images.astype(int) - exact("a circle", **call).images).max() <= 1


def test_threads_share_engines_and_capture_in_turn(student: Bundle, library: Library, stored: Store) -> None:
    pipe = fewstep.load(
        student, backend="tensorrt-rtx", device="cuda", store=stored, build="never", size=sizes_of(student)[1]
    )
    expected = fewstep.load(student, backend="ort-cpu", device="cpu")("a circle", seed=1, size=sizes_of(student)[1])
    wrong: list[object] = []

    def work() -> None:
        try:
            for _ in range(5):
                images = pipe("a circle", seed=1, size=sizes_of(student)[1]).images.astype(int)
                wrong.extend([images] if np.abs(images - expected.images).max() > 1 else [])
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert wrong == []
    assert pipe.graph_counts["failures"] == 0


def test_an_engine_of_wrong_numbers_fails_at_its_own_size(
    student: Bundle, library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import standin_tensorrt

    true = standin_tensorrt.Context.evaluate

    def wrong(self: Any, inputs: Any, outputs: Any) -> None:
        true(self, inputs, outputs)
        if outputs[0].is_floating_point() and outputs[0].shape[0] == 4:
            outputs[0].mul_(1.001)

    monkeypatch.setattr(standin_tensorrt.Context, "evaluate", wrong)
    profiles = profiles_for(student, sizes=sizes_of(student)[1:], batches=[1, 4], guidance=False)
    with pytest.raises(GateError, match=r"relative error 1\.\d+e-03"):
        build_engines(
            student, backend="tensorrt-rtx", store=Store(tmp_path), components=["unet"],
            options=CAPTURABLE, profiles=profiles,
        )  # fmt: skip


def lacking(*_: object) -> Engine:
    raise MissingExtraError("diffusers", "export", purpose="The torch backend")


@pytest.mark.parametrize("factory", [None, lacking])
def test_without_torch_the_graph_is_the_reference(
    student: Bundle, library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factory: Any
) -> None:
    monkeypatch.setitem(registry._in_memory, "torch", factory)
    store = Store(tmp_path)
    build(student, store, [4], sizes=sizes_of(student)[1:], components=["vae_decoder"])
    makers = {m for e in store.entries() for m in e.gate["reference"]}
    assert "the exported graph on ONNX Runtime" in makers


def test_the_inspector_s_forms(student: Bundle, library: Library, stored: Store) -> None:
    told = {}
    for library.form in ("10", "11", "names"):
        told[library.form] = open_engine(student, "unet", backend="tensorrt-rtx", store=stored).realised  # type: ignore[attr-defined]
    count = student.component("unet").operators["Attention"]
    assert told["10"] == told["11"]
    assert told["10"]["attention"] == f"{count} fused of {count}"
    assert told["names"] == {"precision": "unknown", "attention": f"unknown fused of {count}"}


def test_scratch_memory_is_shared_on_a_stream_and_a_cache_is_kept_after_a_run(
    student: Bundle, library: Library, stored: Store
) -> None:
    pipe = fewstep.load(
        student, backend="tensorrt-rtx", device="cuda", store=stored, build="never", size=sizes_of(student)[1]
    )
    before = len(library.contexts)
    pipe("a circle", seed=1, size=sizes_of(student)[1])
    ran = [c for c in library.contexts[before:] if c.memory]
    assert len(ran) == 3, "a text encoder, a UNet and a decoder"
    assert len({c.memory for c in ran}) == 2, "what is on the slots' stream shares, and the encoder has its own"
    caches = {p.name: p.read_bytes()[32:] for p in stored.root.glob(".runtime.*.cache")}
    assert caches
    assert any(c.startswith(b"kernels") for c in caches.values())
    assert json.loads(next(c for c in caches.values() if c.startswith(b"kernels"))[8:])
    del pipe
    gc.collect()


class OutsideGraphs(TorchDispatchMode):  # type: ignore[misc]
    """The operations on tensors that are not replayed; views are none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.names: list[str] = []
        self._replaying = False
        replay = TapeGraph.replay

        def aside(graph: TapeGraph) -> None:
            self._replaying = True
            replay(graph)
            self._replaying = False

        monkeypatch.setattr(TapeGraph, "replay", aside)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if not self._replaying and not func.is_view:
            self.names.append(str(func).rpartition(".")[0])
        return func(*args, **(kwargs or {}))


def test_a_request_is_one_launch(
    student: Bundle, library: Library, stored: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pytest -s` prints what a request asks of the driver."""
    size, driver = sizes_of(student)[1], library.driver
    pipe = fewstep.load(student, backend="tensorrt-rtx", device="cuda", store=stored, build="never", size=size)

    def counts() -> tuple[int, int, int]:
        return driver.launches, driver.stream_synchronisations, library.runs

    pipe("a circle", seed=1)
    pipe("a square", seed=1)  # the second time an encoder is recorded
    for prompt, new in (("a square", False), ("a ring", True)):
        before = counts()
        with OutsideGraphs(monkeypatch) as outside:
            pipe(prompt, seed=2)
        launches, waits, eager = (a - b for a, b in zip(counts(), before, strict=True))
        words = f"{launches} launches, {waits} waits, {eager} engines run eagerly, {len(outside.names)} operations"
        print(f"{'new' if new else 'known'} prompt: {words} beside: {', '.join(outside.names)}")
        # the request's record; the image where it was made; the slot wiped
        assert outside.names[-4:] == ["aten.copy_", "aten.clone", "aten.zero_", "aten.zero_"]
        # of a new prompt its embedding: memory, an upload, and the engine's rows
        assert len(outside.names) == 4 + 4 * new
        assert launches == 1 + new, "the text encoder is one of its own"
        assert waits <= 2 + new, "for the end, and for the events that say how long it took"
        assert eager == 0
    assert driver.device_synchronisations == 0
