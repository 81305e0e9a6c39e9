"""Keys: whose they are, what each may ask for, and what is said when that is too much."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import fewstep
import httpx
import openai
import pytest
from fewstep.errors import ArgumentError, CorruptError, MissingError
from fewstep.serving import Server
from fewstep.serving.http import Settings
from fewstep.serving.http.callers import Caller, Callers, Key, read_keys
from fewstep.serving.http.errors import HttpError
from fewstep.serving.http.logs import logging_to
from http_service import load_student, serving
from live_client import Client, running
from websockets.exceptions import InvalidStatus

TOKEN, ANN, BOB, CAT = ("t" * 16, "a" * 16, "b" * 16, "c" * 16)
FILE = f"""
[ann]
key = "{ANN}"
per_minute = 12

[bob]
sha256 = "{hashlib.sha256(BOB.encode()).hexdigest()}"
concurrent = 1

[cat]
key = "{CAT}"
admin = true
"""


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Key]:
    file = tmp_path_factory.mktemp("keys") / "keys.toml"
    file.write_text(FILE)
    return read_keys(file)


@pytest.fixture(scope="module")
def url(student: fewstep.Pipeline, keys: dict[str, Key]) -> Iterator[str]:
    settings = Settings(model="m", token=TOKEN, keys=keys, images=4)
    with serving(load_student(student, most_slots=4, most_rows=1), settings) as (made, _):
        yield made


def ask(url: str, key: str, **fields: object) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"}
    asked = {"prompt": "a red circle", "num_inference_steps": 1, **fields}
    return httpx.post(f"{url}/v1/images/generations", json=asked, headers=headers, timeout=60)


def test_a_caller_has_so_many_requests_a_minute() -> None:
    now = 100.0
    caller = Caller(name="x", per_minute=30, clock=lambda: now)
    for _ in range(5):  # ten seconds' worth at once
        with caller.request():
            pass
    with pytest.raises(HttpError) as refused, caller.request():
        pass
    assert (refused.value.status, refused.value.code) == (429, "rate_limited")
    assert refused.value.headers == {"retry-after": "2"}
    now += 2.0
    with caller.request():
        pass
    with pytest.raises(HttpError), caller.request():
        pass


def test_a_caller_has_so_many_requests_at_once() -> None:
    caller = Caller(name="x", concurrent=2)
    with ExitStack() as open_ones:
        open_ones.enter_context(caller.request())
        open_ones.enter_context(caller.request())
        with pytest.raises(HttpError, match="2 requests of this key are in progress") as refused, caller.request():
            pass
        assert refused.value.code == "too_many_at_once"
    with caller.request():
        pass


def test_who_may_call(url: str) -> None:
    for key in (TOKEN, ANN, BOB, CAT):
        assert httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
    for wrong in ("", "Bearer", f"Bearer {ANN}x", f"Basic {ANN}", f"Bearer {hashlib.sha256(BOB.encode()).hexdigest()}"):
        assert httpx.get(f"{url}/v1/models", headers={"authorization": wrong}).status_code == 401


def test_only_an_admin_loads_and_unloads(url: str) -> None:
    def administer(key: str) -> httpx.Response:
        return httpx.post(f"{url}/v1/models/m/load", headers={"authorization": f"Bearer {key}"}, timeout=60)

    assert [administer(key).status_code for key in (TOKEN, CAT, ANN)] == [200, 200, 403]
    assert administer(ANN).json()["error"]["code"] == "not_admin"
    assert httpx.post(f"{url}/v1/models/m/unload").status_code == 401


def test_a_rate_is_429_with_retry_after_and_the_others_go_on(url: str) -> None:
    answers = [ask(url, ANN) for _ in range(3)]
    assert [a.status_code for a in answers] == [200, 200, 429]
    error = answers[-1].json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limited")
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 5
    assert ask(url, CAT).status_code == 200
    with pytest.raises(openai.RateLimitError):
        openai.OpenAI(base_url=f"{url}/v1", api_key=ANN, max_retries=0).images.generate(model="m", prompt="a")


def test_a_stream_counts_until_it_ends(url: str) -> None:
    asked = {"prompt": "a", "stream": True, "n": 4, "num_inference_steps": 60}
    headers = {"authorization": f"Bearer {BOB}"}
    posted = {"json": asked, "headers": headers, "timeout": 60}
    with httpx.stream("POST", f"{url}/v1/images/generations", **posted) as stream:  # type: ignore[arg-type]
        assert stream.status_code == 200
        refused = ask(url, BOB)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_at_once")
        stream.read()
    assert ask(url, BOB).status_code == 200


def test_the_log_names_the_caller_and_no_key(url: str) -> None:
    said = io.StringIO()

    def callers() -> list[str]:
        return [json.loads(text)["caller"] for text in said.getvalue().splitlines() if '"request"' in text]

    with logging_to(said):
        ask(url, CAT)
        until = time.monotonic() + 10.0
        while "cat" not in callers() and time.monotonic() < until:
            time.sleep(0.01)  # a line is written once the answer is on its way; so may another request's before
    assert callers()[-1] == "cat"
    assert CAT not in said.getvalue()
    logging.getLogger("fewstep").info("after")


def test_a_live_session_takes_a_key_and_counts(student: fewstep.Pipeline, keys: dict[str, Key]) -> None:
    from base64 import urlsafe_b64encode

    with running(Server(student, most_slots=2, most_rows=2), keys=keys) as port:
        proof = "fewstep-token." + urlsafe_b64encode(BOB.encode()).decode().rstrip("=")
        with Client(port, offered=[proof]) as client:
            assert client.hello["type"] == "hello"
            with pytest.raises(AssertionError, match="in progress"):
                Client(port, offered=[proof])
        with pytest.raises(InvalidStatus):
            Client(port)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[a", "no TOML"),
        ("\udcff", "no TOML"),
        ("", "holds 0 keys"),
        ("a = 1", "a"),
        ("[a]\nkey = 'short'", "length >= 16"),
        ("[a]\nper_minute = 1", "not one of key and sha256"),
        (f"[a]\nkey = '{ANN}'\nsha256 = '{'0' * 64}'", "not one of key and sha256"),
        (f"[a]\nsha256 = '{'0' * 63}'", "sha256"),
        (f"[a]\nkey = '{ANN}'\nper_hour = 1", "per_hour"),
        (f"[a]\nkey = '{ANN}'\nconcurrent = 0", ">= 1"),
        (f"[a]\nkey = '{ANN}'\nper_minute = nan", "per_minute"),
    ],
)
def test_a_file_of_keys_that_cannot_be(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "keys.toml"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CorruptError, match=words) as refused:
        read_keys(file)
    assert ANN not in str(refused.value)


def test_no_file_and_one_key_of_two(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"no keys in .*nothing.toml"):
        read_keys(tmp_path / "nothing.toml")
    with pytest.raises(ArgumentError, match="'b' is somebody else's too"):
        Callers(None, {"a": Key(key=ANN), "b": Key(sha256=hashlib.sha256(ANN.encode()).hexdigest())})
    assert Callers(None, {}).everybody


def test_the_file_of_the_documentation(tmp_path: Path) -> None:
    docs = (Path(__file__).parents[2] / "docs" / "deployment.md").read_text(encoding="utf-8")
    (tmp_path / "keys.toml").write_text(docs.partition("```toml\n")[2].partition("```")[0])
    callers = Callers(None, read_keys(tmp_path / "keys.toml"))
    alice, ops = callers.find("alice's own long key"), callers.find("a long secret of your own")
    assert alice is not None
    assert ops is not None
    assert (alice.name, alice.per_minute, alice.concurrent, alice.admin) == ("alice", 60, 4, False)
    assert ops.admin
