"""The OpenAPI document is true: schemathesis sends what it allows and what it forbids, and finds nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import fewstep
import httpx
import pytest
from fewstep.serving.http import Settings
from fewstep.serving.http.openapi import openapi_document
from http_service import load_student, serving

# 422 is the documented answer to what is well-formed and impossible, such as a sampler that nobody knows.
CONFIG = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "401", "403", "404", "422", "429"]
"""


@pytest.mark.parametrize("token", [None, "0123456789abcdef"])
def test_schemathesis_finds_nothing(student: fewstep.Pipeline, tmp_path: Path, token: str | None) -> None:
    settings = Settings(model="student", images=2, steps=4, token=token)
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    with serving(load_student(student, most_slots=8, most_rows=4, image=True, queue=64), settings) as (url, service):
        command = [Path(sys.executable).with_name("schemathesis"), "run", f"{url}/openapi.json", "--no-color"]
        command += ["--max-examples=12", "--phases=examples,coverage,fuzzing", "--seed=1", "--generation-database=none"]
        if token is not None:
            command += ["-H", f"Authorization: Bearer {token}", "--include-path=/v1/models", "--include-path=/metrics"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert service.server.ready
        assert token or service.server.stats().finished > 20, "it made images"


def test_the_document_says_what_the_service_takes(student: fewstep.Pipeline) -> None:
    settings = Settings(model="student", images=3, steps=7)
    with serving(load_student(student, most_slots=2, most_rows=2), settings) as (url, _):
        document: dict[str, Any] = httpx.get(f"{url}/openapi.json").json()
    assert document == openapi_document(settings, [(64, 64)])
    fields = document["components"]["schemas"]["ImageGeneration"]
    assert fields["required"] == ["prompt"]
    assert fields["additionalProperties"] is False
    assert fields["properties"]["num_inference_steps"]["anyOf"][0]["maximum"] == 7
    assert fields["properties"]["size"]["anyOf"][0]["enum"] == ["64x64", "auto"]
    edit = document["components"]["schemas"]["ImageEdit"]
    assert set(edit["required"]) == {"prompt", "image"}
