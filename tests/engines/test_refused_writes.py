"""A system that refuses to write, as users meet it: full, limited, read-only; and engines whose files are gone."""

from __future__ import annotations

import errno
import gc
import hashlib
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from fewstep.bundle import Bundle
from fewstep.cli import main
from fewstep.engines import Store, build_engines, open_engine
from fewstep.engines.backends import ort_build
from fewstep.engines.inventory import prune_engines
from fewstep.errors import CorruptError, MissingError, WriteError
from fewstep.places import refusal, writing
from safetensors.numpy import save_file
from small_bundle import example, write_bundle
from small_disk import PAGE, SmallDisk, small_disk
from test_build import DIMS, run

SIZES = [PAGE * n for n in (1, 2, 3, 4, 5, 6, 8, 12)]
Make = Callable[[Bundle, Store], object]


def loaded(bundle: Bundle, store: Store) -> object:
    return open_engine(bundle, "unet", backend="ort-cpu", store=store)


def built(bundle: Bundle, store: Store) -> object:
    return build_engines(bundle, backend="ort-cpu", components=["unet"], store=store, gate=False)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk") as made:
        yield made


@pytest.mark.parametrize("beside", [False, True], ids=["in the graph", "weights beside"])
@pytest.mark.parametrize("make", [loaded, built])
def test_a_full_disk_is_told_as_one_at_whatever_byte_it_is_full(
    bundle: Bundle, disk: SmallDisk, monkeypatch: pytest.MonkeyPatch, make: Make, beside: bool
) -> None:
    if beside:
        monkeypatch.setattr(ort_build, "INLINE_BYTES", 0)
    refused: list[WriteError] = []
    for size in SIZES:
        disk.resize(size)
        store = Store(disk.path / f"{size}" / "engines")
        try:
            make(bundle, store)
        except WriteError as error:
            refused.append(error)
            left = [p for p in disk.path.rglob("*") if p.is_file() and not p.name.endswith(".lock")]
            assert left == [], "what could not be finished still takes the room"
            disk.resize(1 << 20)
            make(bundle, store)
        engine = open_engine(bundle, "unet", backend="ort-cpu", store=store, build="never")
        assert np.isfinite(run(engine, example("unet", DIMS))).all()
        del engine
        gc.collect()
        shutil.rmtree(store.root.parent)
    assert 3 <= len(refused) < len(SIZES)
    words = r"the engine of 'unet' cannot be written to '.*disk.*': the disk is full, .*B are free"
    assert all(re.fullmatch(words, e.found) and "engines prune" in e.remedy and e.exit_code == 3 for e in refused)


def test_how_much_was_needed_is_said(bundle: Bundle, disk: SmallDisk) -> None:
    disk.resize(2 * PAGE)
    with pytest.raises(WriteError, match=r"room for about 0\.00854 MB"):
        built(bundle, Store(disk.path / "engines"))


def test_a_graph_that_is_refused_is_no_full_disk(tmp_path: Path, disk: SmallDisk) -> None:
    """On a disk that is full as well, a graph that ONNX Runtime does not take is still what is told of."""
    bundle = write_bundle(tmp_path / "small")
    model = onnx.load(str(bundle.folder / "unet.onnx"), load_external_data=False)
    model.graph.node[0].op_type = "NoSuchOperator"
    (bundle.folder / "unet.onnx").write_bytes(model.SerializeToString())
    digest = hashlib.sha256(model.SerializeToString()).hexdigest()
    unet = replace(bundle.components["unet"], graph_sha256=digest)
    bundle = replace(bundle, components={**bundle.components, "unet": unet})
    store = Store(disk.path / "engines")
    (disk.path / "filling").write_bytes(b"x" * 14 * PAGE)
    with pytest.raises(CorruptError, match=r"refuses the model.*NoSuchOperator"):
        built(bundle, store)


def test_a_full_disk_is_exit_code_3(
    bundle: Bundle, disk: SmallDisk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    disk.resize(2 * PAGE)
    monkeypatch.setenv("FEWSTEP_CACHE_DIR", str(disk.path))
    arguments = ["build", str(bundle.folder), "--backend", "ort-cpu", "--component", "unet", "--json"]
    for preflight in ([], ["--no-preflight"]):
        assert main([*arguments, *preflight]) == 3
        assert re.search("disk (is full|are free)", capsys.readouterr().out)


def test_a_limit_on_files_is_told_as_one(bundle: Bundle, tmp_path: Path) -> None:
    store, limits = Store(tmp_path / "engines"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE, limits[1]))
    try:
        with pytest.raises(WriteError, match=r"larger than this process may write \(ulimit -f\).*room for about"):
            built(bundle, store)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    built(bundle, store)


def test_a_store_on_a_read_only_disk_serves_and_says_that_it_cannot_be_written(bundle: Bundle, disk: SmallDisk) -> None:
    disk.resize(1 << 20)
    store = Store(disk.path / "engines")
    built(bundle, store)
    disk.resize(1 << 20, "ro")
    loaded(bundle, Store(store.root))
    writes: list[Callable[[], object]] = [
        lambda: build_engines(bundle, backend="ort-cpu", components=["unet"], store=store, force=True, gate=False),
        lambda: open_engine(bundle, "vae_decoder", backend="ort-cpu", store=store),
        lambda: store.record_gate(next(store.entries()), {"passed": True}),
        lambda: prune_engines(store, everything=True),
        lambda: Store(disk.path / "another" / "engines"),
    ]
    for write in writes:
        with pytest.raises(WriteError, match=r"cannot be written.*read-only.*FEWSTEP_CACHE_DIR"):
            write()


def test_libraries_that_only_quote_the_system_are_understood(disk: SmallDisk) -> None:
    """safetensors' errors are not the system's, and torch's process leaves nothing but what it printed."""
    disk.resize(PAGE)
    tensors = {"x": np.zeros(1 << 16, np.float32)}
    with (
        pytest.raises(WriteError, match=r"the disk is full.*room for about 0\.262 MB"),
        writing("x", disk.path, needed=1 << 18),
    ):
        save_file(tensors, disk.path / "x.safetensors")
    assert refusal("SafetensorError: I/O error: No space left on device (os error 28)") == errno.ENOSPC
    assert refusal("OSError: [Errno 122] Disk quota exceeded") == errno.EDQUOT
    assert refusal("IndexError: [Errno 2] No such file (os error 2)") is None
    assert refusal(ValueError("No space in the prompt")) is None
    with pytest.raises(FileNotFoundError), writing("x", disk.path):
        (disk.path / "none").read_bytes()
    with pytest.raises(PermissionError), writing("x", disk.path):
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/checkpoint.safetensors")


@pytest.mark.parametrize("beside", [False, True], ids=["the engine", "its weights"])
def test_an_engine_whose_file_is_gone_is_built_again_or_missing(
    bundle: Bundle, store: Store, monkeypatch: pytest.MonkeyPatch, beside: bool
) -> None:
    if beside:
        monkeypatch.setattr(ort_build, "INLINE_BYTES", 0)
    built(bundle, store)
    inputs = example("unet", DIMS)
    expected = run(open_engine(bundle, "unet", backend="ort-cpu", store=store), inputs)
    policies: list[Make] = [loaded, built]
    for again in policies:
        (entry,) = store.entries("unet")
        lost = entry.folder / list(entry.files)[beside]
        lost.unlink()
        with pytest.raises(MissingError, match=f"lost its file {lost.name}.*fewstep build small") as caught:
            open_engine(bundle, "unet", backend="ort-cpu", store=store, build="never")
        assert caught.value.exit_code == 3
        pinned = Store(store.root, pinned=store.digest())
        with pytest.raises(MissingError, match="fewstep build"):
            open_engine(bundle, "unet", backend="ort-cpu", store=pinned)
        again(bundle, store)
        found = run(open_engine(bundle, "unet", backend="ort-cpu", store=store, build="never"), inputs)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    (entry,) = store.entries("unet")
    entry.path.unlink()
    with pytest.raises(MissingError, match="fewstep build BUNDLE --force"):
        entry.read()
