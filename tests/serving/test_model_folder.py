"""A folder of bundles: an admin's call loads any of them by its folder's name, and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fewstep
import httpx
import numpy as np
import pytest
from fewstep.bundle import MANIFEST, Bundle
from fewstep.errors import MissingError
from fewstep.export.embedded import embedded_bundle
from fewstep.serving import ServedModel, Server
from fewstep.serving.http import Metrics, Service, Settings, make_app
from fewstep.serving.http.callers import Key
from fewstep.serving.http.connections import ConnectionLimits
from fewstep.serving.model_folder import ModelFolder
from http_service import generate, listening, pixels, serve_process

KEYS = {"ops": Key(key="0123456789abcdef", admin=True), "alice": Key(key="fedcba9876543210")}
OPS = {"authorization": "Bearer 0123456789abcdef"}


def describe(name: str, bundle: Bundle) -> ServedModel:
    def load() -> Server:
        return Server(bundle, threads=1, most_slots=2, most_rows=2, buckets=[1], row_threads=1)

    return ServedModel(name=name, load=load, nbytes=1000 if name == "huge" else 100, sizes=((64, 64),))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good bundles, and everything that is none."""
    root = tmp_path_factory.mktemp("models")
    models, own = root / "models", embedded_bundle("student")[0].folder
    for name in ("ink", "huge", ".hidden", "two words", "damaged", "linked"):
        shutil.copytree(own, models / name)
    shutil.copytree(own, root / "outside")
    (models / "away").symlink_to(root / "outside")
    (models / "empty").mkdir()
    (models / "damaged" / MANIFEST).write_text("{}")
    weights = next((models / "linked").glob("*.safetensors"))
    weights.unlink()
    weights.symlink_to(own / weights.name)
    return models


@contextmanager
def over_http(folder: Path | None, settings: Settings, budget: int | None = 150) -> Iterator[tuple[str, Service]]:
    bundle, metrics = embedded_bundle("student")[0], Metrics()
    models = None if folder is None else ModelFolder(folder, describe)
    service = Service([describe("one", bundle)], budget=budget, observer=metrics, folder=models)
    with listening(make_app(service, settings, metrics=metrics), ConnectionLimits(most=100)) as (url, _):
        service.wait(60)
        yield url, service


def post(url: str, name: str, what: str = "load", **headers: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/models/{name}/{what}", headers=headers, timeout=60)


def listed(url: str) -> dict[str, str]:
    return {m["id"]: m["state"] for m in httpx.get(f"{url}/v1/models").json()["data"]}


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with over_http(folder, Settings(model="one", aliases=("gpt-image-1",))) as (made, _):
        yield made


def test_a_bundle_of_the_folder_is_loaded_used_and_unloaded(url: str, student: fewstep.Pipeline) -> None:
    assert listed(url) == {"one": "resident", "gpt-image-1": "resident"}
    assert generate(url, model="ink").status_code == 404, "no request brings it in"
    for _ in range(2):
        assert post(url, "ink").json()["state"] == "resident"
        assert listed(url) == {"one": "out", "gpt-image-1": "out", "ink": "resident"}, "within the budget"
        made = generate(url, model="ink", seed=3, num_inference_steps=3)
        alone = student("a red circle", seed=3, steps=3).images[0]
        np.testing.assert_array_equal(pixels(made.json()["data"][0]["b64_json"]), alone)
        assert generate(url, model="one").status_code == 200
        assert listed(url)["ink"] == "out", "it made room"
        assert generate(url, model="ink").status_code == 200, "and comes back as any other"
        assert post(url, "ink", "unload").json()["state"] == "out"
        assert "ink" not in listed(url)
        assert generate(url, model="ink").status_code == 404
        assert post(url, "ink", "unload").status_code == 404
    assert post(url, "gpt-image-1").json()["state"] == "resident"


@pytest.mark.parametrize(
    "name",
    [
        *("..", "%2e%2e", ".", "ink%2f..%2fink", "..%2foutside", "%2fetc", "ink%00", "two%20words", ".hidden"),
        *("away", "empty", "none", "ink\\..", "x" * 65),
    ],
)
def test_what_is_no_name_of_a_bundle_is_not_there(url: str, name: str) -> None:
    answer = post(url, name)
    assert answer.status_code in (404, 405), answer.text
    error = answer.json()["error"]
    if error["code"] == "model_not_found":
        assert "there is one, gpt-image-1, damaged, huge, ink, linked." in error["message"]
    assert set(listed(url)) == {"one", "gpt-image-1"}


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("linked", "invalid_bundle", "UnsafeFileError"),
        ("damaged", "invalid_bundle", "CorruptError"),
        ("huge", "invalid_combination", "takes 1000 bytes; expected at most the budget of 150 bytes"),
    ],
)
def test_a_bundle_that_cannot_be_served_is_refused(url: str, folder: Path, name: str, code: str, words: str) -> None:
    answer = post(url, name)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (422, code)
    assert words in error["message"]
    assert str(folder) not in error["message"]
    assert set(listed(url)) == {"one", "gpt-image-1"}
    assert generate(url).status_code == 200


def test_only_an_admin_loads_them_and_only_from_a_folder(folder: Path) -> None:
    with over_http(folder, Settings(model="one", keys=KEYS), budget=None) as (url, service):
        assert post(url, "ink").status_code == 401
        assert post(url, "ink", authorization="Bearer fedcba9876543210").status_code == 403
        assert post(url, "ink", **OPS).json()["state"] == "resident"
        assert sorted(service.residents.servers()) == ["ink", "one"]
    with over_http(None, Settings(model="one")) as (url, _):
        assert post(url, "ink").status_code == 404


def test_a_bundle_that_changed_is_loaded_as_it_is_now(folder: Path) -> None:
    shutil.copytree(folder / "ink", folder / "young")
    try:
        with over_http(folder, Settings(model="one"), budget=None) as (url, service):
            assert post(url, "young").status_code == 200
            assert post(url, "young", "unload").status_code == 200
            manifest = json.loads((folder / "young" / MANIFEST).read_text())
            (folder / "young" / MANIFEST).write_text(json.dumps({**manifest, "name": "other"}))
            assert post(url, "young").status_code == 200
            assert service.residents.servers()["young"].pipeline.bundle.name == "other"
    finally:
        shutil.rmtree(folder / "young")


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no folder"):
        ModelFolder(tmp_path / "none", describe)


def test_the_command_serves_a_folder(folder: Path) -> None:
    with serve_process("--models-folder", str(folder)) as (url, process):
        assert post(url, "ink").json()["state"] == "resident"
        assert generate(url, model="ink").status_code == 200
        said: Any = process.stderr
        assert "damaged, huge, ink, linked" in said.read()
