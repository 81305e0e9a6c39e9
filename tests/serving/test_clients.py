"""Requests of LiteLLM's proxy and of Open WebUI's picture settings, as they send them; OpenAI's own is in test_http.

LiteLLM's were recorded from its proxy (1.108.7) with `model: openai/student` and this service as its `api_base`; Open
WebUI's are those of `routers/images.py` with its engine "openai".
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import fewstep
import httpx
import pytest
from fewstep.serving.http import Settings
from http_service import load_student, pixels, png, serving

STAINLESS = {
    "user-agent": "AsyncOpenAI/Python 3.57.0",
    "x-stainless-lang": "python",
    "x-stainless-retry-count": "0",
    "x-stainless-read-timeout": "6000.0",
}


@pytest.fixture(scope="module")
def url(student: fewstep.Pipeline) -> Iterator[str]:
    settings = Settings(model="student", aliases=("dall-e-2", "gpt-image-1"), token="sk-" + "0" * 20)
    with serving(load_student(student, most_slots=4, most_rows=2, image=True), settings) as (made, _):
        yield f"{made}/v1"


def check(answer: httpx.Response, count: int = 1) -> None:
    """What these clients read of an answer."""
    assert answer.status_code == 200, answer.text
    made = answer.json()
    assert isinstance(made["created"], int)
    assert len(made["data"]) == count
    for data in made["data"]:
        assert data.get("url") is None
        assert pixels(data["b64_json"]).shape == (64, 64, 3)


HEADERS = {"authorization": "Bearer sk-" + "0" * 20}


def test_litellms_proxy(url: str) -> None:
    asked = {"model": "student", "prompt": "a red circle", "n": 1, "size": "64x64"}
    check(httpx.post(f"{url}/images/generations", json=asked, headers={**HEADERS, **STAINLESS}, timeout=60))
    form = {"model": "student", "prompt": "a ring"}
    files = {"image[]": ("image.png", png(), "image/png")}
    headers = {**HEADERS, "user-agent": "litellm/1.108.7"}
    check(httpx.post(f"{url}/images/edits", data=form, files=files, headers=headers, timeout=60))


def test_litellms_proxy_asks_what_models_there_are(url: str) -> None:
    assert httpx.get(f"{url}/models", headers=HEADERS).json()["data"][0]["id"] == "student"


@pytest.mark.parametrize(
    "more",
    [
        {"model": "dall-e-2", "response_format": "b64_json"},
        {"model": "gpt-image-1"},
        {"model": "dall-e-2", "response_format": "b64_json", "quality": "hd", "style": "natural"},
    ],
)
def test_open_webuis_picture(url: str, more: dict[str, Any]) -> None:
    """Its settings' own parameters (`IMAGES_OPENAI_API_PARAMS`) go into the body too."""
    asked = {"prompt": "a red circle", "n": 2, "size": "64x64", **more}
    headers = {**HEADERS, "content-type": "application/json", "x-openwebui-user-name": "ann"}
    check(httpx.post(f"{url}/images/generations", json=asked, headers=headers, timeout=60), 2)
    own = {**asked, "num_inference_steps": 2, "guidance_scale": 1.0, "seed": 3}
    check(httpx.post(f"{url}/images/generations?api-version=1", json=own, headers=headers, timeout=60), 2)


def test_open_webuis_edit(url: str) -> None:
    form = {"model": "gpt-image-1", "prompt": "a ring", "n": "1", "size": "64x64", "background": "opaque"}
    one = [("image", ("image.png", png(), "image/png"))]
    listed = [("image[]", ("image.png", png(), "image/png"))]
    for files in (one, listed):
        check(httpx.post(f"{url}/images/edits", data=form, files=files, headers=HEADERS, timeout=60))
    dalle = {"model": "dall-e-2", "prompt": "a ring", "response_format": "b64_json"}
    check(httpx.post(f"{url}/images/edits", data=dalle, files=one, headers=HEADERS, timeout=60))


def test_a_picture_is_a_whole_file(url: str) -> None:
    """Clients hand the bytes on, and guess no more than PNG."""
    made = httpx.post(f"{url}/images/generations", json={"prompt": "a"}, headers=HEADERS, timeout=60).json()
    assert base64.b64decode(made["data"][0]["b64_json"]).startswith(b"\x89PNG\r\n\x1a\n")
