"""Traces that begin elsewhere: W3C's `traceparent`, and OpenTelemetry's spans where its API is installed.

What is done with spans is OpenTelemetry's affair: `opentelemetry-instrument fewstep serve ...` sends them where its own
variables say. Without the API the identifiers still stand in the log.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from ...version import __version__
from ..ticket import Stage

_PARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


@dataclass(slots=True, kw_only=True)
class Trace:
    """A request's place in a trace: identifiers in hex (W3C Trace Context), and what is to be said of it.

    `stages` become spans of their own within the request's.
    """

    trace_id: str
    span_id: str
    parent_id: str | None = None
    attributes: dict[str, Any] = field(default_factory=dict)
    stages: Sequence[Stage] = ()


def read_parent(text: str) -> tuple[str, str] | None:
    """The trace and the span of a `traceparent` header, or `None` for one that is to be ignored."""
    match = _PARENT.fullmatch(text.strip())
    if match is None:
        return None
    version, trace_id, span_id, _, more = match.groups()
    if version == "ff" or (version == "00" and more) or not int(trace_id, 16) or not int(span_id, 16):
        return None
    return trace_id, span_id


@contextmanager
def traced(name: str, headers: Mapping[str, str]) -> Iterator[Trace | None]:
    """A span of a request: from its caller's where it names one. `None` where nobody traces.

    `attributes` that are set within, and `error` (a status of 500 and above), are what the span says at its end.
    """
    parent = read_parent(headers.get("traceparent", ""))
    opened = _span(name, headers)
    context = None if opened is None else opened.get_span_context()
    if opened is not None and context is not None and opened.is_recording():
        trace = Trace(
            trace_id=f"{context.trace_id:032x}", span_id=f"{context.span_id:016x}", parent_id=parent and parent[1]
        )
    elif parent is not None:
        trace = Trace(trace_id=parent[0], span_id=secrets.token_hex(8), parent_id=parent[1])
    else:
        yield None
        return
    try:
        yield trace
    finally:
        if opened is not None:
            _add_stages(opened, trace.stages)
            _end(opened, name, trace.attributes)


@cache
def _api() -> Any:
    """OpenTelemetry's API, or `None` where it is not installed."""
    try:
        from opentelemetry import propagate, trace
    except ModuleNotFoundError:
        return None
    return propagate, trace


def _span(name: str, headers: Mapping[str, str]) -> Any:
    api = _api()
    if api is None:
        return None
    propagate, trace = api
    return _tracer().start_span(name, context=propagate.extract(dict(headers)), kind=trace.SpanKind.SERVER)


def _tracer() -> Any:
    return _api()[1].get_tracer("fewstep", __version__)


def _add_stages(span: Any, stages: Sequence[Stage]) -> None:
    """Spans of the stages, which other threads went through and are over."""
    if not span.is_recording():
        return
    context, offset_s = _api()[1].set_span_in_context(span), time.time() - time.monotonic()

    def told(at: float) -> int:
        return int(1e9 * (at + offset_s))

    for stage in tuple(stages):
        child = _tracer().start_span(stage.name, context=context, start_time=told(stage.began_at))
        for at in stage.evaluations:
            child.add_event("evaluation", timestamp=told(at))
        child.end(end_time=told(stage.ended_at))


def _end(span: Any, name: str, attributes: dict[str, Any]) -> None:
    trace = _api()[1]
    route, status = attributes.get("http.route"), attributes.get("http.response.status_code", 0)
    if route:
        span.update_name(f"{name} {route}")
    span.set_attributes(attributes)
    if status >= 500:
        span.set_status(trace.StatusCode.ERROR)
    span.end()
