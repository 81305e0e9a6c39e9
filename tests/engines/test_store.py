"""The store: its owner alone, damage named before a backend sees it, pins, prunes, two builders who make one engine."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fewstep.bundle import Bundle
from fewstep.engines import Entry, Store, build_engines, default_store, open_engine
from fewstep.engines.inventory import list_engines, prune_engines, show_engine, verify_engines
from fewstep.engines.key import EngineKey
from fewstep.engines.store import MANIFEST, now
from fewstep.errors import (
    ArgumentError,
    CorruptError,
    FewstepError,
    GateError,
    MismatchError,
    MissingError,
    UnsafeFileError,
)
from hostile import edits

KEY = EngineKey(
    component="unet",
    backend="ort-cpu",
    backend_version="1.0",
    graph_sha256="a" * 64,
    weights_sha256="b" * 64,
    dtype="float32",
    system="linux",
    device="a processor",
    capability="avx2",
)


def put(store: Store, key: EngineKey = KEY, content: bytes = b"an engine", data: bytes | None = None) -> Entry:
    with store.lock(key):
        part = store.part(key, "onnx")
        part.write_bytes(content)
        beside = None
        if data is not None:
            beside = part.with_name(f"{os.urandom(8).hex()}.data")
            beside.write_bytes(data)
        return store.commit(key, part, built={"at": now()}, facts={"layers": 3}, data=beside)


def edit(entry: Entry, **changes: Any) -> None:
    path = entry.folder / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_is_put_is_found(store: Store) -> None:
    entry = put(store)
    assert store.find(KEY) == entry
    assert bytes(entry.read()) == b"an engine"
    assert entry.facts == {"layers": 3}
    assert sorted(p.name for p in entry.folder.iterdir()) == [entry.file, MANIFEST]
    assert store.find(replace(KEY, dtype="float16")) is None
    assert show_engine(store, entry.name[:20]) == entry


def test_files_and_folders_are_their_owners_alone(store: Store) -> None:
    entry = put(store, data=b"weights")
    for path in (store.root, entry.folder):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    for path in entry.folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o777, 0o701])
def test_a_folder_open_to_others_is_refused_with_the_command_that_mends_it(tmp_path: Path, mode: int) -> None:
    root = tmp_path / "engines"
    root.mkdir()
    root.chmod(mode)
    with pytest.raises(UnsafeFileError, match=rf"mode {mode:04o}.*chmod 700"):
        Store(root)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "engines"
    root.mkdir(mode=0o700)
    os.chown(root, 12345, -1)
    with pytest.raises(UnsafeFileError, match=r"belongs to user 12345.*FEWSTEP_CACHE_DIR"):
        Store(root)


def test_a_link_or_a_file_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "file").write_bytes(b"")
    for name in ("link", "file"):
        with pytest.raises(UnsafeFileError, match="not a folder"):
            Store(tmp_path / name)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "longer", "gone", "link"])
def test_every_damaged_engine_has_a_typed_error_and_a_command(store: Store, tmp_path: Path, damage: str) -> None:
    entry = put(store, content=bytes(range(256)))
    content = bytearray(entry.path.read_bytes())
    content[77] ^= 4
    if damage == "link":
        entry.path.rename(tmp_path / "elsewhere")
        entry.path.symlink_to(tmp_path / "elsewhere")
    elif damage == "gone":
        entry.path.unlink()
    else:
        entry.path.write_bytes(
            {"flip": content, "cut": content[:100], "empty": b"", "longer": bytes(content) * 2}[damage]
        )
    expected = {"gone": MissingError, "link": UnsafeFileError}.get(damage, CorruptError)
    with pytest.raises(expected) as caught:
        store.read_entry(entry.folder).read()
    assert entry.name in str(caught.value)
    if expected is CorruptError:
        assert "fewstep build" in caught.value.remedy
        assert caught.value.expected
    (error,) = verify_engines(store).values()
    assert type(error) is expected


MALFORMED: dict[str, Mapping[str, Any] | bytes] = {
    "no json": b"{",
    "a list": b"[]",
    "empty": b"",
    "not utf-8": b"\xff\xfe\x00",
    "deep": b"[" * 100_000,
    "too long": b" " * (1 << 20) + b"{}",
    "other format": {"format": 99},
    "no key": {"key": None},
    "key of a list": {"key": []},
    "profiles of numbers": {"key": {**KEY.to_json(), "profiles": [3]}},
    "other key": {"key": replace(KEY, dtype="float16").to_json()},
    "file upwards": {"file": "../../../etc/passwd"},
    "file absolute": {"file": "/etc/passwd"},
    "file number": {"file": 3},
    "data upwards": {"data": ["../x", {"bytes": 1, "chunk_bytes": 1, "sha256": ["0"]}]},
    "data cut": {"data": ["x"]},
    "digest empty": {"digest": {}},
    "digest negative": {"digest": {"bytes": -1, "chunk_bytes": 1, "sha256": []}},
    "digest zero chunk": {"digest": {"bytes": 9, "chunk_bytes": 0, "sha256": ["0"]}},
    "digest of words": {"digest": {"bytes": "many", "chunk_bytes": 1, "sha256": []}},
    "gate of a number": {"gate": 3},
}


@pytest.mark.parametrize("case", list(MALFORMED))
def test_every_malformed_manifest_has_a_typed_error(store: Store, case: str) -> None:
    entry, value = put(store), MALFORMED[case]
    if isinstance(value, bytes):
        (entry.folder / MANIFEST).write_bytes(value)
    else:
        edit(entry, **value)
    with pytest.raises((CorruptError, UnsafeFileError)) as caught:
        store.read_entry(entry.folder)
    assert caught.value.exit_code == 4
    assert list(store.entries()) == []
    (listed,) = list_engines(store)
    assert listed.state == "damaged"
    (pruned,) = prune_engines(store)
    assert pruned.name == entry.name
    assert list_engines(store) == []


def test_no_edit_of_a_manifest_surprises(store: Store) -> None:
    """300 edits: the engine of its key, or none; a typed error, or an entry whose bytes are those that were built."""
    entry, untyped, refused = put(store), [], 0
    data = json.loads((entry.folder / MANIFEST).read_text())
    for name, changed in edits(data, 300, seed=14):
        (entry.folder / MANIFEST).write_text(json.dumps(changed))
        try:
            found = store.read_entry(entry.folder)
            assert found.key.digest == entry.key.digest
            found.read()
            list_engines(store)
        except FewstepError:
            refused += 1
        except Exception as error:
            untyped.append(f"{name}: {error!r}"[:300])
    assert not untyped, "\n".join(untyped)
    assert 100 < refused < 300


def test_a_new_engine_replaces_the_old_one_and_its_files(store: Store) -> None:
    old = put(store, content=b"old", data=b"old weights")
    new = put(store, content=b"new", data=b"new weights")
    assert not old.path.exists()
    assert sorted(p.name for p in new.folder.iterdir()) == sorted([MANIFEST, new.file, str(new.data and new.data[0])])
    assert bytes(new.read()) == b"new"


def test_an_empty_engine_is_never_committed(store: Store) -> None:
    old = put(store)
    with pytest.raises(CorruptError, match="wrote no engine"):
        put(store, content=b"")
    assert bytes(store.read_entry(old.folder).read()) == b"an engine"


def test_what_a_killed_builder_left_is_swept(store: Store) -> None:
    entry = put(store)
    (entry.folder / "engine.999.onnx.part").write_bytes(b"half")
    other = replace(KEY, dtype="float16")
    store.entry_folder(other).mkdir(mode=0o700)
    (store.entry_folder(other) / "engine.999.onnx.part").write_bytes(b"half of another")
    pruned = prune_engines(store, stale=False)
    assert {p.name for p in pruned} == {entry.name, store.entry_folder(other).name}
    assert sum(p.length for p in pruned) == len(b"half") + len(b"half of another")
    assert not store.entry_folder(other).exists()
    assert bytes(entry.read()) == b"an engine"


def test_a_pinned_store_is_read_only_and_still(store: Store) -> None:
    entry = put(store)
    digest = store.digest()
    store.root.chmod(0o755)
    pinned = Store(store.root, pinned=f"sha256:{digest}")
    assert bytes(pinned.read_entry(entry.folder).read()) == b"an engine"
    with pytest.raises(MissingError, match="read-only"):
        put(pinned)
    with pytest.raises(ArgumentError, match="read-only"):
        prune_engines(pinned)
    edit(entry, facts={"layers": 4})
    with pytest.raises(MismatchError, match="changed after"):
        pinned.read_entry(entry.folder)
    with pytest.raises(MismatchError, match=rf"expected {digest[:9]}"):
        Store(store.root, pinned=digest)
    entry.path.write_bytes(b"AN ENGINE")
    store.root.chmod(0o700)
    with pytest.raises(CorruptError):
        Store(store.root, pinned=store.digest()).read_entry(entry.folder).read()


def test_a_pin_notices_an_added_or_a_removed_engine(store: Store) -> None:
    entry = put(store)
    digest = store.digest()
    other = put(store, replace(KEY, dtype="float16"))
    with pytest.raises(MismatchError, match="pinned"):
        Store(store.root, pinned=digest)
    shutil.rmtree(other.folder)
    Store(store.root, pinned=digest)
    shutil.rmtree(entry.folder)
    with pytest.raises(MismatchError, match="pinned"):
        Store(store.root, pinned=digest)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become another user")
def test_engines_baked_into_a_container_run_as_another_user(bundle: Bundle, tmp_path: Path) -> None:
    """Built by root, copied where all may read, opened by a user who may write nothing."""
    store = Store(tmp_path / "engines")
    build_engines(bundle, backend="ort-cpu", store=store, gate=False)
    script = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "import onnxruntime, filelock, platformdirs, fewstep.engines.backends.ort_build\n"
        "from fewstep.bundle import read_bundle\n"
        "from fewstep.engines import Store, open_engine\n"
        "os.setgid(12345)\n"
        "os.setuid(12345)\n"
        "store = Store(Path(sys.argv[1]), pinned=sys.argv[2])\n"
        "bundle = read_bundle(sys.argv[3])\n"
        "for name in bundle.components:\n"
        "    print(open_engine(bundle, name, backend='ort-cpu', store=store, build='never').backend)\n"
    )
    with_access = Path("/tmp") / f"fewstep-test-{os.getpid()}"  # noqa: S108 a folder of its own name, where another user may enter
    try:
        shutil.copytree(store.root, with_access / "engines")
        shutil.copytree(bundle.folder, with_access / "bundle")
        for path in (with_access, *with_access.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        command = [
            sys.executable,
            "-c",
            script,
            str(with_access / "engines"),
            store.digest(),
            str(with_access / "bundle"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["ort-cpu"] * 3
        refused = subprocess.run([*command[:4], "0" * 64, command[5]], capture_output=True, text=True, check=False)
        assert "pinned" in refused.stderr
    finally:
        shutil.rmtree(with_access, ignore_errors=True)


def test_two_builders_at_once_make_one_build(bundle: Bundle, store: Store) -> None:
    start, results = threading.Barrier(4), []

    def work() -> None:
        start.wait()
        mine = Store(store.root)
        results.append(build_engines(bundle, backend="ort-cpu", components=["unet"], store=mine)["unet"])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(r.reused for r in results) == [False, True, True, True]
    assert len({r.entry.path for r in results}) == 1


def test_prune_by_age_size_and_state(store: Store) -> None:
    keys = [replace(KEY, dtype=d) for d in ("float32", "float16", "bfloat16")]
    entries = [put(store, k, content=bytes([i]) * 10_000) for i, k in enumerate(keys)]
    for age, entry in enumerate(entries):
        os.utime(entry.path, (1_700_000_000 - age, 1_700_000_000 - age))
    assert [listed.state for listed in list_engines(store)] == ["other machine or version"] * 3
    assert prune_engines(store, stale=False) == []
    planned = prune_engines(store, stale=False, keep_bytes=15_000, dry_run=True)
    assert [p.name for p in planned] == [entries[2].name, entries[1].name]
    assert len(list_engines(store)) == 3
    store.record_gate(entries[0], {"passed": False, "reason": "off"})
    assert [p.name for p in prune_engines(store, stale=False)] == [entries[0].name]
    assert len(prune_engines(store, stale=False, unused_days=30)) == 2
    put(store)
    (gone,) = prune_engines(store)
    assert "backend version 1.0, here" in gone.reason


def test_prune_leaves_an_engine_that_is_being_built(store: Store) -> None:
    entry = put(store)
    with store.lock(KEY):
        assert prune_engines(store, everything=True) == []
    assert bytes(entry.read()) == b"an engine"
    assert [p.name for p in prune_engines(store, everything=True)] == [entry.name]


def test_an_unknown_or_ambiguous_name_is_refused(store: Store) -> None:
    put(store)
    put(store, replace(KEY, dtype="float16"))
    with pytest.raises(MissingError, match="engines list"):
        show_engine(store, "vae")
    with pytest.raises(ArgumentError, match="2 engines are called 'unet"):
        show_engine(store, "unet")


def test_an_engine_that_failed_the_gate_is_never_opened(bundle: Bundle, store: Store) -> None:
    built = build_engines(bundle, backend="ort-cpu", components=["unet"], store=store)["unet"]
    store.record_gate(built.entry, {"passed": False, "reason": "relative error 1e-1"})
    for policy in ("never", "if_missing"):
        with pytest.raises(GateError, match=r"relative error 1e-1.*--force"):
            open_engine(bundle, "unet", backend="ort-cpu", store=store, build=policy)


def test_the_default_store_heeds_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE_DIR", str(tmp_path / "cache"))
    store = default_store()
    assert store.root == tmp_path / "cache" / "engines"
    put(store)
    monkeypatch.setenv("FEWSTEP_STORE_DIGEST", store.digest())
    assert default_store().read_only
    monkeypatch.setenv("FEWSTEP_STORE_DIGEST", "0" * 64)
    with pytest.raises(MismatchError):
        default_store()
    monkeypatch.setenv("FEWSTEP_CACHE_DIR", str(tmp_path / "none"))
    with pytest.raises(MissingError, match="no engine store"):
        default_store()


def test_a_full_disk_leaves_the_old_engine(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file system refuses the new manifest: a folder stands where its temporary file would go."""
    old = put(store)
    blocked = old.folder / f"{MANIFEST}.{os.getpid()}.part"
    with store.lock(KEY):
        part = store.part(KEY, "onnx")
        blocked.mkdir()
        part.write_bytes(b"new")
        with pytest.raises((OSError, FewstepError)):
            store.commit(KEY, part, built={}, facts={})
    blocked.rmdir()
    assert bytes(store.read_entry(old.folder).read()) == b"an engine"
