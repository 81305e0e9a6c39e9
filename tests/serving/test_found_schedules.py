"""A bundle's own found schedules by their name, over HTTP and in a live session; no text opens a file."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fewstep
import httpx
import pytest
from fewstep.bundle import add_schedules, read_bundle
from fewstep.errors import ArgumentError
from fewstep.schedules import FoundSchedules, NoiseSchedule
from fewstep.schedules.found import FoundEntry, noise_digest
from fewstep.serving.http import Settings
from fewstep.serving.live import LiveSettings
from http_service import load_student, pixels, serving


@pytest.fixture(scope="module")
def stored(student: fewstep.Pipeline, tmp_path_factory: pytest.TempPathFactory) -> fewstep.Pipeline:
    """The student with schedules of its own, for Euler, of which a copy lies where the server runs."""
    folder = Path(shutil.copytree(student.bundle.folder, tmp_path_factory.mktemp("stored") / "student"))
    bundle = read_bundle(folder)
    found = FoundSchedules(
        sampler="euler",
        model=bundle.unet_digest,
        noise_digest=noise_digest(NoiseSchedule.from_diffusers(bundle.noise_config)),
        guidance=1.0,
        size=(64, 64),
        entries=(
            FoundEntry(steps=2, method="endpoint", sigmas=(12.0, 1.5, 0.0)),
            FoundEntry(steps=6, method="endpoint", sigmas=(12.0, 6.0, 3.0, 1.5, 0.8, 0.3, 0.0)),
        ),
    )
    return fewstep.load(add_schedules(folder, found), threads=1)


@pytest.fixture(scope="module")
def url(stored: fewstep.Pipeline) -> Iterator[str]:
    with serving(load_student(stored, most_slots=4, most_rows=4, queue=8), Settings(model="student")) as (made, _):
        yield made


def generate(url: str, **fields: Any) -> httpx.Response:
    asked = {"prompt": "a red circle", "seed": 3, "size": "64x64", "sampler": "euler", **fields}
    return httpx.post(f"{url}/v1/images/generations", json=asked, timeout=60)


def test_the_bundles_own_over_http(url: str, stored: fewstep.Pipeline, psnr: Any) -> None:
    answer = generate(url, schedule="searched", num_inference_steps=2)
    assert answer.status_code == 200, answer.text
    alone = stored("a red circle", seed=3, sampler="euler", sigmas=[12.0, 1.5, 0.0])
    assert psnr(pixels(answer.json()["data"][0]["b64_json"]), alone.images[0]) >= 50.0


def test_what_http_refuses(url: str, stored: fewstep.Pipeline) -> None:
    file = stored.bundle.folder / stored.bundle.schedules[0].file
    for name in (file.name, str(file)[-60:], "bundle.json"):
        answer = generate(url, schedule=name)
        assert answer.status_code == 422, answer.text
        assert "a text opens no file" in answer.text
    for fields in (
        {"schedule": "searched", "sampler": "lms"},
        {"schedule": "searched", "num_inference_steps": 7},
        {"schedule": "searched", "sampler_options": {"s_churn": 1.0}},
    ):
        assert generate(url, **fields).status_code == 422
    assert generate(url, schedule={"path": str(file)}).status_code == 400


def test_the_bundles_own_in_a_live_session(stored: fewstep.Pipeline) -> None:
    settings = LiveSettings(prompt="x", sampler="euler", schedule="searched")
    steps = stored.bundle.defaults.steps
    request = settings.request(stored, image=False)
    assert (request.schedule, request.program.schedule, request.steps) == (
        "searched",
        "searched",
        max(2, min(6, steps)),
    )
    changed = settings.changed({"steps": 3, "strength": 0.5}).request(stored, image=True)
    assert (changed.steps, changed.program.start, changed.program.evaluations) == (6, 3, 3)
    with pytest.raises(ArgumentError, match="a text opens no file"):
        settings.changed({"schedule": "f.json"}).request(stored, image=False)
    with pytest.raises(ArgumentError, match="expected a string"):
        LiveSettings(schedule=Path("f.json"))  # type: ignore[arg-type]
