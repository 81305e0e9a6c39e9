"""What libraries raise that is no `Exception`: a typed error for its request, and the next one is served."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from pathlib import Path

import fewstep
import pytest
from fewstep.errors import CorruptError, FewstepError
from fewstep.runtime.prompts import encoders
from fewstep.serving import Server
from fewstep.serving.worker import DueWorker

GIVES_UP = "a" * 36 + "!"


@pytest.fixture
def stubborn(student: fewstep.Pipeline, tmp_path: Path) -> fewstep.Pipeline:
    """A bundle whose tokenizer has a rule that gives up on some prompts, with the digest that such a file has."""
    folder = shutil.copytree(student.bundle.folder, tmp_path / "stubborn")
    manifest = json.loads((folder / "bundle.json").read_text())
    (record,) = manifest["tokenizers"]
    rules = json.loads((folder / record["file"]).read_text())
    rules["normalizer"] = {"type": "Replace", "pattern": {"Regex": "(a|aa)*$"}, "content": ""}
    (folder / record["file"]).write_text(json.dumps(rules))
    record["sha256"] = hashlib.sha256((folder / record["file"]).read_bytes()).hexdigest()
    (folder / "bundle.json").write_text(json.dumps(manifest))
    return fewstep.load(folder, threads=1)


def test_a_tokenizer_that_gives_up_is_corrupt(stubborn: fewstep.Pipeline) -> None:
    with pytest.raises(CorruptError, match=r"tokenizer\.json cannot read the prompt"):
        stubborn(GIVES_UP, steps=1, seed=1)
    with Server(stubborn) as server:
        tickets = [server.submit(p, steps=1, seed=1) for p in (GIVES_UP, "b", GIVES_UP, "b")]
        for ticket in tickets[::2]:
            with pytest.raises(CorruptError, match="cannot read the prompt"):
                ticket.result(60)
        assert all(len(t.result(60).images) == 1 for t in tickets[1::2])


def test_whatever_is_raised_fails_one_request(student: fewstep.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = encoders.TextEncoders.encode

    def exits(self: encoders.TextEncoders, prompts, *rest, **more):
        if any("leave" in str(p) for p in prompts):
            raise SystemExit(3)
        return encode(self, prompts, *rest, **more)

    monkeypatch.setattr(encoders.TextEncoders, "encode", exits)
    with Server(student) as server:
        failing, working = (server.submit(p, steps=1, seed=1) for p in ("leave", "stay"))
        with pytest.raises(FewstepError, match=r"could not be prepared \(SystemExit\)"):
            failing.result(60)
        assert len(working.result(60).images) == 1


def test_a_job_that_raises_does_not_end_its_thread() -> None:
    def leaves() -> None:
        raise SystemExit(1)

    worker, done = DueWorker("test"), threading.Event()
    worker.put(0.0, leaves)
    worker.put(1.0, done.set)
    assert done.wait(10)
    worker.close(10)
