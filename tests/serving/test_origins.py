"""Pages of other origins: those that are named may call, by HTTP and by WebSocket alike, and never with credentials."""

from __future__ import annotations

from typing import Any

import fewstep
import httpx
import pytest
from fewstep.errors import ArgumentError
from fewstep.serving import Server
from fewstep.serving.http import Settings
from http_service import generate, load_student, serving
from live_client import running
from live_client import url as socket_url
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

FRIEND, STRANGER = "https://app.example.org", "https://evil.example"
PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}


def allowed(answer: httpx.Response) -> str | None:
    return answer.headers.get("access-control-allow-origin")


@pytest.fixture(scope="module")
def servers(student: fewstep.Pipeline) -> Any:
    """By the origins that they allow: the base URLs."""
    load = load_student(student, most_slots=2, most_rows=2)
    with (
        serving(load, Settings(model="m", origins=(FRIEND,), hosts=("127.0.0.1",))) as (named, _),
        serving(load, Settings(model="m", origins=("*",))) as (every, _),
        serving(load, Settings(model="m", origins=(FRIEND,), token="t" * 16)) as (guarded, _),
    ):
        yield {"named": named, "every": every, "guarded": guarded}


def test_a_preflight_of_a_named_origin(servers: dict[str, str]) -> None:
    path = "/v1/images/generations"
    for server in ("named", "guarded"):  # a preflight carries no token
        answer = httpx.options(servers[server] + path, headers={"origin": FRIEND, **PREFLIGHT})
        assert (answer.status_code, allowed(answer), answer.headers["vary"]) == (204, FRIEND, "Origin")
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert "authorization" in answer.headers["access-control-allow-headers"], "`*` does not stand for it"
    refused = httpx.options(servers["named"] + path, headers={"origin": STRANGER, **PREFLIGHT})
    assert (refused.status_code, allowed(refused)) == (403, None)


def test_answers_and_errors_can_be_read_by_named_origins_alone(servers: dict[str, str]) -> None:
    friend, stranger = {"origin": FRIEND}, {"origin": STRANGER}
    made = httpx.post(f"{servers['named']}/v1/images/generations", json={"prompt": "a", "n": 99}, headers=friend)
    assert (made.status_code, allowed(made)) == (400, FRIEND)
    assert "retry-after" in made.headers["access-control-expose-headers"]
    assert allowed(httpx.get(f"{servers['guarded']}/v1/models", headers=friend)) == FRIEND, "a 401 too"
    refused = httpx.get(f"{servers['named']}/v1/models", headers=stranger)
    assert (refused.status_code, allowed(refused)) == (403, None)
    assert "--cors" in refused.json()["error"]["message"]
    own = httpx.get(f"{servers['named']}/v1/models", headers={"origin": servers["named"]})
    assert (own.status_code, allowed(own)) == (200, None)
    assert httpx.get(f"{servers['named']}/v1/models", headers={**friend, "host": "evil.example"}).status_code == 421


def test_everybody_is_allowed_without_credentials(servers: dict[str, str]) -> None:
    for origin in (STRANGER, "null"):
        answer = httpx.get(f"{servers['every']}/v1/models", headers={"origin": origin})
        assert (answer.status_code, allowed(answer)) == (200, "*")
    for server in servers.values():
        answer = httpx.get(f"{server}/v1/models", headers={"origin": FRIEND})
        assert "access-control-allow-credentials" not in answer.headers
    assert generate(servers["every"], num_inference_steps=1).status_code == 200


def test_no_page_of_another_origin_unloads_a_model_without_a_token(servers: dict[str, str]) -> None:
    for server in ("named", "every"):
        answer = httpx.post(f"{servers[server]}/v1/models/m/unload", headers={"origin": FRIEND})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "not_admin")
    held = {"origin": FRIEND, "authorization": "Bearer " + "t" * 16}
    assert httpx.post(f"{servers['guarded']}/v1/models/m/load", headers=held, timeout=60).status_code == 200


def test_the_sockets_origins_are_the_same(student: fewstep.Pipeline) -> None:
    server = Server(student, most_slots=2, most_rows=2)
    for origins, fine, refused in (
        ((FRIEND,), (FRIEND,), (STRANGER, "null")),
        (("*",), (FRIEND, STRANGER, "null"), ()),
    ):
        with running(server, origins=origins) as port:
            for origin in fine:
                connect(socket_url(port), origin=origin).close()  # type: ignore[arg-type]
            for origin in refused:
                with pytest.raises(InvalidStatus):
                    connect(socket_url(port), origin=origin)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", ["", "example.org", "https://example.org/app", "ftp://x", "https://", "https://a b", "null"]
)
def test_what_is_no_origin(text: str) -> None:
    with pytest.raises(ArgumentError, match="the origin"):
        Settings(model="m", origins=(text,))


def test_origins_are_compared_as_browsers_write_them() -> None:
    assert Settings(model="m", origins=("HTTPS://App.Example.org:8443/",)).origins == ("https://app.example.org:8443",)
