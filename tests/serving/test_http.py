"""The HTTP face, over a real socket: OpenAI's own client, streams, uploads, limits, health, metrics, leaving."""

from __future__ import annotations

import io
import json
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import fewstep
import httpx
import numpy as np
import openai
import pytest
from fewstep.errors import ArgumentError
from fewstep.serving.http import Service, Settings
from fewstep.serving.http.run import allowed_hosts, listen
from http_service import generate, load_student, pixels, png, serve_process, serving, wait_until
from PIL import Image

SETTINGS = Settings(
    model="student", aliases=("gpt-image-1",), body_bytes=300_000, json_bytes=50_000, images=4, steps=40
)


@pytest.fixture(scope="module")
def service(student: fewstep.Pipeline) -> Iterator[tuple[str, Service]]:
    with serving(load_student(student, most_slots=8, most_rows=4, queue=16, image=True), SETTINGS) as made:
        yield made


@pytest.fixture
def url(service: tuple[str, Service]) -> str:
    return service[0]


def test_openais_client_makes_an_image_unchanged(url: str, student: fewstep.Pipeline, psnr) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused")
    made = client.images.generate(
        model="gpt-image-1", prompt="a red circle on a blue background", n=2, size="64x64", extra_body={"seed": 3}
    )
    alone = student("a red circle on a blue background", seed=[3, 4])
    for data, expected in zip(made.data, alone.images, strict=True):
        assert psnr(pixels(data.b64_json), expected) >= 50.0
    assert client.models.list().data[0].id == "student"
    edited = client.images.edit(model="student", prompt="a green ring", image=("a.png", png()), extra_body={"seed": 1})
    assert pixels(edited.data[0].b64_json).shape == (64, 64, 3)
    with pytest.raises(openai.BadRequestError):
        client.images.generate(model="student", prompt="a", n=99)
    with pytest.raises(openai.NotFoundError):
        client.images.generate(model="other", prompt="a")


def test_openais_client_streams_previews(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused")
    stream = client.images.generate(
        model="student", prompt="a ring", stream=True, partial_images=2, extra_body={"num_inference_steps": 8}
    )
    events = list(stream)
    assert [e.type for e in events] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [e.partial_image_index for e in events[:2]] == [0, 1]
    assert all(pixels(e.b64_json).shape == (64, 64, 3) for e in events)


def test_an_edit_is_the_pipelines_image_to_image(url: str, student: fewstep.Pipeline, psnr) -> None:
    fields = {"prompt": "a blue ring", "strength": "0.5", "seed": "2", "num_inference_steps": "8"}
    answer = httpx.post(f"{url}/v1/images/edits", data=fields, files={"image": ("x.png", png())}, timeout=60)
    assert answer.status_code == 200, answer.text
    image = Image.open(io.BytesIO(png()))
    alone = student("a blue ring", image=image, strength=0.5, seed=2, steps=8)
    assert psnr(pixels(answer.json()["data"][0]["b64_json"]), alone.images[0]) >= 50.0


def test_an_edit_of_another_size_is_fitted_where_a_size_is_asked_for(url: str) -> None:
    """Without one it would have its own, which a server of fixed sizes may not serve: it says so, and which it has."""
    fields, files = {"prompt": "a ring", "num_inference_steps": "2"}, {"image": ("x.png", png(913, 512))}
    refused = httpx.post(f"{url}/v1/images/edits", data=fields, files=files, timeout=60)
    assert refused.status_code == 422
    words = refused.json()["error"]["message"]
    assert "the own size of the picture, as none is asked for, is 912x512; expected one of 64x64" in words
    assert "Ask for one of these" in words
    fitted = httpx.post(f"{url}/v1/images/edits", data={**fields, "size": "64x64"}, files=files, timeout=60)
    assert (fitted.status_code, fitted.json()["size"]) == (200, "64x64")


BAD_JSON = [
    (b"", 400),
    (b"{", 400),
    (b"[" * 40_000, 400),
    (b'{"prompt":' + b"[" * 40_000, 400),
    (b'{"prompt":"a","prompt_":1}', 400),
    (b'{"prompt":5}', 400),
    (b'{"prompt":"a","prompt":"b"}', 400),
    (b'{"prompt":"a","sampler_options":{"eta":0,"eta":1}}', 400),
    (b'{"prompt":"a","n":true}', 400),
    (b'{"prompt":"a","n":1.5}', 400),
    (b'{"prompt":"a","n":0}', 400),
    (b'{"prompt":"a","guidance_scale":NaN}', 400),
    (b'{"prompt":"a","guidance_scale":1e999}', 400),
    (b'{"prompt":"a","seed":-2}', 400),
    (b'{"prompt":"a","seed":18446744073709551616}', 400),
    (b'{"prompt":"a","size":"32x32"}', 400),
    (b'{"prompt":"a","num_inference_steps":41}', 400),
    (b'{"prompt":"\\ud800"}', 400),
    (b'{"prompt":"\xff"}', 400),
    (b'{"prompt":"' + b"a" * 4001 + b'"}', 400),
    (b'{"prompt":"' + b"a" * 60_000 + b'"}', 413),
    (b'{"prompt":"a","sampler":"nonsense"}', 422),
    (b'{"prompt":"a","model":"nonsense"}', 404),
]


@pytest.mark.parametrize(("body", "status"), BAD_JSON)
def test_bad_bodies_are_refused(url: str, body: bytes, status: int) -> None:
    answer = httpx.post(f"{url}/v1/images/generations", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["message"]
    assert "Traceback" not in answer.text
    assert "aaaa" not in answer.text, "what was sent is not repeated"


def test_a_field_that_is_there_twice_is_named(url: str) -> None:
    """Which of the two counts differs from reader to reader."""
    posted = {"content": b'{"prompt":"a","seed":1,"seed":2}', "headers": {"content-type": "application/json"}}
    error = httpx.post(f"{url}/v1/images/generations", **posted).json()["error"]
    assert "there twice, 'seed'" in error["message"]
    form = {"prompt": "a", "sampler_options": '{"eta": 1, "eta": 0}'}
    error = httpx.post(f"{url}/v1/images/edits", data=form, files={"image": ("x", png())}).json()["error"]
    assert (error["param"], "there twice, 'eta'" in error["message"]) == ("sampler_options", True)


def test_options_of_samplers(url: str, student: fewstep.Pipeline, psnr) -> None:
    options = {"rho": 5, "last_sigma": "sigma_min", "solver_type": "heun"}
    asked = {"sampler": "dpmpp_2m", "schedule": "karras"}
    answer = generate(url, seed=3, num_inference_steps=5, sampler_options=options, **asked)
    alone = student("a red circle", seed=3, steps=5, **asked, **options)
    assert psnr(pixels(answer.json()["data"][0]["b64_json"]), alone.images[0]) >= 75.0
    plain = student("a red circle", seed=3, steps=5, **asked)
    assert psnr(plain.images[0], alone.images[0]) < 60, "they show"
    data = {"prompt": "a", "sampler": "ddim", "sampler_options": '{"eta": 0.5}'}
    made = httpx.post(f"{url}/v1/images/edits", data=data, files={"image": ("x", png())}, timeout=60)
    assert made.status_code == 200, made.text
    for wrong in ({"etta": 1}, {"prompt": 1}, {"steps": 3}, {"rho": -1}):
        refused = generate(url, sampler_options=wrong, **asked)
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "invalid_combination"), refused.text


def test_a_field_that_is_not_known_is_named(url: str) -> None:
    for name in ("guidance", "negative", "x`y", "\u202e\x1b[31m", "n" * 500):
        error = generate(url, **{name: 1}).json()["error"]
        assert error["param"] in error["message"]
        assert error["param"] == ascii(name[:64])[1:-1], "short, and nothing that a terminal obeys"
    data = {"prompt": "a", "sted": "1"}
    error = httpx.post(f"{url}/v1/images/edits", data=data, files={"image": ("x", png())}).json()["error"]
    assert (error["param"], error["message"]) == ("sted", "sted: there is no such field")
    files = {"image": ("x", png()), "masque": ("x", png())}
    assert "'masque'" in httpx.post(f"{url}/v1/images/edits", data=data, files=files).json()["error"]["message"]


def test_a_masked_edit_repaints_what_is_clear(url: str, student: fewstep.Pipeline, psnr) -> None:
    """OpenAI's own call: the mask's fully transparent part is made anew, as the pipeline inpaints it."""
    client = openai.OpenAI(api_key="none", base_url=f"{url}/v1", max_retries=0)
    alpha = np.full((64, 64), 255, np.uint8)
    alpha[16:48, 8:40], alpha[:8] = 0, 1
    clear = Image.new("RGB", (64, 64), "white")
    clear.putalpha(Image.fromarray(alpha))
    out = io.BytesIO()
    clear.save(out, "PNG")
    asked = {"model": "student", "prompt": "a green ring", "image": ("a.png", png())}
    edited = client.images.edit(**asked, mask=("m.png", out.getvalue()), extra_body={"seed": 1})
    white = np.where(alpha == 0, 255, 0).astype(np.uint8)
    alone = student("a green ring", image=Image.open(io.BytesIO(png())), mask=white, seed=1)
    assert psnr(pixels(edited.data[0].b64_json), alone.images[0]) >= 75.0
    whole = client.images.edit(**asked, extra_body={"seed": 1, "strength": 1.0})
    assert psnr(pixels(edited.data[0].b64_json), pixels(whole.data[0].b64_json)) < 30, "the mask shows"
    for mask, words in ((png(), "no transparency"), (out.getvalue()[:80], "mask"), (b"", "mask")):
        with pytest.raises(openai.UnprocessableEntityError, match=words):
            client.images.edit(**asked, mask=("m.png", mask))
    small = io.BytesIO()
    clear.resize((32, 64)).save(small, "PNG")
    with pytest.raises(openai.UnprocessableEntityError, match="32x64 and the image 64x64"):
        client.images.edit(**asked, mask=("m.png", small.getvalue()))


def test_prompts_of_any_kind(url: str) -> None:
    for prompt in ("", "\0", "שלום", "🟥" * 50, "a" * 4000, "  ", "((((a:1.5", "\u202eabc"):
        answer = generate(url, prompt=prompt, num_inference_steps=1)
        assert answer.status_code in (200, 422), answer.text


def test_a_body_is_counted_while_it_streams(url: str) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(200):
            yield b" " * 10_000

    for path, kind in (("generations", "application/json"), ("edits", "multipart/form-data; boundary=x")):
        try:
            answer = httpx.post(f"{url}/v1/images/{path}", content=endless(), headers={"content-type": kind})
        except httpx.WriteError:
            continue  # it hung up before all was sent
        assert answer.status_code in (400, 413)


def bomb() -> bytes:
    """A PNG that says it has 30,000 by 30,000 pixels."""
    data = bytearray(png())
    import struct
    import zlib

    data[16:24] = struct.pack(">II", 30_000, 30_000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


@pytest.mark.parametrize("file", [b"", b"GIF89a", png()[:60], bomb(), b"<svg/>", b"\x89PNG\r\n\x1a\n"])
def test_bad_uploads_are_refused(url: str, file: bytes) -> None:
    answer = httpx.post(f"{url}/v1/images/edits", data={"prompt": "a"}, files={"image": ("x.png", file)})
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_image")


def test_bad_forms_are_refused(url: str) -> None:
    def post(**more: Any) -> tuple[int, str]:
        answer = httpx.post(f"{url}/v1/images/edits", **more)
        return answer.status_code, answer.json()["error"]["code"]

    assert post(data={"prompt": "a"})[0] == 415
    assert post(files={"image": ("x", png()), "masque": ("y", png())}, data={"prompt": "a"})[0] == 400
    assert post(files={"image": ("x", png()), "mask": ("y", png())}, data={"prompt": "a"}) == (422, "invalid_image")
    clear = [("image", ("x", png())), *[("mask", ("y", png()))] * 2]
    assert post(files=clear, data={"prompt": "a"}) == (400, "invalid_request")
    assert post(files=[("image", ("x", png())), ("image", ("y", png()))], data={"prompt": "a"})[0] == 400
    assert post(files={"image": ("x", png())})[0] == 400
    assert post(files={"image": ("x", png())}, data={"prompt": "a", "strength": "nan"})[0] == 400
    assert post(files={"image": ("x", png() + bytes(400_000))}, data={"prompt": "a"})[0] == 413
    assert post(content=b"--x\r\n", headers={"content-type": "multipart/form-data; boundary=x"})[0] == 400
    assert post(content=b"", headers={"content-type": "multipart/form-data"})[0] == 400


def test_health_models_metrics_and_ids(url: str) -> None:
    assert httpx.get(f"{url}/health/live").status_code == 200
    assert httpx.get(f"{url}/health/ready").json() == {"status": "ready"}
    assert httpx.get(f"{url}/v1/models/student").json()["id"] == "student"
    assert httpx.get(f"{url}/v1/models/none").status_code == 404
    assert httpx.get(f"{url}/nothing").json()["error"]["code"] == "not_found"
    assert httpx.get(f"{url}/v1/images/generations").status_code == 405
    generate(url)
    metrics = httpx.get(f"{url}/metrics").text
    for name in ('fewstep_stage_seconds_count{stage="tick"}', 'fewstep_requests_total{outcome="ok"}', "fewstep_slots "):
        assert name in metrics
    assert 'fewstep_state{state="ready"} 1.0' in metrics
    given = httpx.get(f"{url}/health/live", headers={"x-request-id": "abc-1"}).headers["x-request-id"]
    made = httpx.get(f"{url}/health/live", headers={"x-request-id": "a b<>"}).headers["x-request-id"]
    assert given == "abc-1"
    assert len(made) == 16


def test_a_client_that_leaves_cancels_what_it_asked_for(service: tuple[str, Service]) -> None:
    url, held = service
    before = held.server.stats()
    for stream in (False, True):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{url}/v1/images/generations",
                json={"prompt": "a", "n": 4, "num_inference_steps": 40, "guidance_scale": 3.0, "stream": stream},
                timeout=httpx.Timeout(10, read=0.1),
            ).read()
    wait_until(lambda: held.server.stats().outstanding == 0)
    assert held.server.stats().cancelled == before.cancelled + 2


def test_a_full_queue_is_429_with_retry_after(student: fewstep.Pipeline) -> None:
    with serving(load_student(student, most_slots=1, most_rows=1, queue=1), SETTINGS) as (url, _):
        answers: list[httpx.Response] = []
        threads = [
            threading.Thread(target=lambda: answers.append(generate(url, num_inference_steps=20))) for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        refused = [a for a in answers if a.status_code == 429]
        assert len(refused) == 4
        assert all(int(a.headers["retry-after"]) >= 1 for a in refused)


def test_ready_follows_the_server(student: fewstep.Pipeline) -> None:
    go = threading.Event()

    def load(observer: Any) -> Any:
        go.wait(30)
        return load_student(student, most_slots=2, most_rows=2)(observer)

    with serving(load, SETTINGS, ready=False) as (url, service):
        assert httpx.get(f"{url}/health/live").status_code == 200
        starting = httpx.get(f"{url}/health/ready")
        assert (starting.status_code, starting.json()["status"]) == (503, "starting")
        assert generate(url).status_code == 503
        go.set()
        service.wait(60)
        assert httpx.get(f"{url}/health/ready").status_code == 200
        service.server._engine_failed(fewstep.FewstepError("as after a device error"))
        failed = httpx.get(f"{url}/health/ready")
        assert (failed.status_code, failed.json()["status"]) == (503, "failed")
        answer = generate(url)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_failed")
        assert int(answer.headers["retry-after"]) >= 1


def test_a_model_that_cannot_be_loaded_never_gets_ready() -> None:
    def load(observer: Any) -> Any:
        raise OSError("/secret/path")

    with serving(load, SETTINGS, ready=False) as (url, service):
        wait_until(lambda: service.error is not None)
        assert httpx.get(f"{url}/health/ready").json() == {"status": "failed"}
        answer = generate(url)
        assert answer.status_code == 503
        assert "/secret" not in answer.text


def test_tokens_hosts_and_origins(student: fewstep.Pipeline) -> None:
    token = "0123456789abcdef"
    settings = Settings(model="m", token=token, hosts=("127.0.0.1",))
    with serving(load_student(student, most_slots=2, most_rows=2), settings) as (url, _):
        assert httpx.get(f"{url}/health/ready").status_code == 200
        assert httpx.get(f"{url}/metrics").status_code == 401
        assert generate(url).status_code == 401
        for wrong in ("Bearer x", f"Basic {token}", token, f"Bearer {token}x", "Bearer \xe9"):
            assert httpx.get(f"{url}/v1/models", headers={"authorization": wrong.encode("latin-1")}).status_code == 401
        held = {"authorization": f"Bearer {token}"}
        assert httpx.get(f"{url}/v1/models", headers=held).status_code == 200
        assert httpx.get(f"{url}/v1/models", headers={**held, "host": "evil.example"}).status_code == 421
        assert httpx.get(f"{url}/v1/models", headers={**held, "origin": "https://evil.example"}).status_code == 403
        assert httpx.get(f"{url}/v1/models", headers={**held, "origin": url}).status_code == 200
    with pytest.raises(ArgumentError, match="reached from other machines"):
        allowed_hosts("0.0.0.0", guarded=False)
    assert allowed_hosts("0.0.0.0", guarded=True) == ()
    assert "localhost" in allowed_hosts("127.0.0.1", guarded=False)
    with pytest.raises(ArgumentError, match="at least 16"):
        Settings(model="m", token="short")


def test_sigterm_finishes_what_was_accepted_and_refuses_the_rest() -> None:
    with serve_process("--drain", "60") as (url, process):
        answers: list[httpx.Response] = []
        slow = threading.Thread(target=lambda: answers.append(generate(url, n=8, num_inference_steps=100)))
        slow.start()
        wait_until(lambda: "fewstep_slots_in_use 8.0" in httpx.get(f"{url}/metrics").text)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 503)
        refused = generate(url)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
        assert "retry-after" in refused.headers
        slow.join(60)
        assert [a.status_code for a in answers] == [200]
        assert process.wait(20) == 0
        assert process.stderr is not None
        lines = [line for line in process.stderr.read().splitlines() if line.startswith("{")]
        records = [json.loads(line) for line in lines]
        assert {"ready", "draining", "drained", "request"} <= {r["message"] for r in records}
        assert "red circle" not in "".join(lines), "prompts stay out of the logs"


def test_a_killed_server_ends_its_clients_with_an_error() -> None:
    with serve_process() as (url, process):
        errors: list[Exception] = []

        def ask() -> None:
            try:
                generate(url, n=8, num_inference_steps=100)
            except httpx.HTTPError as error:
                errors.append(error)

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        wait_until(lambda: "fewstep_slots_in_use 24.0" in httpx.get(f"{url}/metrics").text)
        process.kill()
        began = time.monotonic()
        for thread in threads:
            thread.join(20)
        assert len(errors) == 3
        assert time.monotonic() - began < 20


def test_a_port_that_is_taken_is_said_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ArgumentError, match=f"nothing can listen on 127.0.0.1, port {port}"):
            listen("127.0.0.1", port)
    with pytest.raises(ArgumentError, match="nothing can listen on"):
        listen("192.0.2.1", 0)
    made = listen("localhost", 0)
    assert len({s.getsockname()[1] for s in made}) == 1
    for opened in made:
        opened.close()


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("size", "9x9", "size: expected one of auto, 64x64"),
        ("n", 99, "n: Expected `int` <= "),
        ("seed", "word", "seed: "),
    ],
)
def test_a_refusal_names_the_field_and_repeats_nothing(url: str, field: str, value: Any, words: str) -> None:
    answer = generate(url, **{field: value})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, field)
    assert error["message"].startswith(words)
    assert str(value) not in error["message"]


def test_serving_beyond_loopback_without_a_token_is_refused() -> None:
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "fewstep", "serve", "student", "--host", "0.0.0.0", "--json"],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin"},
    )
    assert done.returncode == 2
    assert "FEWSTEP_TOKEN" in json.loads(done.stdout)["error"]["remedy"]
