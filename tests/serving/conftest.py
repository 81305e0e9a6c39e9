"""A server of the embedded student, as most tests here use it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import fewstep
import numpy as np
import pytest
from fewstep.serving import Server

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def student() -> fewstep.Pipeline:
    from fewstep.export.embedded import embedded_bundle

    return fewstep.load(embedded_bundle("student")[0], threads=1)


@pytest.fixture(scope="module")
def server(student: fewstep.Pipeline) -> Iterator[Server]:
    with Server(student, most_slots=16, most_rows=8, queue=200, most_work_s=600.0) as made:
        yield made


@pytest.fixture(scope="session")
def psnr():
    """Decibels between uint8 images; infinity when they are equal."""

    def measure(a: np.ndarray, b: np.ndarray) -> float:
        error = np.mean((a.astype(np.float64) - b) ** 2)
        return float("inf") if error == 0 else float(10 * np.log10(255.0**2 / error))

    return measure
