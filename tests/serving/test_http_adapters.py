"""What changes a model for a request, over HTTP: LoRAs by name, control pictures, a picture as prompt."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fewstep
import httpx
import numpy as np
import pytest
from adapters import SIDE, drawing
from fewstep.serving import Server
from fewstep.serving.http import Settings
from http_service import generate, load_student, pixels, png, serving
from safetensors.numpy import load_file, save_file

SETTINGS = Settings(model="tiny", json_bytes=2000, body_bytes=200_000)
Distance = Callable[[Any, Any], float]


@pytest.fixture(scope="module")
def pipe(adapted_sd1: Any) -> fewstep.Pipeline:
    return fewstep.load(adapted_sd1.bundle, size=(SIDE, SIDE), threads=1)


@pytest.fixture(scope="module")
def url(pipe: fewstep.Pipeline) -> Iterator[str]:
    def load(observer: Any) -> Server:
        return Server(pipe, most_slots=4, most_rows=4, buckets=[4], row_threads=1, image=True, observer=observer)

    with serving(load, SETTINGS) as (address, _):
        yield address


def file_of(seed: int) -> bytes:
    out = io.BytesIO()
    drawing(seed).save(out, "PNG")
    return out.getvalue()


def text_of(seed: int) -> str:
    return base64.b64encode(file_of(seed)).decode()


def made(answer: httpx.Response) -> Any:
    assert answer.status_code == 200, answer.text
    return pixels(answer.json()["data"][0]["b64_json"])


CALL: dict[str, Any] = {"seed": 3, "num_inference_steps": 3, "guidance_scale": 4.0}
OWN: dict[str, Any] = {"seed": 3, "steps": 3, "guidance": 4.0}


def test_control_pictures_in_a_body_are_those_of_a_call(url: str, pipe: fewstep.Pipeline, psnr: Distance) -> None:
    plain = made(generate(url, **CALL))
    data = f"data:image/png;base64,{text_of(2)}"
    control = {"canny": {"image": text_of(1), "scale": 0.8, "end": 0.7}, "depth": {"image": data, "start": 0.3}}
    both = made(generate(url, **CALL, control=control))
    expected = pipe(
        "a red circle",
        **OWN,
        control={"canny": drawing(1), "depth": drawing(2)},
        controlnet_conditioning_scale={"canny": 0.8},
        control_guidance_start={"depth": 0.3},
        control_guidance_end={"canny": 0.7},
    ).images[0]
    assert psnr(both, expected) >= 75
    assert psnr(both, plain) < 40
    guessed = made(generate(url, **CALL, control={"canny": {"image": text_of(1)}}, guess_mode=True))
    expected = pipe("a red circle", **OWN, control={"canny": drawing(1)}, guess_mode=True).images[0]
    assert psnr(guessed, expected) >= 75
    assert psnr(made(generate(url, **CALL)), plain) == float("inf")


def test_a_picture_as_prompt(url: str, pipe: fewstep.Pipeline, psnr: Distance) -> None:
    styled = made(generate(url, **CALL, ip_adapter={"image": text_of(4), "scale": 0.6}))
    expected = pipe("a red circle", **OWN, ip_adapter_image=drawing(4), ip_adapter_scale=0.6).images[0]
    assert psnr(styled, expected) >= 75
    assert psnr(styled, made(generate(url, **CALL))) < 60


def test_files_of_a_form_are_pictures_of_controls_and_prompts(url: str, pipe: fewstep.Pipeline, psnr: Distance) -> None:
    form = {"prompt": "a red circle", "seed": 3, "num_inference_steps": 3, "guidance_scale": 4.0, "strength": 0.7}
    files = {"image": file_of(5), "control[canny]": file_of(1), "ip_adapter": file_of(4)}
    control = json.dumps({"canny": {"scale": 0.5}})
    edited = made(httpx.post(f"{url}/v1/images/edits", data={**form, "control": control}, files=files, timeout=60))
    expected = pipe(
        "a red circle",
        **OWN,
        image=drawing(5),
        strength=0.7,
        control={"canny": drawing(1)},
        controlnet_conditioning_scale=0.5,
        ip_adapter_image=drawing(4),
    ).images[0]
    assert psnr(edited, expected) >= 75


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"control": {"canny": {}}}, 422, "control[canny]"),
        ({"control": {"canny": {"image": "!"}}}, 422, "control[canny]"),
        ({"control": {"canny": {"image": "aGVsbG8="}}}, 422, "control[canny]"),
        ({"control": {"pose": {"image": text_of(1)}}}, 422, None),
        ({"control": {"canny": {"image": text_of(1), "scale": 1e9}}}, 400, "control[...].scale"),
        ({"control": {"canny": {"image": text_of(1), "start": 0.9, "end": 0.2}}}, 422, None),
        ({"control": {"canny": {"picture": text_of(1)}}}, 400, "control[...].picture"),
        ({"control": ["canny"]}, 400, "control"),
        ({"guess_mode": True}, 422, None),
        ({"ip_adapter": {"scale": 1.0}}, 422, "ip_adapter"),
        ({"ip_adapter": {"image": "aGVsbG8="}}, 422, "ip_adapter"),
        ({"control": {"canny": {"image": "A" * 300_000}}}, 413, None),
    ],
)
def test_what_is_wrong_with_them_is_named(url: str, fields: dict[str, Any], status: int, param: str | None) -> None:
    answer = generate(url, **CALL, **fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error


def test_files_that_no_form_has_are_refused(url: str) -> None:
    def post(files: list[tuple[str, bytes]], **more: str) -> tuple[int, str]:
        form = {"prompt": "a", **more}
        answer = httpx.post(f"{url}/v1/images/edits", data=form, files=[("image", file_of(5)), *files], timeout=60)
        return answer.status_code, answer.json()["error"]["message"]

    assert post([("control[]", file_of(1))])[0] == 400
    assert post([("control", file_of(1))])[0] == 400
    assert post([("control[canny]", file_of(1))] * 2)[0] == 400
    assert post([("ip_adapter", file_of(1))] * 2)[0] == 400
    assert post([("control[pose]", file_of(1))])[0] == 422
    status, words = post([("control[canny]", file_of(1))], control=json.dumps({"canny": {"image": text_of(1)}}))
    assert (status, "two pictures" in words) == (422, True)


def test_a_model_without_them_says_so_and_takes_no_large_body(student: fewstep.Pipeline) -> None:
    settings = Settings(model="student", json_bytes=2000)
    with serving(load_student(student, most_slots=2, most_rows=2), settings) as (address, _):
        short = text_of(1)[:1000]
        assert generate(address, control={"canny": {"image": short}}).status_code == 422
        assert generate(address, control={"canny": {"image": "A" * 3000}}).status_code == 413


def test_loras_are_named_in_a_request(
    student: fewstep.Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, psnr: Distance
) -> None:
    """By name alone, from the folder that the operator names; in a form they are JSON."""
    with serving(load_student(student, most_slots=8, most_rows=4, image=True), SETTINGS) as (url, _):
        call = {"seed": 3, "num_inference_steps": 2, "response_format": "b64_json"}
        plain = pixels(generate(url, **call).json()["data"][0]["b64_json"])
        refused = generate(url, **call, loras={"style": 1.0})
        assert (refused.status_code, refused.json()["error"]["param"]) == (422, "loras")
        write_style(student, tmp_path / "style.safetensors")
        monkeypatch.setattr(student.loras, "folder", tmp_path)
        styled = pixels(generate(url, **call, loras={"style": 0.7}).json()["data"][0]["b64_json"])
        expected = student("a red circle", seed=3, steps=2, loras={"style": 0.7}).images[0]
        assert psnr(expected, styled) >= 75
        assert psnr(plain, styled) < 50
        form = {"prompt": "a red circle", "strength": "0.5", "loras": '{"style": 0.7}'}
        edited = httpx.post(
            f"{url}/v1/images/edits", data=form, files={"image": ("a.png", png(), "image/png")}, timeout=60
        )
        assert edited.status_code == 200, edited.text
        for loras in ({"absent": 1.0}, {"../style": 1.0}, {str(tmp_path / "style"): 1.0}):
            refused = generate(url, **call, loras=loras)
            assert (refused.status_code, refused.json()["error"]["param"]) == (422, "loras")
        for loras in ({"style": 1e9}, {"style": "much"}, ["style"], {"": 1.0}):
            assert generate(url, **call, loras=loras).status_code == 400


def write_style(pipe: fewstep.Pipeline, path: Path) -> None:
    """A LoRA of the queries of a pipeline's UNet, random in both matrices."""
    random = np.random.default_rng(1)
    tensors = {}
    part = pipe.bundle.component("unet")
    for name, value in load_file(pipe.bundle.path(part.weights)).items():
        if name.endswith("attn1.to_q.weight"):
            module = name.removeprefix("model.").removesuffix(".weight")
            tensors[f"unet.{module}.lora_A.weight"] = random.normal(size=(4, value.shape[1])).astype(np.float32)
            tensors[f"unet.{module}.lora_B.weight"] = random.normal(size=(value.shape[0], 4)).astype(np.float32)
    save_file(tensors, path)
