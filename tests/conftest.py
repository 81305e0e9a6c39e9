"""Tiny random checkpoints of each family, made with diffusers and exported once a test run."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # each of several processes has one thread: it inherits what the process that shares out the tests has set below
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
if not Path("/proc/driver/nvidia/version").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # without a GPU, kernels are run by Triton's interpreter

import pytest
from filelock import FileLock

if TYPE_CHECKING:
    from fewstep.bundle import Bundle

sys.path.insert(0, str(Path(__file__).parent))
gc.set_threshold(50_000, 20, 20)  # traces make millions of objects that stay: looking at them all cost a tenth
Once = Callable[[str, Callable[[Path], object]], Path]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not os.environ.get("FEWSTEP_SLOW_TESTS"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: run by make test-slow"))


@pytest.fixture(scope="session")
def of_the_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this run share, and no other run."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "of-the-run"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, of_the_run: Path) -> Path:
    """A cache folder of the run's own: tests never see what a user has built. Its processes share traced graphs."""
    folder, graphs = tmp_path_factory.mktemp("cache"), of_the_run / "graphs"
    graphs.mkdir(exist_ok=True)
    (folder / "graphs").symlink_to(graphs)
    os.environ["FEWSTEP_CACHE_DIR"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory, of_the_run: Path) -> Once:
    """A folder that one process of the run makes, and of which every process has a copy."""

    def copied(name: str, make: Callable[[Path], object]) -> Path:
        place = of_the_run / name
        with FileLock(f"{place}.lock"):
            if not (place / "whole").exists():
                make(place / name)
                (place / "whole").touch()
        return Path(shutil.copytree(place / name, tmp_path_factory.mktemp(name) / name))

    return copied


@pytest.fixture(scope="session")
def tiny_sd1(made_once: Once) -> Path:
    from checkpoints import make_sd1

    return made_once("tiny-sd1", make_sd1)


@pytest.fixture(scope="session")
def deepfloyd(made_once: Once) -> Path:
    """DeepFloyd-IF's two stages: the checkpoints if-i and if-ii, and the bundles first and second."""
    from fewstep.export import export_bundle
    from pixel_checkpoints import make_first, make_second

    def make(folder: Path) -> None:
        folder.mkdir(parents=True)
        export_bundle(make_first(folder / "if-i"), folder / "first", gate=False)
        export_bundle(make_second(folder / "if-ii"), folder / "second", quick_gate=True)

    return made_once("deepfloyd", make)


@pytest.fixture(scope="session")
def tiny_sd2(made_once: Once) -> Path:
    from checkpoints import make_sd2

    return made_once("tiny-sd2", make_sd2)


@pytest.fixture(scope="session")
def tiny_sdxl(made_once: Once) -> Path:
    from checkpoints import make_sdxl

    return made_once("tiny-sdxl", make_sdxl)


def _exported(made_once: Once, name: str, checkpoint: Path) -> Bundle:
    from fewstep.bundle import read_bundle
    from fewstep.export import export_bundle

    return read_bundle(made_once(name, lambda folder: export_bundle(checkpoint, folder, name="bundle")))


@pytest.fixture(scope="session")
def sd1_bundle(made_once: Once, tiny_sd1: Path) -> Bundle:
    return _exported(made_once, "sd1-bundle", tiny_sd1)


@pytest.fixture(scope="session")
def sd2_bundle(made_once: Once, tiny_sd2: Path) -> Bundle:
    return _exported(made_once, "sd2-bundle", tiny_sd2)


@pytest.fixture(scope="session")
def sdxl_bundle(made_once: Once, tiny_sdxl: Path) -> Bundle:
    return _exported(made_once, "sdxl-bundle", tiny_sdxl)


class Clips(NamedTuple):
    """A checkpoint's folder that makes clips, and its bundle."""

    checkpoint: Path
    bundle: Any


def _clips(made_once: Once, name: str, *, gate: bool, **unet: Any) -> Clips:
    from clips import make_svd
    from fewstep.bundle import read_bundle
    from fewstep.export import export_bundle

    def make(folder: Path) -> None:
        export_bundle(make_svd(folder / "model", **unet), folder / "bundle", name="bundle", gate=gate)

    folder = made_once(name, make)
    return Clips(folder / "model", read_bundle(folder / "bundle"))


@pytest.fixture(scope="session")
def tiny_svd(made_once: Once) -> Clips:
    return _clips(made_once, "tiny-svd", gate=True)


@pytest.fixture(scope="session")
def other_svd(made_once: Once) -> Clips:
    """Attention at the second level alone, other heads and widths, and six frames."""
    kinds = {
        "down_block_types": ("DownBlockSpatioTemporal", "CrossAttnDownBlockSpatioTemporal"),
        "up_block_types": ("CrossAttnUpBlockSpatioTemporal", "UpBlockSpatioTemporal"),
    }
    more = {"num_attention_heads": (1, 2), "block_out_channels": (64, 32), "vision": {"patch_size": 112}}
    return _clips(made_once, "other-svd", gate=False, seed=70, num_frames=6, **kinds, **more)


class Adapted(NamedTuple):
    """A checkpoint's folder, ControlNets by name, an IP-Adapter's file, and the bundle with all of them.

    Where latents may be of any size, there is a T2I adapter too, of the name `sketch`.
    """

    checkpoint: Path
    controlnets: dict[str, Path]
    ip_adapter: Path
    bundle: Any


def _adapted(made_once: Once, name: str, checkpoint: Path, *, plus: bool, **depth: object) -> Adapted:
    from adapters import make_controlnet, make_ip_adapter, make_t2i_adapter
    from fewstep.bundle import read_bundle
    from fewstep.export import export_bundle

    names = ("canny", "depth")

    def make(folder: Path) -> None:
        nets = {n: make_controlnet(checkpoint, folder / n, 20 + i, **(depth if i else {})) for i, n in enumerate(names)}
        nets |= {} if plus else {"sketch": make_t2i_adapter(folder / "sketch", 41)}
        ip_adapter = make_ip_adapter(checkpoint, folder / "ip", 31, kind="plus" if plus else "plain")
        export_bundle(checkpoint, folder / "bundle", controlnets=nets, ip_adapter=ip_adapter)

    folder = made_once(name, make)
    controlnets = {n: folder / n for n in names}
    return Adapted(checkpoint, controlnets, folder / "ip" / "ip-adapter.safetensors", read_bundle(folder / "bundle"))


@pytest.fixture(scope="session")
def adapted_sd1(made_once: Once, tiny_sd1: Path) -> Adapted:
    return _adapted(made_once, "adapted-sd1", tiny_sd1, plus=False)


@pytest.fixture(scope="session")
def adapted_sdxl(made_once: Once, tiny_sdxl: Path) -> Adapted:
    return _adapted(made_once, "adapted-sdxl", tiny_sdxl, plus=True, global_pool_conditions=True)
