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
from http_service import load_student, serving, wait_until

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01"
SLACK_NS = 20_000_000
"""Between two clocks."""


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


@pytest.fixture(scope="module")
def exported() -> Any:
    """Where OpenTelemetry's spans end up."""
    export = pytest.importorskip("opentelemetry.sdk.trace.export", reason="opentelemetry-sdk is not installed")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider

    spans = memory.InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(spans))
    trace.set_tracer_provider(provider)  # once a process, as an operator's own start does it
    return spans


def test_opentelemetrys_span_has_the_callers_for_parent(url: str, exported: Any) -> None:
    from opentelemetry import trace

    exported.clear()
    line = lines(url, traceparent=PARENT)
    *_, span = exported.get_finished_spans()
    assert span.name == "POST /v1/images/generations"
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, SPAN)
    assert line["span_id"] == f"{span.context.span_id:016x}"
    assert span.kind is trace.SpanKind.SERVER
    assert span.attributes["http.response.status_code"] == 200
    assert span.attributes["fewstep.total_ms"] > 0
    assert "red circle" not in "".join(s.to_json() for s in exported.get_finished_spans()), "prompts stay out of traces"
    assert len(lines(url)["trace_id"]) == 32, "a trace begins here where the caller has none"


ONE_PASS = ["text_encoder", "queue", "steps", "decode"]


@pytest.mark.parametrize(
    ("fields", "names", "evaluations"),
    [
        ({"num_inference_steps": 3}, ONE_PASS, [3]),
        ({"num_inference_steps": 3, "stream": True}, ONE_PASS, [3]),
        (
            {"num_inference_steps": 4, "hires": {"scale": 1, "strength": 0.5}},
            [*ONE_PASS, "text_encoder", "image_encoder", *ONE_PASS[1:]],
            [4, 2],
        ),
    ],
    ids=["plain", "stream", "second pass"],
)
def test_stages_are_spans_of_their_own_within_the_requests(
    url: str, exported: Any, fields: dict[str, Any], names: list[str], evaluations: list[int]
) -> None:
    exported.clear()
    answer = httpx.post(f"{url}/v1/images/generations", json={"prompt": "a red circle", **fields}, timeout=60)
    assert answer.status_code == 200, answer.text
    wait_until(lambda: any(s.name.startswith("POST") for s in exported.get_finished_spans()), 5)
    *stages, whole = exported.get_finished_spans()
    assert [s.name for s in stages] == names
    assert {(s.parent.span_id, s.context.trace_id) for s in stages} == {(whole.context.span_id, whole.context.trace_id)}
    ends = [t for s in stages for t in (s.start_time, s.end_time)]
    assert ends == sorted(ends), "one after the other"
    assert ends[-1] > ends[0]
    assert whole.start_time - SLACK_NS <= ends[0] <= ends[-1] <= whole.end_time + SLACK_NS
    told = [[e.timestamp for e in s.events] for s in stages if s.name == "steps"]
    assert [len(times) for times in told] == evaluations
    for stage, times in zip([s for s in stages if s.name == "steps"], told, strict=True):
        assert stage.start_time <= times[0] <= times[-1] <= stage.end_time
