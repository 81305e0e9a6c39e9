"""Several models in one process: within a budget, each request with its own, whoever leaves finishing first."""

from __future__ import annotations

import base64
import gc
import io
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import fewstep
import httpx
import numpy as np
import pytest
from fewstep.bundle import Bundle
from fewstep.cli import make_parser
from fewstep.commands.serve import other_names
from fewstep.errors import ArgumentError, FewstepError, UnavailableError
from fewstep.export.embedded import embedded_bundle
from fewstep.serving import Server
from fewstep.serving.http import Metrics, Service, Settings, make_app
from fewstep.serving.http.connections import ConnectionLimits
from fewstep.serving.live.protocol import SUBPROTOCOL
from fewstep.serving.live.socket import add_live
from fewstep.serving.resident import RETRIED_AFTER_S, Residents, ServedModel
from http_service import listening, wait_until
from PIL import Image

SETTINGS = Settings(model="one", aliases=("dall-e-2",), steps=60)
SIZE = (64, 64)


def served(name: str, bundle: Bundle, nbytes: int, made: list[Any] | None = None, **options: Any) -> ServedModel:
    def load() -> Server:
        server = Server(bundle, threads=1, most_slots=2, most_rows=2, buckets=[2], row_threads=1, **options)
        if made is not None:
            made.append(weakref.ref(server))
        return server

    return ServedModel(name=name, load=load, nbytes=nbytes, sizes=(SIZE,))


@contextmanager
def over_http(models: list[ServedModel], budget: int | None) -> Iterator[tuple[str, Service]]:
    metrics = Metrics()
    service = Service(models, budget=budget, observer=metrics)
    routes = add_live(service, SETTINGS, metrics)
    app = make_app(service, SETTINGS, metrics=metrics, routes=routes)
    with listening(app, ConnectionLimits(most=100)) as (url, _):
        service.wait(60)
        yield url, service


def generate(url: str, **fields: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/images/generations", json={"prompt": "a red circle", "seed": 3, **fields}, timeout=60)


def picture(answer: httpx.Response) -> Any:
    assert answer.status_code == 200, answer.text
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))))


def figure(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return float(next((line.rpartition(" ")[2] for line in lines if line.rpartition(" ")[0] == name), "0"))


@pytest.fixture(scope="module")
def bundles() -> dict[str, Bundle]:
    return {name: embedded_bundle(name)[0] for name in ("student", "base")}


@pytest.fixture
def two(bundles: dict[str, Bundle]) -> list[ServedModel]:
    return [served("one", bundles["student"], 100), served("two", bundles["base"], 100)]


def test_the_first_model_goes_by_the_command_lines_word_too() -> None:
    bundle = embedded_bundle("student")[0]
    for words, names in (
        (["student"], ("embedded-student", "student")),
        (["models/tiny/", "--alias=a"], ("embedded-student", "a", "tiny")),
        (["student", "--name=mine"], ("mine",)),
        (["student", "--model=student=base"], ("embedded-student",)),
        (["student", "--alias=student"], ("embedded-student", "student")),
        (["a b"], ("embedded-student",)),
    ):
        options = make_parser("serve").parse_args(["serve", *words])
        assert (options.name or bundle.name, *other_names(options, bundle)) == names


def test_each_request_gets_its_models_picture_though_one_fits_at_a_time(
    two: list[ServedModel], bundles: dict[str, Bundle], psnr: Callable[[Any, Any], float]
) -> None:
    asked = {"num_inference_steps": 4}
    alone = {}
    for name, bundle in (("one", "student"), ("two", "base")):
        alone[name] = fewstep.load(bundles[bundle], threads=1)("a red circle", seed=3, steps=4).images[0]
    with over_http(two, budget=150) as (url, service):
        for name in ("one", "two", "two", "one"):
            assert psnr(picture(generate(url, model=name, **asked)), alone[name]) > 60
            assert service.residents.nbytes <= 150
            states = {m["id"]: m["state"] for m in httpx.get(f"{url}/v1/models").json()["data"]}
            other = "two" if name == "one" else "one"
            assert (states[name], states[other]) == ("resident", "out")
        assert psnr(picture(generate(url, model="dall-e-2", **asked)), alone["one"]) > 60
        assert figure(url, 'fewstep_model_loads_total{model="one"}') == 2
        assert figure(url, 'fewstep_model_loads_total{model="two"}') == 1
        assert figure(url, 'fewstep_model_departures_total{model="one"}') == 1
        assert figure(url, 'fewstep_model_requests_total{model="two",resident="true"}') == 1
        assert figure(url, 'fewstep_model_requests_total{model="two",resident="false"}') == 1
        assert figure(url, 'fewstep_model_load_seconds_total{model="two"}') > 0
        assert figure(url, "fewstep_model_bytes") == 100


def test_what_fits_is_loaded_at_the_start_and_stays(two: list[ServedModel]) -> None:
    with over_http(two, budget=None) as (url, _):
        for name in ("two", "one", "two"):
            picture(generate(url, model=name))
        assert figure(url, 'fewstep_model_loads_total{model="two"}') == 1
        assert figure(url, 'fewstep_model_requests_total{model="two",resident="false"}') == 0


def test_a_model_that_makes_room_finishes_what_it_has_accepted(two: list[ServedModel]) -> None:
    with over_http(two, budget=150) as (url, service), ThreadPoolExecutor(8) as pool:
        long = [pool.submit(generate, url, model="one", num_inference_steps=40, seed=s) for s in range(2)]
        wait_until(lambda: service.server.stats().outstanding == 2)
        short = [pool.submit(generate, url, model=name) for name in ("two", "one", "two")]
        for answer in (*long, *short):
            picture(answer.result())


def test_the_one_used_least_recently_goes_first(bundles: dict[str, Bundle]) -> None:
    made: list[Any] = []
    residents = Residents([served(n, bundles["student"], 10, made) for n in "abc"], budget=20)
    for future in residents.start():
        future.result(60)
    try:
        assert sorted(residents.servers()) == ["a", "b"]
        for use, wanted, left in (("a", "c", ["a", "c"]), ("c", "b", ["b", "c"]), ("b", "a", ["a", "b"])):
            with residents.hold(use):
                pass
            residents.load(wanted).result(60)
            assert sorted(residents.servers()) == left
        gc.collect()
        assert sum(m() is not None for m in made) == 2, "a model that left keeps no memory"
    finally:
        residents.close()


def test_a_model_that_cannot_be_loaded_is_503_and_harms_no_other(bundles: dict[str, Bundle]) -> None:
    tried: list[float] = []
    good = served("two", bundles["student"], 10)

    def load() -> Server:
        tried.append(time.monotonic())
        if len(tried) < 2:
            raise FewstepError("as a damaged bundle would")
        return good.load()

    models = [served("one", bundles["student"], 10), ServedModel(name="two", load=load, nbytes=10, sizes=(SIZE,))]
    with over_http(models, budget=15) as (url, _):
        for _ in range(3):
            answer = generate(url, model="two")
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
        assert len(tried) == 1, f"it is not tried at each request, but after {RETRIED_AFTER_S} s"
        picture(generate(url, model="one"))
        assert httpx.post(f"{url}/v1/models/two/load", timeout=60).json()["state"] == "resident"
        picture(generate(url, model="two"))


def test_models_are_loaded_and_unloaded_by_name(two: list[ServedModel]) -> None:
    with over_http(two, budget=250) as (url, _):
        assert httpx.post(f"{url}/v1/models/two/unload", timeout=60).json()["state"] == "out"
        assert httpx.post(f"{url}/v1/models/dall-e-2/unload", timeout=60).json()["state"] == "out"
        assert httpx.post(f"{url}/v1/models/none/unload").status_code == 404
        assert httpx.get(f"{url}/v1/models/none").status_code == 404
        assert httpx.get(f"{url}/v1/models/one/unload").status_code == 405
        assert httpx.get(f"{url}/health/ready").status_code == 200
        picture(generate(url))
        assert httpx.get(f"{url}/v1/models/one").json()["state"] == "resident"
        assert generate(url, model="none").json()["error"]["param"] == "model"


def test_who_waits_for_a_model_is_told_when_the_service_ends(bundles: dict[str, Bundle]) -> None:
    begun, go = threading.Event(), threading.Event()

    def load() -> Server:
        begun.set()
        go.wait(60)
        raise FewstepError("it took too long")

    models = [served("one", bundles["student"], 10), ServedModel(name="two", load=load, nbytes=10, sizes=(SIZE,))]
    with over_http(models, budget=15) as (url, service), ThreadPoolExecutor(2) as pool:
        try:
            late = generate(url, model="two", deadline_s=1.0)
            assert late.status_code == 504
            waiting = pool.submit(generate, url, model="two")
            assert begun.wait(60)
            time.sleep(0.2)
            assert service.drain(5)
            assert waiting.result(5).status_code == 503
        finally:
            go.set()


def test_a_model_with_a_live_session_makes_no_room(two: list[ServedModel]) -> None:
    with over_http(two, budget=150) as (url, service):
        with service.pinned():
            answer = generate(url, model="two")
            assert (answer.status_code, "live sessions" in answer.json()["error"]["message"]) == (503, True)
            assert httpx.post(f"{url}/v1/models/one/unload", timeout=60).status_code == 503
            picture(generate(url, model="one"))
        service.residents.load("two").result(60)
        picture(generate(url, model="two"))
        with pytest.raises(UnavailableError, match="not loaded now"), service.pinned():
            pass
        wait_until(lambda: service.residents.state("one") == "resident")


def test_a_live_session_holds_its_model(two: list[ServedModel]) -> None:
    from websockets.sync.client import connect
    from websockets.typing import Subprotocol

    with over_http(two, budget=150) as (url, service):
        with connect(f"ws{url.removeprefix('http')}/live/socket", subprotocols=[Subprotocol(SUBPROTOCOL)]) as live:
            live.recv(timeout=30)
            assert generate(url, model="two").status_code == 503
        wait_until(lambda: generate(url, model="two", deadline_s=30.0).status_code == 200)
        assert service.residents.state("two") == "resident"


@pytest.mark.parametrize(
    ("names", "budget", "words"), [("aa", None, "named a, a"), ("", None, "none"), ("ab", 5, "takes 10 bytes")]
)
def test_models_that_cannot_be_are_refused(
    bundles: dict[str, Bundle], names: str, budget: int | None, words: str
) -> None:
    with pytest.raises(ArgumentError, match=words):
        Residents([served(n, bundles["student"], 10) for n in names], budget=budget)
