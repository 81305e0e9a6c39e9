"""What this machine is, as far as an engine depends on it: the processor and its instructions, the GPU."""

from __future__ import annotations

import functools
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from ..errors import MissingError, MissingExtraError

# The instruction sets by which ONNX Runtime's kernels and weight layouts differ.
_ISA = (
    "sse4_1 sse4_2 avx avx2 fma f16c avx_vnni avx512f avx512bw avx512vl avx512_vnni avx512_bf16 avx512_fp16 "
    "amx_tile amx_bf16 amx_int8 asimd asimdhp asimddp i8mm bf16 sve sve2"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A CUDA device: its name, compute capability (`"8.9"`), free memory in bytes, and the driver's version."""

    index: int
    name: str
    compute_capability: str
    free_bytes: int
    driver: str


@functools.cache
def cpu_identity() -> tuple[str, str]:
    """The processor's name and those of its instruction sets that matter, as one word string each."""
    name, flags = platform.processor() or platform.machine(), set[str]()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines():
            label, _, value = line.partition(":")
            label = label.strip().casefold()
            if label == "model name":
                name = value.strip()
            elif label in {"flags", "features"}:
                flags = set(value.split())
    return name, " ".join(f for f in _ISA.split() if f in flags) or platform.machine()


def has_vnni() -> bool:
    """Whether the processor is known to sum products of four pairs of 8-bit integers in 32 bits (x86's VNNI)."""
    return not {"avx_vnni", "avx512_vnni"}.isdisjoint(cpu_identity()[1].split())


def os_identity() -> str:
    return f"{sys.platform} {platform.machine().casefold()}"


def has_gpu_driver() -> bool:
    """Whether an NVIDIA driver is loaded; loads nothing and asks no library."""
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists() or _windows_driver()


def _windows_driver() -> bool:
    return sys.platform == "win32" and Path("C:/Windows/System32/nvcuda.dll").exists()


def check_driver() -> None:
    """Raise `MissingError` where no NVIDIA driver is loaded."""
    if not has_gpu_driver():
        raise MissingError(
            "no NVIDIA driver is loaded", expected="a CUDA device", remedy="Use a backend for the CPU on this machine."
        )


def gpu(index: int = 0) -> Gpu:
    """The CUDA device with this index; `MissingError` when there is none, `MissingExtraError` without nvidia-ml-py."""
    check_driver()
    try:
        import pynvml
    except ImportError as error:
        raise MissingExtraError("pynvml", "cuda", purpose="asking for the GPU's name") from error
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        return Gpu(
            index=index,
            name=str(pynvml.nvmlDeviceGetName(handle)),
            compute_capability=f"{major}.{minor}",
            free_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).free),
            driver=str(pynvml.nvmlSystemGetDriverVersion()),
        )
    except pynvml.NVMLError as error:
        raise MissingError(f"the NVIDIA driver gives no device {index}: {error}", expected="a CUDA device") from error


def peak_memory() -> int | None:
    """The most memory that this process has held so far, in bytes; `None` where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available_memory() -> int | None:
    """Host memory in bytes that a process could take without swapping, in its control group; `None`: unknown."""
    limits = []
    info = Path("/proc/meminfo")
    if info.is_file():
        lines = dict(line.split(":", 1) for line in info.read_text(encoding="ascii").splitlines() if ":" in line)
        if "MemAvailable" in lines:
            limits.append(int(lines["MemAvailable"].split()[0]) * 1024)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file():
        text = limit.read_text(encoding="ascii").strip()
        if text.isdigit():
            limits.append(max(0, int(text) - int(used.read_text(encoding="ascii"))))
    return min(limits) if limits else None
