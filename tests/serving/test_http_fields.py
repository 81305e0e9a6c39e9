"""Our own fields of the image calls, and which models and sizes there are, over a real socket."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fewstep
import httpx
import numpy as np
import pytest
from fewstep.serving.http import Settings
from http_service import generate, load_student, pixels, png, serving
from PIL import Image

SETTINGS = Settings(model="student", aliases=("gpt-image-1",), images=2, steps=10)
SIZES = [(64, 64), (96, 64)]


@pytest.fixture(scope="module")
def url(student: fewstep.Pipeline) -> Iterator[str]:
    options: dict[str, Any] = {"most_slots": 4, "most_rows": 2, "image": True, "sizes": SIZES}
    with serving(load_student(student, **options), SETTINGS) as (made, _):
        yield made


def edit(url: str, fields: dict[str, Any], **files: bytes) -> httpx.Response:
    sent = {name: (f"{name}.png", data) for name, data in files.items()}
    return httpx.post(f"{url}/v1/images/edits", data=fields, files=sent, timeout=60)


def picture(answer: httpx.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return pixels(answer.json()["data"][0]["b64_json"])


def saved(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "a (red:1.4) circle", "prompt_syntax": "a1111"},
        {"prompt": "a red circle", "clip_skip": 1},
        {"prompt": "a red circle, " + "a blue square, " * 30, "long_prompts": "chunk"},
    ],
    ids=lambda f: next(n for n in f if n != "prompt"),
)
def test_prompts_are_read_as_the_pipeline_reads_them(
    url: str, student: fewstep.Pipeline, psnr: Any, fields: dict[str, Any]
) -> None:
    made = picture(generate(url, **fields, seed=3, num_inference_steps=2))
    assert psnr(made, student(**fields, seed=3, steps=2).images[0]) >= 50
    plain = student(fields["prompt"], seed=3, steps=2).images[0]
    assert psnr(made, plain) < 40, "it shows"


def test_a_size_by_request(url: str, student: fewstep.Pipeline, psnr: Any) -> None:
    made = picture(generate(url, size="96x64", seed=3))
    assert made.shape == (64, 96, 3)
    assert psnr(made, student("a red circle", size=(96, 64), seed=3).images[0]) >= 50
    refused = generate(url, size="512x512").json()["error"]
    assert refused["message"] == "size: expected one of auto, 64x64, 96x64"


def test_a_mask_may_be_white_where_it_is_made_anew(url: str, psnr: Any) -> None:
    white = np.zeros((64, 64), np.uint8)
    white[16:48, 8:40] = 255
    clear = Image.new("RGB", (64, 64))
    clear.putalpha(Image.fromarray(255 - white))
    asked = {"prompt": "a green ring", "seed": "1", "num_inference_steps": "2"}
    by_white = edit(url, {**asked, "mask_kind": "white"}, image=png(), mask=saved(Image.fromarray(white)))
    by_alpha = edit(url, asked, image=png(), mask=saved(clear))
    assert psnr(picture(by_white), picture(by_alpha)) == float("inf")
    small = edit(url, {**asked, "mask_kind": "white"}, image=png(), mask=png(32, 64))
    assert "32x64 and the image 64x64" in small.json()["error"]["message"]
    forgotten = edit(url, asked, image=png(), mask=saved(Image.fromarray(white))).json()["error"]
    assert "where mask_kind is white" in forgotten["message"]
    wrong = edit(url, {**asked, "mask_kind": "grey"}, image=png()).json()["error"]
    assert wrong["message"] == "mask_kind: expected one of clear, white"


def test_a_picture_of_another_shape_is_fitted_as_asked(url: str, student: fewstep.Pipeline, psnr: Any) -> None:
    half = Image.new("RGB", (128, 64), "red")
    half.paste("blue", (64, 0, 128, 64))
    asked = {"prompt": "a ring", "seed": "1", "size": "64x64", "strength": "0.5", "num_inference_steps": "4"}
    made = {fit: picture(edit(url, {**asked, "fit": fit}, image=saved(half))) for fit in ("stretch", "cover")}
    for fit, shown in made.items():
        alone = student("a ring", image=half, fit=fit, size=(64, 64), strength=0.5, seed=1, steps=4)
        assert psnr(shown, alone.images[0]) >= 50


def test_seed_minus_one_is_random(url: str) -> None:
    seeds = [generate(url, seed=-1, num_inference_steps=1).json()["data"][0]["seed"] for _ in range(2)]
    assert min(seeds) >= 0
    assert seeds[0] != seeds[1]


def test_a_model_that_is_not_here_is_answered_with_those_that_are(url: str) -> None:
    for answer in (generate(url, model="dall-e-3"), httpx.get(f"{url}/v1/models/dall-e-3")):
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
        assert "there is student, gpt-image-1" in error["message"]
        assert "--alias" in error["message"]


def test_a_prompt_that_is_cut_is_told_of(url: str) -> None:
    long = {"prompt": "a red circle, " * 60, "num_inference_steps": 1}
    assert "was cut" in generate(url, **long).json()["warnings"][0]
    assert "warnings" not in generate(url, **long, long_prompts="chunk").json()
    stream = generate(url, **long, stream=True).text
    assert "was cut" in stream


@pytest.mark.parametrize("tag", ["<lora:style:0.8>", "<lora:../style:1>", "<hypernet:x:1>"])
def test_a_tag_of_a_prompt_that_nothing_answers_is_refused(
    url: str, tag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a folder of LoRAs the pipeline takes paths, which no request may name."""
    (tmp_path / "style.safetensors").write_bytes(b"a file of the server's own")
    monkeypatch.chdir(tmp_path)
    answer = generate(url, prompt=f"a red circle {tag}", prompt_syntax="a1111")
    assert answer.status_code == 422, answer.text
    if tag == "<lora:style:0.8>":
        assert answer.json()["error"]["message"] == "no LoRA 'style' is here"
