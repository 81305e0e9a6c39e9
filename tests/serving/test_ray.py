"""The deployment on Ray Serve: two CPU replicas on this machine, one of which is killed in the middle of its work.

`make ray-test` runs this; elsewhere it is skipped, since a local cluster takes a while to start.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fewstep
import pytest
from fewstep.errors import ArgumentError, FewstepError, MismatchError, QueueFullError, UnavailableError
from fewstep.serving.ray_serve import Answer, BundleReference, Deployed, Pending, Replicas, make_deployment

PROMPT = "a red circle on a blue background"
with_ray = pytest.mark.skipif(os.environ.get("FEWSTEP_RAY") != "1", reason="run with FEWSTEP_RAY=1, or make ray-test")


def test_a_reference_is_for_one_bundle(tmp_path: Path, student: fewstep.Pipeline) -> None:
    folder = student.bundle.folder
    reference = BundleReference.of(folder)
    assert reference.read().name == student.bundle.name
    assert pickle.loads(pickle.dumps(reference)) == reference  # noqa: S301 bytes that this test pickled
    other = replace(reference, manifest_sha256="0" * 64)
    with pytest.raises(MismatchError, match="manifest"):
        other.read()


@pytest.mark.parametrize("wrong", [{"least": 0}, {"least": 3, "most": 2}, {"target": 0}, {"target": 65}])
def test_replicas_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        Replicas(**wrong)


def test_replicas_scale_on_requests_in_progress() -> None:
    options = Replicas(least=1, most=4, target=8, gpus=1).options()
    assert options["autoscaling_config"]["target_ongoing_requests"] == 8
    assert options["autoscaling_config"]["max_replicas"] == 4
    assert options["ray_actor_options"]["num_gpus"] == 1
    assert Replicas(least=2, most=2).options()["num_replicas"] == 2


@pytest.mark.parametrize("name", ["ArgumentError", "QueueFullError", "DeadlineError", "UnknownNameError", "nonsense"])
def test_an_error_comes_back_as_its_type(name: str) -> None:
    with pytest.raises(FewstepError, match="no such thing") as raised:
        Answer(error=name, words=("no such thing", "", "")).check()
    if name in {"ArgumentError", "QueueFullError", "DeadlineError"}:
        assert type(raised.value).__name__ == name


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray = pytest.importorskip("ray")
    from ray import serve

    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
        configure_logging=False,
    )
    serve.start(http_options={"host": "127.0.0.1", "port": 8790})
    yield
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="module")
def deployed(cluster: None, student: fewstep.Pipeline) -> Deployed:
    from ray import serve

    application = make_deployment(
        student.bundle.folder,
        replicas=Replicas(least=2, most=2, cpus=0.5, ongoing=32),
        server={"most_slots": 8, "most_rows": 4, "threads": 1},
        settings={"model": "student"},
    )
    return Deployed(serve.run(application, name="test", route_prefix="/"))


def pids(deployed: Deployed) -> set[int]:
    found: set[int] = set()
    until = time.monotonic() + 60
    while len(found) < 2 and time.monotonic() < until:
        found |= {deployed.figures()["pid"] for _ in range(4)}
    return found


@with_ray
def test_two_replicas_make_the_pictures_of_one(deployed: Deployed, student: fewstep.Pipeline, psnr) -> None:
    pending = [deployed.submit(PROMPT, seed=i, steps=2) for i in range(12)]
    for i, answer in enumerate(p.result(60) for p in pending):
        assert answer.images is not None
        assert psnr(answer.images, student(PROMPT, seed=i, steps=2).images) >= 50
    assert len(pids(deployed)) == 2
    with pytest.raises(ArgumentError, match="steps is 0"):
        deployed.generate(PROMPT, steps=0)
    with pytest.raises(ArgumentError, match="image is str"):
        deployed.generate(PROMPT, image="/a/file")


@with_ray
def test_the_http_service_is_the_same(deployed: Deployed) -> None:
    body = json.dumps({"prompt": PROMPT, "size": "64x64", "seed": 3, "response_format": "b64_json"}).encode()
    request = urllib.request.Request(
        "http://127.0.0.1:8790/v1/images/generations", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310 the address of the server that this started
        assert len(json.loads(response.read())["data"][0]["b64_json"]) > 500
    with urllib.request.urlopen("http://127.0.0.1:8790/health/ready", timeout=60) as response:
        assert response.status == 200


@with_ray
def test_the_death_of_a_replica_costs_its_own_requests_and_no_others(
    deployed: Deployed, student: fewstep.Pipeline, psnr
) -> None:
    pending: list[Pending] = []
    busy: set[int] = set()
    while len(busy) < 2:  # until the router has given work to both
        assert len(pending) < 60
        pending += [deployed.submit(PROMPT, seed=len(pending) + i, steps=60) for i in range(4)]
        busy |= {f["pid"] for f in (deployed.figures() for _ in range(4)) if f["outstanding"]}
    victim = min(busy)
    os.kill(victim, signal.SIGKILL)
    fine, lost = [], []
    for i, one in enumerate(pending):
        try:
            fine.append((i, one.result(120)))
        except UnavailableError as error:
            lost.append(str(error))
    assert lost, "the dead replica had requests"
    assert all("died" in words for words in lost)
    assert fine, "the other one lost none"
    for i, answer in fine[:3]:
        assert answer.images is not None
        assert psnr(answer.images, student(PROMPT, seed=i, steps=60).images) >= 50
    later = [deployed.submit(PROMPT, seed=i, steps=2) for i in range(12)]
    assert all(p.result(60).images is not None for p in later)
    until = time.monotonic() + 90
    while len(after := pids(deployed)) < 2:
        assert time.monotonic() < until, "a new replica takes its place"
    assert victim not in after


@with_ray
def test_a_second_replica_comes_when_requests_pile_up(deployed: Deployed, student: fewstep.Pipeline) -> None:
    from ray import serve

    application = make_deployment(
        student.bundle.folder,
        replicas=Replicas(least=1, most=2, target=2, cpus=0.1, upscale_delay_s=1.0),
        server={"most_slots": 4, "most_rows": 4, "threads": 1},
        name="elastic",
    )
    elastic = Deployed(serve.run(application, name="elastic", route_prefix="/elastic"))
    first = {elastic.figures()["pid"] for _ in range(8)}
    assert len(first) == 1
    pending: list[Pending] = []
    seen = set(first)
    until = time.monotonic() + 90
    while len(seen) < 2:
        assert time.monotonic() < until, "no second replica came"
        pending = [p for p in pending if not p.done] + [elastic.submit(PROMPT, steps=30) for _ in range(8)]
        pending[0].result(60)
        seen.add(elastic.figures()["pid"])
    assert all(p.result(60).images is not None for p in pending), "nobody lost anything over it"
    serve.delete("elastic")


@with_ray
def test_what_waits_beyond_the_bound_is_refused(cluster: None, student: fewstep.Pipeline) -> None:
    from ray import serve

    application = make_deployment(
        student.bundle.folder,
        replicas=Replicas(cpus=0.1, ongoing=1, target=1, queued=1),
        server={"most_slots": 4, "most_rows": 4, "threads": 1},
        name="narrow",
    )
    narrow = Deployed(serve.run(application, name="narrow", route_prefix="/narrow"))
    pending = [narrow.submit(PROMPT, steps=60) for _ in range(8)]
    outcomes = []
    for one in pending:
        try:
            one.result(60)
            outcomes.append("fine")
        except QueueFullError:
            outcomes.append("refused")
    assert outcomes.count("fine") >= 1
    assert outcomes.count("refused") >= 1
    serve.delete("narrow")
