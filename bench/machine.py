"""What the figures were taken on."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from ..engines.machine import cpu_identity
from ..version import __version__


def describe(threads: int) -> dict[str, Any]:
    """Processor, cores, memory, Python, and this package's own version."""
    name, capability = cpu_identity()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    load = os.getloadavg() if hasattr(os, "getloadavg") else ()
    return {
        "processor": _model() or name,
        "instruction_sets": capability,
        "cores": os.cpu_count(),
        "threads": threads or os.cpu_count(),
        "memory_gb": round(memory / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "fewstep": __version__,
        "numpy": metadata.version("numpy"),
        "load_average_before": [round(v, 2) for v in load],
    }


def _model() -> str:
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return ""
    for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return ""
