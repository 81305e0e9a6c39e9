"""Connections under bounds: idle, half-sent, slow, too many; none of them keeps an honest client out."""

from __future__ import annotations

import json
import logging
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from counts import count
from fewstep.errors import ArgumentError
from fewstep.serving.http import Settings
from fewstep.serving.http.connections import ConnectionLimits, most_connections
from http_service import listening, load_student, serve_process, serving, wait_until
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

LARGE = 64 << 20


async def echo(request: Request) -> Response:
    return PlainTextResponse(str(len(await request.body())))


async def large(request: Request) -> Response:
    return Response(bytes(LARGE))


APP = Starlette(routes=[Route("/echo", echo, methods=["GET", "POST"]), Route("/large", large)])


def connect(url: str, sent: bytes = b"") -> socket.socket:
    port = int(url.rpartition(":")[2])
    opened = socket.create_connection(("127.0.0.1", port), timeout=20)
    if sent:
        opened.sendall(sent)
    return opened


def is_closed(opened: socket.socket) -> bool:
    """Whether the other side has closed; what it said before is read."""
    opened.settimeout(0.05)
    try:
        while opened.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


def test_answers_are_not_held_back() -> None:
    with listening(APP, ConnectionLimits(most=10)) as (url, server), httpx.Client() as client:
        client.get(f"{url}/echo")
        (connection,) = server.server_state.connections
        accepted = connection.transport.get_extra_info("socket")  # type: ignore[union-attr]
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


UNFINISHED = {
    "nothing": b"",
    "half a line": b"GET /ec",
    "half a header": b"GET /echo HTTP/1.1\r\nHost: x\r\nX-",
    "half a body": b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc",
    "half a chunk": b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
    "a second half": b"GET /echo HTTP/1.1\r\nHost: x\r\n\r\nGET /echo HTTP",
}


def test_what_is_not_whole_in_time_is_closed() -> None:
    limits = ConnectionLimits(most=100, request_s=0.4, bytes_per_s=1e9)
    with listening(APP, limits) as (url, _):
        opened = {name: connect(url, sent) for name, sent in UNFINISHED.items()}
        dripping = connect(url, UNFINISHED["half a header"])
        with httpx.Client() as client:
            for _ in range(20):
                assert client.get(f"{url}/echo").text == "0"
                try:
                    dripping.sendall(b"a")
                except OSError:
                    break
                time.sleep(0.05)
            # a byte now and then earns no time
            wait_until(lambda: is_closed(dripping), 10)
            for name, one in opened.items():
                wait_until(lambda one=one: is_closed(one), 10)
                assert one, name
            assert client.get(f"{url}/echo").text == "0", "a client between two requests is left alone"
        wait_until(lambda: not limits.open, 10)
        assert limits.closed == len(opened) + 1


def test_a_body_that_keeps_coming_is_waited_for() -> None:
    limits = ConnectionLimits(most=10, request_s=0.3, bytes_per_s=1000.0)
    with listening(APP, limits) as (url, _):
        slow = connect(url, b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 6000\r\n\r\n")
        for _ in range(6):
            slow.sendall(bytes(1000))
            time.sleep(0.15)
        assert slow.recv(1 << 16).endswith(b"6000")
        assert limits.closed == 0


def test_idle_connections_keep_nobody_out(caplog: pytest.LogCaptureFixture) -> None:
    limits, tried = ConnectionLimits(most=8, request_s=60.0), count(40, 1000)
    began = time.monotonic()
    with caplog.at_level(logging.WARNING), listening(APP, limits) as (url, _):
        idle = []
        with httpx.Client() as kept:
            assert kept.get(f"{url}/echo").text == "0"
            for _ in range(tried):
                idle.append(connect(url))
                assert len(limits.open) <= 8
                assert httpx.get(f"{url}/echo").text == "0", "a new client"
            assert kept.get(f"{url}/echo").text == "0", "a client from before, on another connection if need be"
        assert sum(map(is_closed, idle)) >= tried - 8
    said = [r for r in caplog.records if "more connections than are kept" in r.getMessage()]
    assert 1 <= len(said) <= 2 + (time.monotonic() - began), "once a second at most"
    for one in idle:
        one.close()


def percentile(milliseconds: list[float], part: float) -> float:
    return sorted(milliseconds)[int(part * (len(milliseconds) - 1))]


def test_an_honest_client_beside_idle_ones() -> None:
    """Every answer comes, whoever else is connected and silent; what that costs it is printed."""
    silent, asked = count(200, 1000), count(100, 1000)

    def latencies(url: str) -> list[float]:
        taken = []
        with httpx.Client(timeout=30) as client:
            for _ in range(asked):
                began = time.perf_counter()
                assert client.get(f"{url}/health/live").status_code == 200
                taken.append(1e3 * (time.perf_counter() - began))
        return taken

    with serve_process() as (url, _):
        latencies(url)
        before = latencies(url)
        idle = [connect(url) for _ in range(silent)]
        beside = latencies(url)
        made = httpx.post(f"{url}/v1/images/generations", json={"prompt": "a", "num_inference_steps": 1}, timeout=60)
        assert made.status_code == 200
        for one in idle:
            one.close()
        after = latencies(url)
    for words, taken in (("before", before), (f"beside {silent} idle connections", beside), ("after", after)):
        print(f"{words}: p50 {percentile(taken, 0.5):.2f} ms, p99 {percentile(taken, 0.99):.2f} ms")


def test_a_peer_that_does_not_read_is_closed() -> None:
    limits = ConnectionLimits(most=10, answer_s=0.4)
    with listening(APP, limits) as (url, _):
        deaf = connect(url, b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_until(lambda: limits.closed == 1, 20)
        reading = httpx.get(f"{url}/large", timeout=60)
        assert len(reading.content) == LARGE, "one that reads gets all of it"
        assert limits.closed == 1
        deaf.close()


def test_as_many_as_the_limit_of_open_files_admits(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    for files, most in ((1024, 960), (64, 8), (1 << 20, 1000), (resource.RLIM_INFINITY, 1000)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, files=files: (files, files))
        assert most_connections(1000) == most
    with pytest.raises(ArgumentError, match="above 0"):
        ConnectionLimits(most=0)


@pytest.fixture
def asked() -> Iterator[Any]:
    """Asks for work in threads; what came of it."""
    answers: list[httpx.Response | Exception] = []
    threads: list[threading.Thread] = []

    def ask(url: str, times: int) -> list[httpx.Response | Exception]:
        def one() -> None:
            body = {"prompt": "a red circle", "n": 8, "num_inference_steps": 100}
            try:
                answers.append(httpx.post(f"{url}/v1/images/generations", json=body, timeout=120))
            except httpx.HTTPError as error:
                answers.append(error)

        threads.extend(threading.Thread(target=one) for _ in range(times))
        for thread in threads:
            thread.start()
        return answers

    yield ask
    for thread in threads:
        thread.join(60)


def test_sigterm_with_work_left_refuses_it_in_words(asked: Any) -> None:
    with serve_process("--drain", "1", "--most-work", "100000", "--queue", "1000") as (url, process):
        answers = asked(url, 6)
        wait_until(lambda: "fewstep_slots_in_use 32.0" in httpx.get(f"{url}/metrics").text)
        half = connect(url, UNFINISHED["half a body"])
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        wait_until(lambda: len(answers) == 6)
        for answer in answers:
            assert isinstance(answer, httpx.Response), answer
            assert answer.status_code in (200, 503)
            if answer.status_code == 503:
                assert answer.json()["error"]["code"] == "unavailable"
        assert any(a.status_code == 503 for a in answers)
        assert process.stderr is not None
        log = process.stderr.read()
        records = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
        assert "not drained in time: what is left is given up" in {r["message"] for r in records}
        assert "Traceback" not in log
        assert not [r for r in records if r["level"] == "error"]
        half.close()


CHUNKS = b"5\r\nhello\r\n0\r\n\r\n"
SMUGGLED = b"GET /health/live HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
AMBIGUOUS = {
    "both": (b"1.1", b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n"),
    "both, turned round": (b"1.1", b"Transfer-Encoding: chunked\r\nContent-Length: 15\r\n"),
    "a length of nothing": (b"1.1", b"Content-Length: 0\r\nTransfer-Encoding: chunked\r\n"),
    "two lengths": (b"1.1", b"Content-Length: 5\r\nContent-Length: 6\r\n"),
    "another coding": (b"1.1", b"Transfer-Encoding: gzip, chunked\r\n"),
    "a coding not quite": (b"1.1", b"Transfer-Encoding: xchunked\r\n"),
    "two codings": (b"1.1", b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n"),
    "before chunks were": (b"1.0", b"Transfer-Encoding: chunked\r\n"),
    "a length with a sign": (b"1.1", b"Content-Length: +5\r\n"),
    "a space before the colon": (b"1.1", b"Content-Length : 5\r\n"),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_a_body_whose_end_is_ambiguous_is_refused_and_ends_the_connection(name: str, student: Any) -> None:
    """One answer and no more, whatever comes after it: a proxy in front may have taken that for part of the body."""
    version, fields = AMBIGUOUS[name]
    head = b"POST /v1/images/generations HTTP/" + version + b"\r\nHost: 127.0.0.1\r\n" + fields
    with serving(load_student(student, most_slots=1, most_rows=1), Settings(model="m")) as (url, _):
        opened = connect(url, head + b"Content-Type: application/json\r\n\r\n" + CHUNKS + SMUGGLED)
        said = b""
        while part := opened.recv(1 << 16):
            said += part
    assert said.split(b" ")[1] in (b"400", b"501"), said[:200]
    assert said.count(b"HTTP/1.1 ") == 1, "the connection went on"


@pytest.mark.parametrize("origin", ["http://[", "http://[::1", "//", "null", "http://\xe9"])
def test_an_origin_that_is_none_is_refused(student: Any, origin: str) -> None:

    with serving(load_student(student, most_slots=1, most_rows=1), Settings(model="m", hosts=("127.0.0.1",))) as (
        url,
        _,
    ):
        head = f"GET /v1/models HTTP/1.1\r\nHost: {url.removeprefix('http://')}\r\nOrigin: {origin}\r\n"
        for more in (
            "\r\n",
            "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        ):
            answer = connect(url, (head + more).encode("latin-1")).recv(1 << 16)
            assert answer.split(b" ")[1] == b"403", answer[:200]
