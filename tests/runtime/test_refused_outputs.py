"""Pictures, clips and plots on a disk that is full: what is written there says what, where and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from fewstep.errors import ArgumentError, WriteError
from fewstep.runtime.pictures.images import FORMATS, check_output, save_picture
from fewstep.runtime.pictures.video import WRITERS, save_clips
from fewstep.schedules import NoiseSchedule, compile_program
from small_disk import PAGE, SmallDisk, small_disk

NOISE = np.random.default_rng(0).integers(0, 256, (8, 96, 96, 3), np.uint8)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallDisk]:
    with small_disk(tmp_path_factory.mktemp("full") / "disk") as made:
        made.resize(2 * PAGE)
        yield made


def plot(path: Path) -> None:
    pytest.importorskip("matplotlib")
    from fewstep.schedules.plot import plot_schedules

    plot_schedules([compile_program("euler", steps=4, noise=NoiseSchedule.scaled_linear())], path)


def write(kind: str) -> Callable[[Path], object]:
    if kind == "plot":
        return plot
    if kind == "clip":
        return lambda path: save_clips(path, NOISE[None], 7, [{}])
    return lambda path: save_picture(path, NOISE[0])


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [*(("picture", s) for s in FORMATS), *(("clip", s) for s in (*WRITERS, "")), ("plot", ".png")],
)
def test_a_full_disk_is_told_with_what_and_where(disk: SmallDisk, kind: str, suffix: str) -> None:
    if suffix == ".avif":
        try:
            check_output(disk.path / "x.avif")
        except ArgumentError as error:
            pytest.skip(str(error))
    if suffix == ".mp4":
        pytest.importorskip("av")
    with pytest.raises(WriteError, match="the disk is full") as told:
        write(kind)(disk.path / f"{kind}{suffix}")
    assert str(disk.path) in told.value.found
    assert ("the plot" if kind == "plot" else f"{kind}{suffix}" if suffix else ".png") in told.value.found
    assert not [p for p in disk.path.rglob("*") if p.is_file() and p.name.endswith(".part")]
