"""Worker processes: who the contenders are, how their processes start, and the conversation with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FewstepError, MissingError, UnknownNameError

PEERS = Path(__file__).with_name("peers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One contender: the script that is its worker, and the virtual environment that runs it (`None`: this one).

    precisions: those that it can have; the first where none of those that are asked for is among them.
    """

    name: str
    script: str
    environment: str | None
    precisions: tuple[str, ...] = ("float32", "bfloat16")


OPENVINO = "fewstep on OpenVINO"
CONTENDERS = {
    c.name: c
    for c in (
        Contender(name="fewstep", script="ours.py", environment=None),
        Contender(name=OPENVINO, script="ours.py", environment="fewstep-openvino"),
        Contender(name="diffusers", script="eager.py", environment="torch"),
        Contender(name="compile", script="compiled.py", environment="torch"),
        Contender(name="optimum", script="optimum_onnx.py", environment="optimum", precisions=("float32",)),
        Contender(name="openvino", script="openvino_loop.py", environment="openvino"),
        Contender(name="nncf", script="nncf_loop.py", environment="openvino", precisions=("int8",)),
        Contender(name="optimum-intel", script="optimum_intel.py", environment="optimum-intel", precisions=("int8",)),
    )
}


class PeerError(FewstepError):
    """A contender cannot run; the report names it with this error."""


def contender(name: str) -> Contender:
    if name not in CONTENDERS:
        raise UnknownNameError("peer", name, tuple(CONTENDERS))
    return CONTENDERS[name]


def backend_python(backend: str, environments: Path) -> Path | None:
    """The Python in which fewstep runs a backend whose package excludes this environment's; `None`: this one does."""
    return interpreter(CONTENDERS[OPENVINO], environments) if backend.startswith("ort-openvino") else None


def interpreter(who: Contender, environments: Path) -> Path:
    """The Python that runs a contender's worker; `MissingError` when its environment was not made."""
    if who.environment is None:
        return Path(sys.executable)
    path = environments / who.environment / "bin" / "python"
    if not path.is_file():
        raise MissingError(
            f"the peer {who.name!r} has no virtual environment at {path}",
            remedy="Make the peers' environments with: make bench-peers",
        )
    return path


class ContenderWorker:
    """A contender's process. It is started by the first question and ended by `close`.

    `store` is where fewstep keeps engines, if not where it does by itself.
    """

    def __init__(
        self,
        who: Contender,
        *,
        environments: Path,
        threads: int,
        python: Path | None = None,
        store: Path | None = None,
    ) -> None:
        self.who = who
        self.python = python or interpreter(who, environments)
        count = str(threads or os.cpu_count() or 1)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": count,
            "MKL_NUM_THREADS": count,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TORCHINDUCTOR_CACHE_DIR": str((environments / "inductor").absolute()),
        }
        if store is not None:
            environment["FEWSTEP_CACHE_DIR"] = str(store)
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - a pipe that nobody reads would fill
        self.began = time.perf_counter()
        self._process = subprocess.Popen(  # noqa: S603 this interpreter, or a program of this project, with a list of arguments and no shell
            [str(self.python.absolute()), str(PEERS / who.script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=environment,
            text=True,
        )

    def ask(self, **question: Any) -> dict[str, Any]:
        """One question, one answer; `PeerError` with the worker's own words when it could not."""
        talk = self._process
        if talk.stdin is None or talk.stdout is None:
            raise PeerError(f"the worker of {self.who.name!r} has no pipes")
        try:
            talk.stdin.write(json.dumps(question) + "\n")
            talk.stdin.flush()
            line = talk.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise PeerError(f"the worker of {self.who.name!r} ended: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if not answer["ok"]:
            raise PeerError(f"{self.who.name}: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        code = self._process.wait()
        self._stderr.seek(0)
        words = self._stderr.read().decode("utf-8", "replace")
        return f"exit code {code}; {' '.join(words.split()[-40:])}"

    def close(self) -> None:
        if self._process.poll() is None and self._process.stdin is not None:
            try:
                self._process.stdin.write('{"do": "quit"}\n')
                self._process.stdin.close()
                self._process.wait(timeout=10)
            except (BrokenPipeError, subprocess.TimeoutExpired):
                self._process.kill()
                self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._stderr.close()
