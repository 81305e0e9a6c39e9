"""Every argument of a call over HTTP, each with a field or a reason; what is made is the library's own, bit for bit."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, get_args

import fewstep
import httpx
import msgspec
import numpy as np
import pytest
from fewstep.errors import CancelledError, DeadlineError
from fewstep.runtime.keywords import CallArguments, SamplerOptions
from fewstep.runtime.second_pass import SecondPass, in_two_passes
from fewstep.serving.http import Settings
from fewstep.serving.http.arguments import EDITING, NOT_TAKEN, PLAIN, SHAPED, arguments, editing_arguments
from fewstep.serving.http.calls import JSON_FIELDS, LISTS, make_calls
from http_service import generate, load_student, pixels, png, serving
from PIL import Image

SETTINGS = Settings(model="student", images=2, steps=10)
SIZES = [(64, 64), (128, 128)]
PROMPT = "a red circle"


@pytest.fixture(scope="module")
def url(student: fewstep.Pipeline) -> Iterator[str]:
    options: dict[str, Any] = {"most_slots": 4, "buckets": [1], "row_threads": 1, "image": True, "sizes": SIZES}
    with serving(load_student(student, **options), SETTINGS) as (made, _):
        yield made


def edit(url: str, sent: dict[str, Any], **files: bytes) -> httpx.Response:
    named = {name: (f"{name}.png", data) for name, data in files.items()}
    form = {k: v if isinstance(v, str) else json.dumps(v) for k, v in sent.items()}
    return httpx.post(f"{url}/v1/images/edits", data=form, files=named, timeout=60)


def pictures(answer: httpx.Response) -> list[np.ndarray]:
    assert answer.status_code == 200, answer.text
    return [pixels(one["b64_json"]) for one in answer.json()["data"]]


def test_every_argument_of_a_call_has_a_field_or_a_reason() -> None:
    told = [set(PLAIN), set(EDITING), set(SHAPED), set(NOT_TAKEN)]
    asked = CallArguments.__annotations__.keys() - SamplerOptions.__annotations__.keys()
    assert set.union(*told) == asked, "sampler_options take the rest"
    assert sum(map(len, told)) == len(asked), "each in one place"
    calls = make_calls(SETTINGS, SIZES)
    generation, edited = ({f.name: f.type for f in msgspec.structs.fields(c)} for c in (calls.generation, calls.edit))
    assert {*PLAIN.values()} <= generation.keys()
    assert {*EDITING.values()} <= edited.keys()
    assert {*SHAPED.values()} - {"image", "mask"} <= generation.keys(), "those two are files of a form"
    assert all(NOT_TAKEN.values())
    hires = msgspec.structs.fields(_struct(generation["hires"]))
    assert {f.name for f in fields(SecondPass)} == {f.name for f in hires}


def test_a_field_is_its_argument() -> None:
    """Whatever is sent, in JSON and as a form's text, is what the library is given."""
    values: dict[str, Any] = {
        **{"steps": 3, "guidance": 2.5, "options": {"eta": 0.5}, "negative": "a", "negative_2": "b", "prompt_2": "c"},
        **{"prompt_syntax": "a1111", "long_prompts": "chunk", "clip_skip": 1, "loras": {"x": 0.5}, "sampler": "euler"},
        **{"schedule": "karras", "schedule_digest": "ab", "timesteps": [999.0, 1.0], "sigmas": [3.5, 0.0]},
        **{"compat": "diffusers", "seed": 7, "seed_device": "cuda:43008", "shared_stream": True},
        **{"variation_seed": 9, "variation": 0.25, "original_size": (64, 96), "crop_top_left": (1, 2)},
        **{"target_size": (3, 4), "negative_original_size": (5, 6), "negative_crop_top_left": (7, 8)},
        **{
            "negative_target_size": (9, 10),
            "decoder": "tiny",
            "strength": 0.5,
            "fit": "cover",
            "mask_threshold": 0.25,
            "noise_level": 20,
        },
    }
    assert values.keys() == PLAIN.keys() | EDITING.keys()
    calls = make_calls(SETTINGS, SIZES)
    sent = {name: list(v) if isinstance(v := values[a], tuple) else v for a, name in (PLAIN | EDITING).items()}
    body = {k: v for k, v in sent.items() if k not in EDITING.values()}
    made = arguments(calls.generation_from({"prompt": PROMPT, **body}))
    assert made == {a: values[a] for a in PLAIN} | {"images_per_prompt": 1}
    form = {k: json.dumps(v) if k in JSON_FIELDS or isinstance(v, bool) else str(v) for k, v in sent.items()}
    call = calls.edit_from({"prompt": PROMPT, **form})
    assert (arguments(call), editing_arguments(call)) == (made, {a: values[a] for a in EDITING})
    often = {name: [str(v) for v in sent[name]] for name in LISTS if len(sent[name]) > 1}
    assert arguments(calls.edit_from({"prompt": PROMPT, **form, **often})) == made, (
        "or once an entry, as OpenAPI has it"
    )
    assert calls.edit_from({"prompt": PROMPT, "timesteps": "5"}).timesteps == [5]


@pytest.mark.parametrize(
    ("hires", "second"),
    [
        ({}, SecondPass()),
        ({"scale": 2, "strength": 0.6, "steps": 4, "upscaler": "latent"}, {"strength": 0.6, "steps": 4}),
        ({"size": "64x64", "upscaler": "nearest"}, SecondPass(size=(64, 64), scale=None, upscaler="nearest")),
    ],
    ids=["usual", "latent", "size"],
)
def test_a_second_pass_is_the_librarys(url: str, student: fewstep.Pipeline, hires: Any, second: Any) -> None:
    if isinstance(second, dict):
        second = SecondPass(**second, upscaler="latent")
    sent = {"seed": 3, "num_inference_steps": 3, "guidance_scale": 1.0, "n": 2}
    given: dict[str, Any] = {"seed": 3, "steps": 3, "guidance": 1.0, "images_per_prompt": 2}
    alone = in_two_passes(student, PROMPT, second=second, **given)
    made = generate(url, **sent, hires=hires)
    np.testing.assert_array_equal(pictures(made), alone.images)
    assert [d["seed"] for d in made.json()["data"]] == [3, 4]
    assert made.json()["size"] == f"{alone.images.shape[2]}x{alone.images.shape[1]}"


def test_a_second_pass_after_an_edit(url: str, student: fewstep.Pipeline) -> None:
    sent = {"prompt": PROMPT, "seed": 3, "strength": 0.7, "num_inference_steps": 3, "hires": {"strength": 0.4}}
    image = Image.new("RGB", (64, 64), (200, 30, 30))
    alone = in_two_passes(student, PROMPT, second=SecondPass(strength=0.4), seed=3, strength=0.7, steps=3, image=image)
    np.testing.assert_array_equal(pictures(edit(url, sent, image=png()))[0], alone.images[0])


def test_a_server_finishes_both_passes_before_it_ends(student: fewstep.Pipeline) -> None:
    call: dict[str, Any] = {"seed": 3, "steps": 3, "second": SecondPass(strength=0.7)}
    with fewstep.Server(student, sizes=SIZES, buckets=[1], row_threads=1, image=True) as server:
        ticket, given_up = server.submit(PROMPT, **call), server.submit(PROMPT, **call)
        late = server.submit(PROMPT, **call, deadline_s=0.001)
        told = [(step.index, step.total) for step in ticket.steps()]
        given_up.cancel()
    assert told == [(i, 5) for i in range(5)]
    result = ticket.result()
    np.testing.assert_array_equal(result.images, in_two_passes(student, PROMPT, **call).images)
    assert result.parameters[0]["hires"] == {"scale": 2.0, "strength": 0.7, "upscaler": "lanczos"}
    assert result.timings["total"] >= result.timings["first"]["total"] + result.timings["denoise"]
    assert isinstance(given_up.error, CancelledError)
    assert isinstance(late.error, DeadlineError)
    assert server.stats().outstanding == 0


def test_previews_and_steps_count_through_both_passes(url: str, student: fewstep.Pipeline) -> None:
    stream = generate(url, seed=1, num_inference_steps=3, hires={"strength": 0.7}, stream=True, partial_images=3)
    events = [json.loads(line.removeprefix("data: ")) for line in stream.text.splitlines() if line[:5] == "data:"]
    *partials, last = events
    assert {p["steps"] for p in partials} == {5}
    assert [p["step"] for p in partials] == sorted({p["step"] for p in partials})
    assert (partials[0]["size"], partials[-1]["size"], last["size"]) == ("64x64", "128x128", "128x128")


def test_a_list_of_a_form_may_come_once_an_entry(url: str, student: fewstep.Pipeline) -> None:
    image = Image.new("RGB", (64, 64), (200, 30, 30))
    alone = student(PROMPT, seed=3, timesteps=[999, 500, 100], image=image, strength=0.9).images[0]
    sent = {"prompt": PROMPT, "seed": "3", "strength": "0.9", "timesteps": ["999", "500", "100"]}
    files = {"image": ("image.png", png())}
    made = httpx.post(f"{url}/v1/images/edits", data=sent, files=files, timeout=60)
    np.testing.assert_array_equal(pictures(made)[0], alone)
    twice = httpx.post(f"{url}/v1/images/edits", data={**sent, "seed": ["3", "4"]}, files=files, timeout=60)
    assert "the field 'seed' twice" in twice.json()["error"]["message"]


@pytest.mark.parametrize(
    ("sent", "given"),
    [
        ({"variation_seed": 9, "variation": 0.3, "n": 2}, {"variation_seed": 9, "variation": 0.3}),
        ({"seed_device": "cuda", "sampler": "euler_ancestral"}, {"seed_device": "cuda", "sampler": "euler_ancestral"}),
        ({"shared_stream": True, "n": 2}, {"shared_stream": True}),
        ({"timesteps": [999, 500, 100]}, {"timesteps": [999, 500, 100]}),
        ({"sampler": "euler", "sigmas": [14.6, 2.0, 0.0]}, {"sampler": "euler", "sigmas": [14.6, 2.0, 0.0]}),
        ({"sampler": "ddim", "compat": "diffusers"}, {"sampler": "ddim", "compat": "diffusers"}),
    ],
    ids=lambda d: next(iter(d)),
)
def test_a_field_makes_the_librarys_picture(url: str, student: fewstep.Pipeline, sent: Any, given: Any) -> None:
    sent = {"num_inference_steps": 3, **sent} if not {"timesteps", "sigmas"} & sent.keys() else sent
    given = {"steps": 3, **given} if "num_inference_steps" in sent else given
    alone = student(PROMPT, seed=3, images_per_prompt=sent.get("n", 1), **given).images
    np.testing.assert_array_equal(pictures(generate(url, seed=3, **sent)), alone)
    plain = student(PROMPT, seed=3, images_per_prompt=sent.get("n", 1), steps=3).images
    assert not np.array_equal(alone, plain), "it shows"


def test_a_soft_mask_is_a_field(url: str, student: fewstep.Pipeline) -> None:
    grey = np.linspace(0, 255, 64).astype(np.uint8)
    mask = Image.fromarray(np.broadcast_to(grey, (64, 64)).copy())
    image = Image.new("RGB", (64, 64), (200, 30, 30))
    sent: dict[str, Any] = {"prompt": "a ring", "seed": 1, "num_inference_steps": 3, "mask_kind": "white"}
    made = {}
    for told, threshold in (("none", None), ("0.8", 0.8), (None, 0.5)):
        form = sent if told is None else {**sent, "mask_threshold": told}
        made[told] = pictures(edit(url, form, image=png(), mask=_saved(mask)))[0]
        alone = student("a ring", seed=1, steps=3, image=image, mask=mask, mask_threshold=threshold).images[0]
        np.testing.assert_array_equal(made[told], alone)
    assert not np.array_equal(made["none"], made["0.8"])


@pytest.mark.parametrize(
    ("sent", "status", "words"),
    [
        ({"hires": {"scale": 17}}, 400, "hires.scale: Expected `float` <= 16.0"),
        ({"hires": {"scale": 3}}, 422, "second pass's size is 192x192; expected one of 64x64, 128x128"),
        ({"hires": {"scale": 2, "size": "128x128"}}, 422, "hires has a scale and a size"),
        ({"hires": {"upscaler": "esrgan"}}, 400, "hires.upscaler: expected one of lanczos, nearest"),
        ({"hires": {"size": "72x72"}}, 400, "hires.size: expected one of 64x64, 128x128"),
        ({"hires": {"steps": 11}}, 400, "hires.steps: Expected `int` <= 10"),
        ({"hires": {"noise": 1}}, 400, "hires.noise: there is no such field"),
        ({"hires": {"strength": 0.01}, "num_inference_steps": 2}, 422, "leaves no step"),
        ({"hires": 2}, 400, "hires: Expected `object | null`"),
        ({"variation": 1.5, "variation_seed": 1}, 400, "variation: Expected `float` <= 1.0"),
        ({"variation_seed": 1}, 422, "without variation"),
        ({"seed_device": "cuda:²"}, 422, "seed device"),
        ({"timesteps": [1] * 11}, 400, "timesteps: Expected `array` of length <= 10"),
        ({"timesteps": [9, 5, 2], "sigmas": [9, 5, 2, 0]}, 422, "timesteps"),
        ({"original_size": [64, 64]}, 422, "a model that is told no sizes"),
        ({"decoder": "tiny"}, 422, "decoder 'tiny', which the bundle"),
        ({"decoder": "half"}, 400, "decoder: expected one of full, tiny"),
        ({"original_size": [64]}, 400, "original_size: Expected `array` of length 2"),
        ({"latents": [[1.0]]}, 400, "latents: there is no such field"),
    ],
    ids=lambda v: json.dumps(v) if isinstance(v, dict) else None,
)
def test_ill_values_are_refused_by_name(url: str, sent: Any, status: int, words: str) -> None:
    answers = [generate(url, **sent), edit(url, {"prompt": PROMPT, **sent}, image=png())]
    for answer in answers:
        error = answer.json()["error"]
        assert answer.status_code == status, error
        assert words in error["message"]


def _saved(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def _struct(annotation: Any) -> Any:
    """The struct of an optional, annotated field."""
    if hasattr(annotation, "__struct_fields__"):
        return annotation
    return next(filter(None, map(_struct, get_args(annotation))), None)
