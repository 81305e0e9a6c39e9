"""Folders that appear whole or not at all: killed at every point, beside a living writer, and what is put back."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fewstep import places
from fewstep.bundle import read_bundle
from fewstep.errors import MissingError
from fewstep.export import export_bundle
from fewstep.export.embedded import embedded_checkpoint
from small_disk import small_disk

posix = pytest.mark.skipif(os.name != "posix", reason="folders are locked by POSIX systems alone")
linux = pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")

DYING = """
import os, sys
from pathlib import Path
from fewstep import places

target, way = Path(sys.argv[1]), sys.argv[2]
if way == "in two":
    places.exchange = lambda one, other: False  # as a file system without it answers

def write(point):
    seen = 0
    def hook(event, arguments):
        nonlocal seen
        if any(str(target.parent) in str(a) for a in arguments):
            seen += 1
            if seen == point:
                os._exit(77)
    sys.addaudithook(hook)
    with places.staging_folder(target) as folder:
        for name in ("one", "two"):
            (folder / name).write_text("new")
        places.put_in_place(folder, target)

point = int(sys.argv[3])
while True:
    child = os.fork()
    if not child:
        try:
            write(point)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(code, flush=True)
    if sys.stdin.readline() != "on\\n":
        break
    point += 1
"""


def old_at(target: Path) -> None:
    target.mkdir(exist_ok=True)
    for name in ("one", "two"):
        (target / name).write_text("old")


def state(target: Path) -> set[str]:
    """Old, new, or both where it is torn; the folder must have both files."""
    return {(target / name).read_text() for name in ("one", "two")}


def beside(target: Path) -> list[str]:
    return sorted(p.name for p in target.parent.iterdir() if p != target)


@posix
@pytest.mark.parametrize("way", [pytest.param("exchanged", marks=linux), "in two"])
def test_killed_at_any_point_it_leaves_the_old_or_the_new(tmp_path: Path, way: str) -> None:
    """A process dies before its first, second, ... call of the system that concerns the folder."""
    target = tmp_path / "there" / "bundle"
    target.parent.mkdir()
    command = [sys.executable, "-c", DYING, str(target), way, "1"]
    codes, ends, gone, left = [], [], 0, 0
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        while not codes or codes[-1] == 77:
            old_at(target)  # before the process is told to go on
            if codes:
                process.stdin.write("on\n")
                process.stdin.flush()
            codes.append(int(process.stdout.readline()))
            gone += not target.exists()
            left += bool(beside(target))
            assert target.exists() or places.put_back(target)
            ends.append(state(target))
            with places.staging_folder(target) as folder:
                assert beside(target) == [folder.name], "what was left is swept"
            assert beside(target) == []
        process.stdin.write("end\n")
    assert codes[-1] == 0
    assert len(codes) > 10
    assert left > 3
    assert (gone > 0) == (way == "in two"), "in one step it is never away"
    assert all(e in ({"old"}, {"new"}) for e in ends), ends
    assert ends == sorted(ends, key=lambda e: e == {"new"})
    assert ends[0] == {"old"}
    assert ends[-1] == {"new"}


@posix
def test_a_living_writers_folder_is_left_alone_and_so_is_what_is_not_ours(tmp_path: Path) -> None:
    target = tmp_path / "b"
    others = [
        ".b.part",
        ".b.old",
        ".b.1.OLD",
        ".b.c.abcdefgh.part",
        ".c.abcdefgh.part",
        "b.abcdefgh.part",
        ".b.abcdefg.part",
    ]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / ".b.filefile.part").write_text("a file")
    (tmp_path / ".b.linklink.part").symlink_to(tmp_path / others[0])
    with places.staging_folder(target) as first, places.staging_folder(target) as second:
        assert places.sweep_left(target) == []
        (first / "x").write_text("1")
        (second / "x").write_text("2")
        places.put_in_place(first, target)
        places.put_in_place(second, target)
    assert (target / "x").read_text() == "2"
    assert beside(target) == sorted([*others, ".b.filefile.part", ".b.linklink.part"])


@pytest.mark.parametrize("replace", [places.put_in_place, places._replace_in_two])
def test_what_cannot_be_put_in_place_leaves_the_old_one(tmp_path: Path, replace: Callable[[Path, Path], None]) -> None:
    target = tmp_path / "b"
    old_at(target)
    with pytest.raises(FileNotFoundError):
        replace(tmp_path / "nothing", target)
    assert [p.name for p in tmp_path.iterdir()] == ["b"]
    assert state(target) == {"old"}


def put_aside(bundle: Path) -> Path:
    return bundle.rename(bundle.with_name(f".{bundle.name}.4711.old"))


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_bundle(embedded_checkpoint("student"), tmp_path_factory.mktemp("s") / "b", gate=False).folder


def test_a_bundle_that_was_put_aside_is_back_at_the_next_load_or_export(
    student: Path, caplog: pytest.LogCaptureFixture
) -> None:
    aside = put_aside(student)
    assert read_bundle(student).name == "b"
    assert not aside.exists()
    assert "an export that was killed had put it aside; it is back" in caplog.text
    put_aside(student)
    with pytest.raises(Exception, match="there is a bundle in"):
        export_bundle(embedded_checkpoint("student"), student, gate=False)
    (student.parent / ".b.4711.old").mkdir()
    assert read_bundle(student).name == "b", "where there is one, an older one does not replace it"
    with pytest.raises(MissingError, match="no bundle in"):
        read_bundle(student.parent / "c")


def test_a_copy_is_a_file_of_its_own(tmp_path: Path) -> None:
    """Whether its blocks are shared or not: what is written into one is not in the other."""
    first, second = tmp_path / "first", tmp_path / "second"
    data = random.Random(1).randbytes(3 << 20)
    first.write_bytes(data)
    second.write_bytes(b"longer than nothing")
    places.copy_file(first, second)
    assert second.read_bytes() == data
    with second.open("r+b") as file:
        file.write(b"changed")
    assert first.read_bytes() == data
    assert first.stat().st_nlink == second.stat().st_nlink == 1


def test_where_it_may_not_be_put_back_the_command_is_said(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        (disk.path / ".b.4711.old").mkdir()
        disk.resize(1 << 16, "ro")
        with pytest.raises(MissingError, match=r"killed while replacing it.*Read-only.*mv .*\.b\.4711\.old .*/b"):
            read_bundle(disk.path / "b")


EXPORTING = """
import logging, sys
from fewstep.export import export_bundle
from fewstep.export.embedded import embedded_checkpoint
print("ready", flush=True)
while True:
    export_bundle(embedded_checkpoint("student"), sys.argv[1], gate=False, overwrite=True)
"""


@posix
def test_a_killed_export_is_swept_by_the_next(student: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    draw, expected, left = random.Random(7), json.loads((student / "bundle.json").read_text()), 0
    for _ in range(4):
        with subprocess.Popen([sys.executable, "-c", EXPORTING, str(student)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            time.sleep(draw.uniform(0.02, 0.6))
            process.send_signal(signal.SIGKILL)
        left += len(beside(student))
        assert json.loads((student / "bundle.json").read_text()) == expected
        assert read_bundle(student).path("unet.safetensors").stat().st_size > 5_000_000
    assert left, "it was killed while it wrote"
    export_bundle(embedded_checkpoint("student"), student, gate=False, overwrite=True)
    assert beside(student) == []
    assert "left by an export that was killed" in caplog.text
