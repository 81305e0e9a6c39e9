"""What the tests of the engines share: a small bundle, made once, and a store of their own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

from fewstep.bundle import Bundle
from fewstep.engines import Store
from small_bundle import write_bundle


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("bundle") / "small")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "engines")
