"""Live sessions over a WebSocket: frames, refusals, slow readers, and hostile messages, against a running server."""

from __future__ import annotations

import io
import json
import re
import struct
import time
import urllib.request
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import fewstep
import numpy as np
import pytest
from fewstep.serving import Server
from fewstep.serving.http import Metrics
from fewstep.serving.live.pictures import MOST_BYTES
from fewstep.serving.live.protocol import (
    MOST_TEXT,
    PICTURE_HEADER,
    SUBPROTOCOL,
    ProtocolError,
    read_binary,
    read_text,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live_client import Client, running, url
from PIL import Image
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

PROMPT = "a red circle on a blue background"


@pytest.fixture(scope="module")
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture(scope="module")
def port(student: fewstep.Pipeline, metrics: Metrics) -> Iterator[int]:
    server = Server(student, most_slots=8, most_rows=4, image=True, observer=metrics)
    with running(server, metrics=metrics) as made:
        yield made


def pixels(jpeg: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(jpeg)) as image:
        return np.asarray(image.convert("RGB"))


def png(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


def read(port: int, path: str) -> tuple[str, dict[str, str]]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as response:
        return response.read().decode(), {k.lower(): v for k, v in response.headers.items()}


def close_code(client: Client, *, reset: int | None = None) -> int:
    """Read on until the server has closed the socket; its code, or `reset` where words were lost.

    A server that closes while more is coming resets the connection, and that may overtake its last words.
    """
    try:
        while True:
            client.next()
    except ConnectionClosed as closed:
        found = reset if closed.rcvd is None else closed.rcvd.code
        assert found is not None, "the server went away without a word"
        return found


def test_a_prompt_becomes_its_picture(port: int, student: fewstep.Pipeline, psnr) -> None:
    with Client(port) as client:
        assert client.hello["type"] == "hello"
        assert client.hello["size"] == [64, 64]
        number = client.set(prompt=PROMPT, seed=3, steps=4)
        assert client.until("set", number)["settings"]["seed"] == 3
        frame = client.until("frame", number)
        assert psnr(pixels(frame["jpeg"]), student(PROMPT, seed=3, steps=4).images[0]) >= 28, "JPEG at quality 85"
        assert frame["id"] == number
        assert frame["latency_ms"] > 0
        again = client.until("frame", client.set(prompt="a green square on a yellow background"))
        assert psnr(pixels(again["jpeg"]), pixels(frame["jpeg"])) < 20


def test_pictures_in_and_unchanged_ones_answered(port: int, student: fewstep.Pipeline, psnr) -> None:
    drawn = np.full((64, 64, 3), (20, 40, 200), np.uint8)
    drawn[20:44, 20:44] = (220, 30, 30)
    with Client(port) as client:
        client.until("frame", client.set(prompt=PROMPT, seed=1, steps=2, strength=0.5))
        frame = client.until("frame", client.picture(png(drawn)))
        assert frame["at"] == 1.5, "the client's clock comes back"
        alone = student(PROMPT, seed=1, steps=4, image=drawn, strength=0.625).images[0]
        assert psnr(pixels(frame["jpeg"]), alone) >= 28
        number = client.picture(png(drawn))
        assert client.until("unchanged", number)["id"] == number
        client.say({"type": "clear", "id": 99, "at": 0})
        assert psnr(pixels(client.until("frame", 99)["jpeg"]), student(PROMPT, seed=1, steps=2).images[0]) >= 28


def test_what_cannot_be_obeyed_is_an_error_and_no_more(port: int) -> None:
    with Client(port) as client:
        for change, words in (
            ({"steps": 0}, "steps is 0"),
            ({"strength": 7}, "strength is 7"),
            ({"sampler": "no such"}, "no such"),
            ({"size": [1, 2, 3]}, "size is"),
            ({"elephant": 1}, "unknown setting"),
            ({"sampler_options": {"elephant": 1}}, "elephant"),
            ({"sampler_options": {"eta": {"deep": 1}}}, "sampler_options"),
            ({"sampler_options": {"eta": 1e7}}, "sampler_options"),
            ({"sampler_options": {f"a{i}": 1 for i in range(33)}}, "sampler_options"),
            ({"sampler_options": 5}, "sampler_options"),
        ):
            number = client.set(**change)
            error = client.until("error")
            assert words in error["message"]
            assert error["id"] == number
            assert "/" not in error["message"].replace("text/", "")
        client.picture(b"no picture at all")
        assert client.until("error")["error"] == "CorruptError"
        assert client.until("frame", client.set(prompt=PROMPT, steps=1))["jpeg"]


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("", 4400),
        ("{", 4400),
        ("[1]", 4400),
        ('{"type":"quit"}', 4400),
        ('{"type":"set"}', 4400),
        ('{"type":"set","settings":{"prompt":{"a":1}}}', 4400),
        ('{"type":"set","settings":{},"more":1}', 4400),
        ('{"type":"set","settings":{"seed":1,"seed":2}}', 4400),
        ('{"type":"set","settings":{"strength":NaN}}', 4400),
        ('{"type":"set","id":4294967296,"settings":{}}', 4400),
        ('{"type":"ack","frame":-1}', 4400),
        ('{"type":"ack","frame":1e999}', 4400),
        ("[" * 100_000, 4400),
        ("x" * (MOST_TEXT + 1), 1009),
        (b"", 4400),
        (b"\x01\x01", 4400),
        (struct.pack("<BBHId", 2, 1, 0, 1, 0.0) + b"x", 4400),
        (struct.pack("<BBHId", 1, 9, 0, 1, 0.0) + b"x", 4400),
        (struct.pack("<BBHId", 1, 1, 1, 1, 0.0) + b"x", 4400),
        (struct.pack("<BBHId", 1, 1, 0, 1, float("nan")) + b"x", 4400),
        (struct.pack("<BBHId", 1, 1, 0, 1, 0.0) + bytes(MOST_BYTES + 1), 1009),
        (bytes(5 * 1024 * 1024), 1009),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_message_of_another_kind_closes_the_socket_and_says_why(port: int, message: Any, code: int) -> None:
    with Client(port) as client:
        with suppress(ConnectionClosed, OSError):
            client.socket.send(message)
        assert close_code(client, reset=1009 if len(message) > MOST_TEXT else None) == code
    with Client(port) as another:
        assert another.hello["type"] == "hello"


def test_a_flood_is_cut_off(port: int) -> None:
    with Client(port) as client:
        with suppress(ConnectionClosed):
            for _ in range(20_000):
                client.say({"type": "ack", "frame": 0})
        assert close_code(client, reset=1008) == 1008


def test_too_many_errors_in_a_row_end_it(port: int) -> None:
    with Client(port) as client:
        with suppress(ConnectionClosed):
            for _ in range(40):
                client.set(steps=0)
        assert close_code(client, reset=1008) == 1008


def test_a_slow_reader_gets_few_and_new_frames(port: int) -> None:
    """Without acknowledgements no more than the window arrives; after one, the newest frame and not a backlog."""
    with Client(port) as client:
        window = client.hello["limits"]["window"]
        client.set(prompt=PROMPT, steps=1, noise="fresh")
        got = []
        with suppress(TimeoutError):
            while len(got) <= window:
                message = client.next(ack=False, timeout=1.5)
                got += [message] if message["type"] == "frame" else []
        assert len(got) == window
        number = client.set(seed=77)
        for frame in got:
            client.say({"type": "ack", "frame": frame["frame"]})
        late = [client.until("frame") for _ in range(2)]
        assert late[-1]["id"] == number, "at most one frame waited for its reader"


def test_other_origins_and_hosts_are_refused(port: int) -> None:
    with connect(url(port), origin=f"http://127.0.0.1:{port}") as fine:  # type: ignore[arg-type]
        assert json.loads(fine.recv(10))["type"] == "hello"
    for origin in ("http://example.org", "null", f"http://127.0.0.1:{port + 1}"):
        with pytest.raises(InvalidStatus) as refused:
            connect(url(port), origin=origin)  # type: ignore[arg-type]
        assert refused.value.response.status_code == 403
    with pytest.raises(InvalidStatus) as refused:
        connect(url(port).replace("127.0.0.1", "localhost"))  # a name that this service was not told of
    assert refused.value.response.status_code == 403


def test_a_token_is_a_subprotocol(student: fewstep.Pipeline) -> None:
    token = "a secret of +/? characters"
    with running(Server(student, most_slots=2, most_rows=2), token=token) as port:
        words = urlsafe_b64encode(token.encode()).decode().rstrip("=")
        with connect(url(port), subprotocols=[SUBPROTOCOL, f"fewstep-token.{words}"]) as client:  # type: ignore[list-item]
            assert json.loads(client.recv(10))["type"] == "hello"
            assert client.subprotocol == SUBPROTOCOL, "the token is not repeated"
        for given in ([], [SUBPROTOCOL], [SUBPROTOCOL, "fewstep-token.AAAA"], [SUBPROTOCOL, "fewstep-token.A"]):
            with pytest.raises(InvalidStatus):
                connect(url(port), subprotocols=given)  # type: ignore[arg-type]
        assert "<title>" in read(port, "/live")[0], "the page itself is open: it holds no secret"


def test_there_are_only_so_many_sessions_and_their_places_come_back(port: int, metrics: Metrics) -> None:
    clients = [Client(port) for _ in range(8)]
    with connect(url(port)) as refused:
        assert json.loads(refused.recv(10))["error"] == "UnavailableError"
        with pytest.raises(ConnectionClosed) as closed:
            refused.recv(10)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1013
    for client in clients:
        client.socket.close()
    until = time.monotonic() + 20
    while "fewstep_live_sessions 0.0" not in metrics.text().decode():
        assert time.monotonic() < until
        time.sleep(0.05)
    Client(port).socket.close()


def test_the_figures_are_among_the_servers(port: int) -> None:
    with Client(port) as client:
        client.until("frame", client.set(prompt=PROMPT, steps=1))
        text, _ = read(port, "/metrics")
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("fewstep_live"))
    assert float(figures["fewstep_live_sessions"]) >= 1
    assert float(figures["fewstep_live_latency_seconds_count"]) >= 1
    assert float(figures["fewstep_live_opened_total"]) >= 1


def test_the_page_loads_nothing_and_runs_only_itself(port: int) -> None:
    html, headers = read(port, "/live")
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert len(re.findall(r"'sha256-[A-Za-z0-9+/=]{44}'", policy)) == 2
    markup = re.sub(r"<script>.*</script>", "", html, flags=re.DOTALL)
    assert not re.search(r"""(src|href)\s*=|@import|url\(|style=|\son\w+=""", markup)
    assert not re.findall(r"https?://", html)
    assert re.findall(r"fetch\(([^,)]*)", html) == ["'/v1/models'"]


def test_a_server_that_closes_says_so(student: fewstep.Pipeline) -> None:
    server = Server(student, most_slots=2, most_rows=2)
    with running(server) as port, Client(port) as client:
        client.set(prompt=PROMPT, steps=1, noise="fresh")
        client.until("frame")
        server.close()
        assert close_code(client) == 1001


def test_clients_that_vanish_leave_nothing(port: int, metrics: Metrics) -> None:
    for i in range(20):
        client = Client(port)
        client.set(prompt=PROMPT, steps=4, noise="fresh", seed=i)
        client.socket.socket.close() if i % 2 else client.socket.close()
        while "fewstep_live_sessions 8.0" in metrics.text().decode():
            time.sleep(0.05)
    until = time.monotonic() + 30
    while "fewstep_live_sessions 0.0" not in metrics.text().decode():
        assert time.monotonic() < until
        time.sleep(0.05)


# --- fuzz ---

near_miss = st.fixed_dictionaries(
    {"type": st.sampled_from(["set", "ack", "clear", "hello"])},
    optional={
        "id": st.integers(-1, 2**33) | st.floats() | st.text(max_size=4),
        "at": st.floats() | st.none(),
        "frame": st.integers(-(2**65), 2**65),
        "settings": st.dictionaries(
            st.sampled_from(
                ["prompt", "negative", "seed", "steps", "strength", "guidance", "sampler", "size", "sampler_options"]
            ),
            st.dictionaries(st.sampled_from(["eta", "rho", "x"]), st.none() | st.floats() | st.integers(), max_size=3)
            | st.none()
            | st.integers(-5, 60)
            | st.floats()
            | st.text(max_size=20)
            | st.lists(st.integers(), max_size=3),
        ),
    },
).map(json.dumps)
headers = st.builds(
    lambda kind, version, reserved, number, at, data: PICTURE_HEADER.pack(kind, version, reserved, number, at) + data,
    st.sampled_from([1, 1, 1, 0, 2]),
    st.sampled_from([1, 1, 1, 0]),
    st.sampled_from([0, 0, 0, 5]),
    st.integers(0, 2**32 - 1),
    st.floats(),
    st.binary(max_size=200) | st.binary(max_size=200).map(lambda b: png(np.zeros((8, 8, 3), np.uint8))[:60] + b),
)
messages = st.text(max_size=100) | near_miss | st.binary(max_size=100) | headers


@given(messages)
@settings(max_examples=400, deadline=None)
def test_any_message_is_read_or_refused(message: str | bytes) -> None:
    codes = set()
    try:
        read_text(message) if isinstance(message, str) else read_binary(message)
    except ProtocolError as error:
        codes.add(error.code)
    assert codes <= {4400, 1009}


@given(st.lists(messages, min_size=1, max_size=12))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_messages_are_answered_or_end_in_a_typed_close(port: int, sent: list[str | bytes]) -> None:
    """Never 1011 (an error of the server's own), never silence."""
    with Client(port) as client:
        try:
            for message in sent:
                client.socket.send(message)
            plain = {"sampler": None, "schedule": None, "sampler_options": None}
            client.set(prompt=PROMPT, steps=1, **plain, noise="fixed", guidance=0, seed=1)
            while client.until("set")["settings"]["prompt"] != PROMPT:
                pass
        except ConnectionClosed:
            assert close_code(client, reset=1008) in {4400, 1009, 1008, 1007}
