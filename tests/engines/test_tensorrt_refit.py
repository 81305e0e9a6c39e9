"""Weights replaced in loaded TensorRT-RTX engines, and engines whose files hold none. No GPU is used.

The library itself builds neither without a GPU, which is held here; what it parses, marks and configures is real. The
rest runs on stand-ins for its refitters, its runtime and the GPU (`standin_refit.py`), against torch.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import fewstep
import numpy as np
import pytest
from checkpoints import psnr
from fewstep.bundle import Bundle
from fewstep.engines import BuildOptions, Engine, Store, build_engines, open_engine, profiles_for
from fewstep.engines.backends.tensorrt import import_tensorrt, logger
from fewstep.engines.backends.tensorrt_build import parse
from fewstep.engines.backends.tensorrt_refit import RefittableEngine, mark_refittable
from fewstep.engines.base import Moving, Swappable
from fewstep.errors import CorruptError, FewstepError, MismatchError, UnsupportedError
from fewstep.weights.stored import open_tensors
from small_bundle import weights_of, write_bundle
from standin_tensorrt import Library, stand_in_tensorrt

pytest.importorskip("tensorrt_rtx")

ADA = BuildOptions(compute_capabilities=("8.9",), capturable=True)
SWAPPED = replace(ADA, refittable=True, stripped=True)
NO_GPU = pytest.mark.skipif(Path("/proc/driver/nvidia/version").exists(), reason="this machine has a GPU")
DIMS = {"rows": 1, "height": 12, "width": 16, "tokens": 77}
LEAST = 75.0


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    with stand_in_tensorrt(monkeypatch) as library:
        yield library


def changed(bundle: Bundle, folder: Path, seed: int = 1) -> Bundle:
    """The bundle with other values in its UNet's file: each weight by up to a tenth of their spread."""
    part, random = bundle.component("unet"), np.random.default_rng(seed)
    data = bytearray(bundle.path(part.weights).read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    for name, entry in json.loads(data[8:start]).items():
        if name == "__metadata__":
            continue
        begin, end = (start + o for o in entry["data_offsets"])
        value = np.frombuffer(bytes(data[begin:end]), np.float32)
        noise = random.normal(0.0, 0.1 * value.std() + 1e-3, value.shape)
        data[begin:end] = (value + noise).astype(np.float32).tobytes()
    shutil.copytree(bundle.folder, folder)
    (folder / part.weights).write_bytes(data)
    new = replace(part, weights_sha256=hashlib.sha256(data).hexdigest())
    return replace(bundle, folder=folder, components={**bundle.components, "unet": new})


def weights_in(bundle: Bundle, component: str = "unet") -> dict[str, np.ndarray]:
    stored = open_tensors([bundle.path(bundle.component(component).weights)])
    return {n: t.data.view("<f4").reshape(t.shape) for n, t in stored.items()}


def build(bundle: Bundle, store: Store, options: BuildOptions, **more: Any) -> dict[str, Any]:
    return build_engines(bundle, backend="tensorrt-rtx", store=store, options=options, **more)


def opened(bundle: Bundle, store: Store, options: BuildOptions = SWAPPED, *, gate: bool = False) -> Any:
    build(bundle, store, options, components=["unet"], gate=gate)
    return open_engine(bundle, "unet", backend="tensorrt-rtx", store=store, options=options, build="never")


def evaluate(engine: Engine, dims: Mapping[str, int] = DIMS) -> np.ndarray:
    binding, random = engine.bind(dims), np.random.default_rng(0)
    for tensor in binding.inputs.values():
        tensor[...] = tensor.new_tensor(random.normal(size=tensor.shape).astype(np.float32))
    binding.enqueue()
    return np.array(next(iter(binding.outputs.values())))


@NO_GPU
@pytest.mark.parametrize("options", [{"refittable": True}, {"stripped": True}, {"refittable": True, "stripped": True}])
def test_the_library_builds_none_without_a_gpu(bundle: Bundle, store: Store, options: dict[str, bool]) -> None:
    """TensorRT-RTX 1.7 runs parts of such an engine while it builds it, whatever its documentation says."""
    with pytest.raises(FewstepError, match="built no engine") as caught:
        build(bundle, store, replace(ADA, **options), components=["unet"])
    assert "machine with a GPU" in caught.value.remedy
    assert list(store.entries()) == []
    assert not list(store.root.rglob("*.part"))


@pytest.mark.parametrize("family", ["sd1_bundle", "sdxl_bundle"])
def test_the_real_parser_names_every_weight(family: str, request: pytest.FixtureRequest) -> None:
    bundle, module = request.getfixturevalue(family), import_tensorrt("tensorrt-rtx")
    for name, part in bundle.components.items():
        network = module.Builder(logger("tensorrt-rtx")).create_network(0)
        graph, weights = bundle.read_graph(part), bundle.path(part.weights)
        parser = parse(module, network, graph, weights.with_name(part.graph), logger("tensorrt-rtx"))
        marked = mark_refittable(network, graph, weights)
        assert set(marked) == set(weights_in(bundle, name))
        assert all(network.are_weights_marked_refittable(n) for n in marked)
        del parser


def test_weights_that_the_parser_loses_are_named(bundle: Bundle) -> None:
    class Losing:
        def mark_weights_refittable(self, name: str) -> bool:
            return name != "query.weight"

    part = bundle.component("unet")
    with pytest.raises(UnsupportedError, match=r"no weights of the names query\.weight"):
        mark_refittable(Losing(), bundle.read_graph(part), bundle.path(part.weights))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["sd1_bundle", "sdxl_bundle"])
def test_a_life_without_weights_in_the_store(
    family: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Built stripped, gated, stored, filled, recorded; then the UNet's weights replaced, and its own put back."""
    bundle = request.getfixturevalue(family)
    side = bundle.latent.unit * 5
    other = changed(bundle, tmp_path / "other")
    call: dict[str, Any] = {"seed": 3, "steps": 2, "guidance": 3.0, "size": (side, side)}
    expected = [fewstep.load(b, backend="torch", device="cpu")("a circle", **call).images[0] for b in (bundle, other)]
    assert psnr(expected[0], expected[1]) < 40, "the change changes nothing"
    with stand_in_tensorrt(monkeypatch):
        store = Store(tmp_path / "store")
        sizes = profiles_for(bundle, sizes=[(side, side)], guidance=True)
        built = build(bundle, store, SWAPPED, profiles=sizes)
        assert all(b.entry.gate["passed"] for b in built.values())
        kept = [p.read_bytes() for p in store.root.rglob("*") if p.is_file()]
        for name in bundle.components:
            largest = max(weights_in(bundle, name).values(), key=np.size).tobytes()
            assert not any(largest in data for data in kept), f"weights of {name} are in the store"
        pipe = fewstep.load(
            bundle, backend="tensorrt-rtx", device="cuda", store=store, build="never", size=(side, side)
        )
        unet = pipe.engines["unet"]
        assert isinstance(unet, Swappable)
        assert isinstance(unet, Moving)
        own = bundle.component("unet").weights_sha256
        assert unet.loaded == own
        first = pipe("a circle", **call).images[0]
        assert psnr(expected[0], first) >= LEAST
        before = dict(pipe.graph_counts)
        unet.load_weights(weights_in(other), "other")
        assert unet.loaded == "other"
        second = pipe("a circle", **call).images[0]
        assert psnr(expected[1], second) >= LEAST
        unet.load_weights(weights_in(bundle), own)
        assert np.array_equal(pipe("a circle", **call).images[0], first)
        counts = pipe.graph_counts
        assert counts["invalidations"] - before["invalidations"] == 2, "what was recorded before is recorded anew"
        assert counts["captures"] - before["captures"] == 2
        assert counts["failures"] == 0


def test_a_hundred_replacements_and_back(bundle: Bundle, library: Library, store: Store, tmp_path: Path) -> None:
    engine, other = opened(bundle, store), weights_in(changed(bundle, tmp_path / "other"))
    own, first = weights_in(bundle), evaluate(engine)
    engine.load_weights(other, "other")
    second = evaluate(engine)
    assert not np.array_equal(first, second)
    for i in range(100):
        engine.load_weights(own if i % 2 else {**other}, f"{i}")
    assert np.array_equal(evaluate(engine), first)
    assert (engine.loaded, engine.generation) == ("99", 102)
    unfilled = opened(bundle, store, replace(ADA, refittable=True))
    assert np.array_equal(evaluate(unfilled), first), "a plan that holds its weights needs no refit"


def test_stripped_alone_takes_its_own_weights_and_no_others(bundle: Bundle, library: Library, store: Store) -> None:
    plain = opened(bundle, Store(store.root / "plain"), ADA)
    engine = opened(bundle, store, replace(ADA, stripped=True))
    assert np.array_equal(evaluate(engine), evaluate(plain))
    assert not isinstance(engine, Swappable)
    assert not isinstance(plain, Swappable)
    assert [p.identical for p in library.plans.values()] == [False, True]


def test_threads_run_while_weights_are_replaced(bundle: Bundle, library: Library, store: Store, tmp_path: Path) -> None:
    """Each evaluation is of one set of weights, whole; the stand-in fails a refit that others' work overlaps."""
    engine, own = opened(bundle, store), weights_in(bundle)
    other = weights_in(changed(bundle, tmp_path / "other"))
    allowed = [evaluate(engine)]
    engine.load_weights(other, "other")
    allowed.append(evaluate(engine))
    wrong: list[object] = []

    def work() -> None:
        try:
            for _ in range(30):
                made = evaluate(engine)
                wrong.extend([] if any(np.array_equal(made, a) for a in allowed) else [made])
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(20):
        engine.load_weights(own if i % 2 else other, str(i))
    for thread in threads:
        thread.join(60)
    assert wrong == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"nothing": np.zeros(3, np.float32)}, "have nothing"),
        ({"query.weight": None}, r"lack query\.weight"),
        ({"query.weight": np.zeros((16, 8), np.float32)}, r"'query\.weight' is float32 \[16, 8\]; expected .*16, 16"),
        ({"norm.bias": np.zeros(16, np.float64)}, r"'norm\.bias' is float64 \[16\]; expected float32"),
    ],
)
def test_other_names_shapes_and_types_change_nothing(
    bundle: Bundle, library: Library, store: Store, change: dict[str, Any], words: str
) -> None:
    engine = opened(bundle, store)
    first, digest = evaluate(engine), engine.loaded
    given = {n: w for n, w in {**weights_in(bundle), **change}.items() if w is not None}
    with pytest.raises(MismatchError, match=words):
        engine.load_weights(given, "other")
    assert (engine.loaded, engine.generation) == (digest, 1)
    assert np.array_equal(evaluate(engine), first)


def test_a_replacement_that_breaks_off_leaves_an_engine_that_says_so(
    bundle: Bundle, library: Library, store: Store
) -> None:
    engine, own = opened(bundle, store), weights_in(bundle)
    first = evaluate(engine)
    binding = engine.bind(DIMS)
    library.fails_at = library.refits + 1
    with pytest.raises(FewstepError, match="could not refit the engine: weights validation failed"):
        engine.load_weights(own, "again")
    assert engine.loaded == ""
    with pytest.raises(FewstepError, match="holds weights of two kinds"):
        binding.enqueue()
    engine.load_weights(own, "again")
    assert np.array_equal(evaluate(engine), first)
    infinite = {**own, "norm.bias": np.full(16, np.inf, np.float32)}
    with pytest.raises(FewstepError, match=r"validation failed: norm\.bias"):
        engine.load_weights(infinite, "infinite")


def test_what_the_engine_lacks_or_does_not_know_is_named(bundle: Bundle, library: Library, store: Store) -> None:
    """Plans that are not what their manifest says."""
    opened(bundle, store)
    ((digest, plan),) = library.plans.items()

    def again(**changes: Any) -> Engine:
        library.plans[digest] = replace(plan, **changes)
        return open_engine(bundle, "unet", backend="tensorrt-rtx", store=store, options=SWAPPED, build="never")

    assert isinstance(again(), RefittableEngine)
    with pytest.raises(MismatchError, match=r"query\.weight cannot be replaced"):
        again(refittable=plan.refittable - {"query.weight"})
    with pytest.raises(MismatchError, match="hidden are unknown"):
        again(refittable=plan.refittable | {"hidden"})
    with pytest.raises(MismatchError, match=r"cannot be refitted: .*isRefittable"):
        again(refittable=frozenset())


def test_missing_weights_of_a_stripped_engine_are_named(bundle: Bundle, library: Library, store: Store) -> None:
    options = replace(ADA, stripped=True)
    opened(bundle, store, options)
    ((digest, plan),) = library.plans.items()
    library.plans[digest] = replace(plan, refittable=plan.refittable | {"hidden"})
    with pytest.raises(MismatchError, match="the model has no initializer hidden"):
        open_engine(bundle, "unet", backend="tensorrt-rtx", store=store, options=options, build="never")


@pytest.mark.parametrize("options", [SWAPPED, replace(ADA, stripped=True)], ids=["refittable", "stripped"])
def test_weights_that_are_not_the_manifests_fill_nothing(
    library: Library, store: Store, tmp_path: Path, options: BuildOptions
) -> None:
    bundle = write_bundle(tmp_path / "own")
    opened(bundle, store, options)
    path = bundle.path(bundle.component("unet").weights)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    before = library.refits
    with pytest.raises(CorruptError, match="SHA-256"):
        open_engine(bundle, "unet", backend="tensorrt-rtx", store=store, options=options, build="never")
    assert library.refits == before
    assert weights_of("unet")
