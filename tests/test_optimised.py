"""Python's own flags change nothing: under `-O` and `-OO` the same pictures and the same refusals, word for word."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fewstep.export.embedded import embedded_checkpoint

SCRIPT = Path(__file__).with_name("optimised_run.py")


def printed(tmp_path: Path, *flags: str) -> list[str]:
    folder = tmp_path / "work"
    folder.mkdir()
    command = [sys.executable, *flags, str(SCRIPT), str(folder), str(embedded_checkpoint("student"))]
    environment = {**os.environ, "FEWSTEP_CACHE_DIR": str(folder / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return printed(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("flag", ["-O", "-OO"])
def test_the_same_pictures_and_the_same_refusals(plain: list[str], tmp_path: Path, flag: str) -> None:
    found = printed(tmp_path, flag)
    assert found == plain
    made = [line for line in plain if ": done, " in line]
    refused = [line for line in plain if "Error " in line]
    assert len(set(made)) == 4
    assert len(refused) > 30
    assert len(made) + len(refused) + 1 == len(plain), plain
