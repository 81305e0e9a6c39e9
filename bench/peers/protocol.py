"""What every worker speaks: one JSON object a line on stdin, one in answer on stdout.

`{"do": "load", ...}` loads the models, `{"do": "request", ...}` makes images, `{"do": "unet", ...}` evaluates the UNet
once. An answer has `ok`; `error` says why it is false. Arrays travel as `.npy` files that the question names. Imports
the standard library alone until the peer asks for more, so that a worker's start is its contender's own.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol


class Peer(Protocol):
    """A contender. `stages` of a request are milliseconds by name; `evaluations` is a list."""

    packages: tuple[str, ...]

    def load(self, spec: dict[str, Any]) -> dict[str, Any]:
        """Load the models; returns facts for the report (engine keys, say)."""

    def request(self, spec: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Images uint8 [B, H, W, 3], and the stages."""

    def unet(self, inputs: dict[str, Any]) -> Any:
        """One evaluation of the UNet; `inputs` are float32 arrays by ONNX name, the output float32 [R, 4, h, w]."""


class Stages:
    """Times calls of a library's own methods, by name."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = {}

    def clear(self) -> None:
        self.spent.clear()

    def wrap(self, owner: Any, attribute: str, stage: str) -> None:
        """Put a timer round `owner.attribute`; nested calls of one stage count once."""
        inner = getattr(owner, attribute)
        depth = 0

        def timed(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            depth += 1
            began = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                depth -= 1
                if not depth:
                    self.spent.setdefault(stage, []).append(1e3 * (time.perf_counter() - began))

        setattr(owner, attribute, timed)

    def report(self) -> dict[str, Any]:
        """Sums by stage; the evaluations one by one."""
        return {k: (list(v) if k == "evaluations" else sum(v)) for k, v in self.spent.items()}


def peak_mb() -> float:
    """The largest resident set this process has had, in MB (10^6 bytes)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0


def serve(make: Callable[[], Peer]) -> None:
    """Answer questions until stdin ends. Whatever libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    peer: Peer | None = None
    for line in sys.stdin:
        question = json.loads(line)
        if question["do"] == "quit":
            break
        try:
            if peer is None:
                began = time.perf_counter()
                peer = make()
                answer = {"import_ms": 1e3 * (time.perf_counter() - began)}
            else:
                answer = {}
            answer |= _answer(peer, question)
            answer |= {"ok": True, "peak_mb": peak_mb()}
        except Exception as error:  # the worker's one duty is to say what went wrong
            answer = {"ok": False, "error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]}
        print(json.dumps(answer), file=answers, flush=True)


def _answer(peer: Peer, question: dict[str, Any]) -> dict[str, Any]:
    began, cpu = time.perf_counter(), time.process_time()
    if question["do"] == "load":
        facts = peer.load(question)
        return {"load_ms": _since(began), "facts": facts, "versions": dict(_versions(peer.packages))}
    import numpy as np

    if question["do"] == "request":
        images, stages = peer.request(question)
        wall = _since(began)
        if question.get("save"):
            np.save(question["save"], np.asarray(images))
        return {"wall_ms": wall, "cpu_ms": 1e3 * (time.process_time() - cpu), "stages": stages}
    with np.load(question["inputs"]) as given:
        inputs = dict(given)
    began, cpu = time.perf_counter(), time.process_time()
    out = peer.unet(inputs)
    wall, spent = _since(began), 1e3 * (time.process_time() - cpu)
    if question.get("save"):
        np.save(question["save"], np.asarray(out))
    return {"wall_ms": wall, "cpu_ms": spent, "stages": {}}


def _versions(packages: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            yield name, metadata.version(name)


def _since(began: float) -> float:
    return 1e3 * (time.perf_counter() - began)
