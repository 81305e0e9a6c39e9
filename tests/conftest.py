"""Tiny random checkpoints of each family, made with diffusers and exported once a test run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
if not Path("/proc/driver/nvidia/version").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # without a GPU, kernels are run by Triton's interpreter

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder of the run's own: tests never see what a user has built."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["FEWSTEP_CACHE_DIR"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from checkpoints import make_sd1

    return make_sd1(tmp_path_factory.mktemp("sd1") / "tiny-sd1")


@pytest.fixture(scope="session")
def tiny_sd2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from checkpoints import make_sd2

    return make_sd2(tmp_path_factory.mktemp("sd2") / "tiny-sd2")


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from checkpoints import make_sdxl

    return make_sdxl(tmp_path_factory.mktemp("sdxl") / "tiny-sdxl")


def _exported(checkpoint: Path):
    from fewstep.export import export_bundle

    return export_bundle(checkpoint, checkpoint.parent / "bundle")


@pytest.fixture(scope="session")
def sd1_bundle(tiny_sd1: Path):
    return _exported(tiny_sd1)


@pytest.fixture(scope="session")
def sd2_bundle(tiny_sd2: Path):
    return _exported(tiny_sd2)


@pytest.fixture(scope="session")
def sdxl_bundle(tiny_sdxl: Path):
    return _exported(tiny_sdxl)
