"""The door for Python: names for bundles, types, closing, what a shell and a notebook show, asyncio."""

from __future__ import annotations

import asyncio
import gc
import inspect
import io
import os
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import fewstep
import numpy as np
import pytest
from fewstep.commands import common, sampling
from fewstep.errors import ArgumentError, CancelledError, MissingError, UnavailableError, UnknownNameError
from fewstep.export.embedded import MODELS, embedded_bundle
from fewstep.runtime import Call, Cascade, Pipeline
from fewstep.runtime.diffusers_adapter import StableDiffusionPipeline
from fewstep.runtime.keywords import CallArguments, LoadOptions, SamplerOptions, SharedOptions
from fewstep.runtime.library import EMBEDDED
from PIL import Image

ROOT = Path(__file__).parents[2]
CIRCLE = "a red circle on a blue background"
WIDEST = 120


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with fewstep.load("student", threads=1) as loaded:
        yield loaded


def test_the_embedded_models_go_by_name_wherever_a_bundle_is_taken(pipe: Pipeline) -> None:
    kept = embedded_bundle("student")[0].folder
    assert pipe.bundle.folder == kept
    assert fewstep.load("student", devices=["cpu"]).bundle.folder == kept
    assert StableDiffusionPipeline.from_pretrained("student").pipeline.bundle.folder == kept
    with fewstep.Server("student", threads=1, most_slots=1, most_rows=1) as server:
        assert server.pipeline.bundle.folder == kept
    assert set(EMBEDDED) == set(common.EMBEDDED) == set(MODELS)


def test_a_folder_of_that_name_is_what_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "student").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingError, match="no bundle in 'student'"):
        fewstep.load("student")


def test_a_shell_completes_what_is_not_loaded_yet() -> None:
    assert set(fewstep.__all__) <= set(dir(fewstep))
    assert "TYPE_CHECKING" not in dir(fewstep)


def test_every_argument_of_a_call_is_one_that_type_checkers_see() -> None:
    own = {n: r.__forward_arg__ for n, r in inspect.get_annotations(CallArguments).items()}
    stated = {f.name: str(f.type) for f in fields(Call) if f.name != "prompt"}
    assert {n: own[n] for n in stated} == stated
    assert own.keys() == stated.keys() | sampling.OPTIONS.keys()
    assert SamplerOptions.__annotations__.keys() == sampling.OPTIONS.keys()


def test_every_option_of_a_pipeline_is_one_that_type_checkers_see() -> None:
    own = {n: r.__forward_arg__ for n, r in inspect.get_annotations(LoadOptions).items()}
    stated = {n: p.annotation for n, p in inspect.signature(Pipeline).parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert own == stated
    assert own.keys() - SharedOptions.__annotations__.keys() == {"device"}


def test_a_wrong_call_fails_to_type_check(tmp_path: Path) -> None:
    lines = {
        'pipe = fewstep.load("student", threads=1)': "",
        'pipe("x", steps=3, seed=[0, 1], eta=0.5, options={"beta_end": 0.01})': "",
        'fewstep.load("student", devices=["cpu"], budget="psnr>=30").request("x")': "",
        "with pipe: pipe.images": "attr-defined",
        'pipe("x", stepz=3)': "call-arg",
        'pipe("x", steps="3")': "arg-type",
        'pipe.request("x", guidence=1.0)': "call-arg",
        'pipe.acall("x", stepz=3)': "call-arg",
        'fewstep.load("student", thread=1)': "call-overload",
        'fewstep.load("student", devices=["cpu"], device="cpu")': "call-overload",
        'fewstep.Server(pipe).generate("x", sampler=3)': "arg-type",
        'fewstep.Server(pipe).submit("x", deadline=3.0)': "call-arg",
        'fewstep.Server(pipe).submit("x", deadline_s=3.0)': "",
    }
    snippet = tmp_path / "snippet.py"
    snippet.write_text("\n".join(["import fewstep", *lines]) + "\n", encoding="utf-8")
    place = ROOT / "build" / "mypy"  # as `make lint` has it, whose cache then serves
    place.mkdir(parents=True, exist_ok=True)
    if not (place / "fewstep").exists():
        (place / "fewstep").symlink_to("../..")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), str(snippet)],
        cwd=ROOT,
        env={**os.environ, "MYPYPATH": str(place)},
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout.splitlines()
    for at, (line, fault) in enumerate(lines.items(), start=2):
        about = [s for s in said if f"snippet.py:{at}: error" in s and not s.endswith("[unused-coroutine]")]
        assert bool(about) == bool(fault), (line, about, done.stderr)
        assert all(s.endswith(f"[{fault}]") for s in about), (line, about)


def test_a_wrong_argument_is_refused_with_the_nearest(pipe: Pipeline, tmp_path: Path) -> None:
    for call, near in (
        (lambda: pipe(CIRCLE, stepz=3), "steps"),
        (lambda: pipe.request(CIRCLE, guidence=1.0), "guidance"),
        (lambda: pipe(CIRCLE, etaa=0.5), "eta"),
        (lambda: fewstep.Server("student", batchh=3), "batch"),
        (lambda: fewstep.load("student", thread=3), "threads"),
        (lambda: fewstep.load("student", devicez=["cpu"]), "devices"),
    ):
        with pytest.raises(UnknownNameError) as refused:
            call()
        assert near in refused.value.near[:2]
    with pytest.raises(UnknownNameError, match="option of euler"):
        pipe(CIRCLE, steps=1, order=2)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(MissingError, match=re.escape(f"fewstep export {tmp_path} FOLDER")):
        fewstep.load(tmp_path)


def test_a_pipeline_is_closed_at_the_end_of_a_with() -> None:
    with fewstep.load("student", threads=1) as pipe:
        pipe(CIRCLE, steps=1, seed=0)
        engine = weakref.ref(pipe.vae)
        session = weakref.ref(pipe.engines["unet"]._session)
    gc.collect()
    assert engine() is session() is None, "the engines are kept"
    for use in (lambda: pipe(CIRCLE), lambda: pipe.request(CIRCLE), lambda: pipe.warm_up(), lambda: pipe.engines):
        with pytest.raises(UnavailableError, match="the pipeline is closed"):
            use()
    pipe.close()
    assert "closed" in repr(pipe)
    with pytest.raises(AttributeError, match="no attribute 'engine'"):
        pipe.engine  # noqa: B018


def test_closing_waits_for_requests_of_others_and_refuses_among_ones_own() -> None:
    pipe, order = fewstep.load("student", threads=1), list[str]()
    steps = pipe.stream(pipe.request(CIRCLE, steps=2, seed=0))
    next(steps)
    with pytest.raises(ArgumentError, match="not finished"):
        pipe.close()
    closing = threading.Thread(target=lambda: (pipe.close(), order.append("closed")))
    closing.start()
    order.append("made")
    steps.close()
    closing.join()
    assert order == ["made", "closed"]


def test_several_devices_and_a_cascade_close_too() -> None:
    group = fewstep.load("student", devices=["cpu", "cpu"], threads=1)
    assert repr(group) == "<PipelineGroup 'embedded-student': 2 on cpu, cpu>"
    with group as same:
        assert same(CIRCLE, steps=1, seed=[0, 1]).images.shape == (2, 64, 64, 3)
    with pytest.raises(UnavailableError):
        group(CIRCLE)
    assert issubclass(Cascade, type(group).__mro__[2])
    with pytest.raises(ArgumentError, match="device beside devices"):
        fewstep.load("student", devices=["cpu"], device="cpu")


def test_reprs_fit_a_line(pipe: Pipeline) -> None:
    result = pipe([CIRCLE] * 6, steps=1, seed=7)
    with fewstep.Server(pipe, most_slots=1, most_rows=1) as server:
        for thing in (pipe, result, server):
            assert len(repr(thing)) <= WIDEST
            assert "\n" not in repr(thing)
        assert "ready" in repr(server)
    assert repr(result).startswith("<Result: 6 images of 64x64, seeds 7, 8, 9, 10, ..., ")
    assert repr(pipe) == "<Pipeline 'embedded-student': 64x64, ort-cpu on cpu>"
    assert repr(pipe.bundle).startswith("<Bundle 'embedded-student': ")


def test_a_notebook_shows_the_pictures(pipe: Pipeline) -> None:
    result = pipe(CIRCLE, steps=1, seed=[0, 1])
    shown = np.asarray(Image.open(io.BytesIO(result._repr_png_())))
    assert np.array_equal(shown, np.concatenate(list(result.images), axis=1))


def test_a_bar_counts_the_evaluations(pipe: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[int] = []
    pipe(CIRCLE, steps=90, seed=0, progress=True, on_step=lambda s: seen.append(s.index))
    assert seen == list(range(90))
    drawn = capsys.readouterr().err
    assert "0/90 [" in drawn
    assert re.search(r"[1-9]\d?/90 \[\d\d:\d\d<\d\d:\d\d", drawn), "no time left"


def test_a_call_leaves_the_event_loop_free(pipe: Pipeline) -> None:
    async def both() -> tuple[fewstep.Result, list[int]]:
        beats, made = [], asyncio.create_task(pipe.acall(CIRCLE, steps=20, seed=3))
        while not made.done():
            beats.append(1)
            await asyncio.sleep(0.001)
        return made.result(), beats

    result, beats = asyncio.run(both())
    assert np.array_equal(result.images, pipe(CIRCLE, steps=20, seed=3).images)
    assert len(beats) > 3


def test_cancelling_the_task_ends_the_request(pipe: Pipeline) -> None:
    steps: list[int] = []

    async def left() -> None:
        begun = threading.Event()

        def told(step: fewstep.runtime.Step) -> None:
            steps.append(step.index)
            begun.set()

        task = asyncio.create_task(pipe.acall(CIRCLE, steps=400, seed=0, on_step=told))
        await asyncio.to_thread(begun.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(left())  # waits for its threads
    assert 0 < len(steps) < 400
    stop = threading.Event()
    stop.set()
    with pytest.raises(CancelledError):
        asyncio.run(pipe.acall(CIRCLE, cancel=stop))
