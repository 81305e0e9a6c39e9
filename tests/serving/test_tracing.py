"""Traces: a caller's `traceparent` stands in the log, and is the parent of OpenTelemetry's span where there is one."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from typing import Any

import fewstep
import httpx
import pytest
from fewstep.serving.http import Settings
from fewstep.serving.http.logs import logging_to
from fewstep.serving.http.tracing import read_parent
from http_service import load_student, serving

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01"


@pytest.fixture(scope="module")
def url(student: fewstep.Pipeline) -> Iterator[str]:
    with serving(load_student(student, most_slots=2, most_rows=2), Settings(model="m")) as (made, _):
        yield made


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PARENT, (TRACE, SPAN)),
        (f"cc-{TRACE}-{SPAN}-01-what-comes-later", (TRACE, SPAN)),
        (f"00-{TRACE}-{SPAN}-01-more", None),
        (f"ff-{TRACE}-{SPAN}-01", None),
        (f"00-{'0' * 32}-{SPAN}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (PARENT.upper(), None),
        ("", None),
    ],
)
def test_traceparent_is_read_as_w3c_says(text: str, expected: tuple[str, str] | None) -> None:
    assert read_parent(text) == expected


def lines(url: str, **headers: str) -> dict[str, Any]:
    said = io.StringIO()
    with logging_to(said):
        fields = {"prompt": "a red circle", "num_inference_steps": 1}
        answer = httpx.post(f"{url}/v1/images/generations", json=fields, headers=headers, timeout=60)
        assert answer.status_code == 200
        until = time.monotonic() + 5
        while '"request"' not in said.getvalue() and time.monotonic() < until:
            time.sleep(0.01)
    return next(line for line in map(json.loads, said.getvalue().splitlines()) if line["message"] == "request")


def test_a_trace_stands_in_the_log(url: str) -> None:
    line = lines(url, traceparent=PARENT)
    assert (line["trace_id"], line["parent_id"]) == (TRACE, SPAN)
    assert len(line["span_id"]) == 16
    assert line["span_id"] != SPAN
    assert "trace_id" not in lines(url)


def test_opentelemetrys_span_has_the_callers_for_parent(url: str) -> None:
    export = pytest.importorskip("opentelemetry.sdk.trace.export", reason="opentelemetry-sdk is not installed")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider

    spans = memory.InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(spans))
    trace.set_tracer_provider(provider)  # once a process, as an operator's own start does it
    line = lines(url, traceparent=PARENT)
    (span,) = spans.get_finished_spans()
    assert span.name == "POST /v1/images/generations"
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, SPAN)
    assert line["span_id"] == f"{span.context.span_id:016x}"
    assert span.kind is trace.SpanKind.SERVER
    assert span.attributes["http.response.status_code"] == 200
    assert span.attributes["fewstep.total_ms"] > 0
    assert "red circle" not in span.to_json(), "prompts stay out of traces"
    assert len(lines(url)["trace_id"]) == 32, "a trace begins here where the caller has none"
