"""Edited requests at every door of a process: images or a typed refusal, never anything else."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
from collections import Counter
from typing import Any

import fewstep
import httpx
import numpy as np
import pytest
from counts import count
from fewstep.errors import FewstepError
from fewstep.serving import Server
from fewstep.serving.http import Service, Settings, make_app
from fewstep.serving.live.protocol import Set, read_text
from fewstep.serving.live.settings import LiveSettings
from hostile import VALUES, edits
from PIL import Image

BODY: dict[str, Any] = {
    **{"prompt": "a red circle", "negative_prompt": "blue", "n": 1, "size": "64x64", "seed": 3, "stream": False},
    **{"num_inference_steps": 2, "guidance_scale": 1.5, "sampler": "euler", "schedule": "karras", "user": "me"},
    **{"output_format": "png", "output_compression": 50, "partial_images": 0, "deadline_s": 30.0},
    **{"response_format": "b64_json", "model": "student", "sampler_options": {"rho": 5.0, "s_churn": 0.5}},
}
CALL: dict[str, Any] = {
    **{"prompt": "a red circle", "negative": "blue", "seed": [3, 4], "size": [64, 64], "steps": 3, "guidance": 1.5},
    **{"sampler": "dpmpp_2m", "schedule": "karras", "clip_skip": 1, "images_per_prompt": 2, "seed_device": "cpu"},
    **{"long_prompts": "chunk", "prompt_syntax": "a1111", "shared_stream": False, "strength": None, "fit": "cover"},
    **{"sigmas": None, "timesteps": None, "compat": None, "mask_threshold": 0.5, "crop_top_left": (0, 0)},
    "options": {"rho": 5.0, "last_sigma": 0.01},
}
SETTINGS: dict[str, Any] = {
    **{"prompt": "a", "negative": "b", "seed": 1, "steps": 2, "strength": 0.6, "guidance": 1.0, "sampler": "lcm"},
    **{"schedule": "trailing", "size": [64, 64], "noise": "walk", "walk": 0.1, "sampler_options": {"rho": 5.0}},
}


def form(fields: dict[str, Any]) -> dict[str, str]:
    """A body as a form has it; what a form cannot hold is left out."""
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in fields.items() if isinstance(k, str)}
    return {k: v for k, v in texts.items() if k not in ("stream", "partial_images")}


def picture() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(stream, "PNG")
    return stream.getvalue()


async def answers(app: Any) -> tuple[Counter[int], list[str]]:
    counted: Counter[int] = Counter()
    wrong: list[str] = []
    files = {"image": ("a.png", picture(), "image/png")}
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:

        async def ask(name: str, path: str, **content: Any) -> None:
            answer = await client.post(path, **content, timeout=60)
            counted[answer.status_code] += 1
            if not (answer.status_code == 200 or 400 <= answer.status_code < 500):
                wrong.append(f"{name}: {answer.status_code} {answer.text[:200]}")

        json_type = {"content-type": "application/json"}
        for name, changed in edits(BODY, count(350, 1400), seed=21):
            body = json.dumps(changed).encode()
            await ask(name, "/v1/images/generations", content=body, headers=json_type)
        for name, changed in edits(BODY, count(150, 600), seed=22):
            await ask(name, "/v1/images/edits", data=form(changed), files=files)
        for whole in VALUES[:-1]:
            await ask(str(whole)[:20] if not isinstance(whole, int) else "number", "/v1/images/generations",
                      content=json.dumps(whole).encode(), headers=json_type)  # fmt: skip
    return counted, wrong


def test_edited_requests_over_http_get_images_or_a_refusal(student: fewstep.Pipeline) -> None:
    service = Service(lambda: Server(student))
    service.start()
    try:
        service.wait(60)
        counted, wrong = asyncio.run(answers(make_app(service, Settings(model="student"))))
    finally:
        service.close()
    assert not wrong, "\n".join(wrong)
    assert counted[400] > 150
    assert counted[200] > 30


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler"])
def test_edited_calls_make_a_request_or_a_typed_error(student: fewstep.Pipeline, sampler: str) -> None:
    untyped, made = [], 0
    for name, changed in edits({**CALL, "sampler": sampler}, 300, seed=23):
        try:
            student.request(**{"prompt": "a", **changed})
            made += 1
        except FewstepError:
            continue
        except Exception as error:
            untyped.append(f"{name}: {error!r}"[:300])
    assert not untyped, "\n".join(untyped)
    assert 15 < made < 250


@pytest.mark.parametrize("compat", ["diffusers", None])
def test_options_beyond_reason_are_refused(student: fewstep.Pipeline, compat: str | None) -> None:
    names = ("eta", "s_churn", "s_noise", "rho", "sigma_min", "sigma_max", "last_sigma", "order", "steps_offset",
             "solver_order", "timestep_scaling", "beta_start", "trained_betas", "use_karras_sigmas")  # fmt: skip
    for name in names:
        for value in VALUES[:-1]:
            for sampler in ("euler", "lms"):
                try:
                    student.request("a", steps=2, sampler=sampler, compat=compat, options={name: value})
                except FewstepError:
                    pass
                except Exception as error:
                    pytest.fail(f"{sampler} {name}={value!r:.30}: {error!r}"[:300])


@pytest.mark.parametrize("name", ["sigmas", "timesteps"])
@pytest.mark.parametrize("first", [1e308, 10**400, 1e-320, -1.0, float("nan"), True, "1", None, 1e30])
def test_levels_beyond_reason_are_refused(student: fewstep.Pipeline, name: str, first: Any) -> None:
    for levels in ([first, 1.0, 0.0], [first] * 3, [first]):
        with contextlib.suppress(FewstepError):
            assert np.isfinite(student(prompt="a", seed=1, **{name: levels}).latents).all()


def test_edited_settings_of_live_sessions(student: fewstep.Pipeline) -> None:
    untyped = []
    for name, changed in edits({"type": "set", "id": 1, "at": 0.0, "settings": SETTINGS}, 300, seed=24):
        try:
            message = read_text(json.dumps(changed))
            if isinstance(message, Set):
                for image in (False, True):
                    LiveSettings().changed(message.settings).request(student, image=image)
        except FewstepError:
            continue
        except Exception as error:
            untyped.append(f"{name}: {error!r}"[:300])
    assert not untyped, "\n".join(untyped)


@pytest.mark.parametrize("dtype", ["complex64", "U3", "bool", "object", "datetime64[s]"])
def test_embeddings_are_numbers(student: fewstep.Pipeline, dtype: str) -> None:
    width = student.bundle.components["unet"].config["cross_attention_dim"]
    embeds = np.zeros((1, 77, width), np.int32).astype(dtype)
    with pytest.raises(fewstep.errors.ArgumentError, match="prompt_embeds is an array of"):
        student(prompt=None, prompt_embeds=embeds, steps=1, guidance=1.0, seed=1)
