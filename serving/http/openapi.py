"""The OpenAPI document: its schemas are those the requests are checked with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from ...version import __version__
from ..resident import STATES
from .calls import make_calls
from .settings import Settings

REFUSALS = {
    "400": "malformed, or not as the schema says",
    "401": "no valid token",
    "403": "sent by a page of another origin, or a key may not do this",
    "404": "no such model",
    "413": "the body is too large",
    "415": "another content type",
    "421": "another host",
    "422": "well-formed, and impossible for this model: the message says why",
    "429": "too much work is waiting, or a key's bound is reached; Retry-After says for how long",
    "503": "starting, draining, or out of service",
    "504": "not finished by its deadline",
}
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
IMAGES = {
    "type": "object",
    "required": ["created", "data", "size", "output_format"],
    "properties": {
        "created": {"type": "integer"},
        "size": {"type": "string"},
        "output_format": {"type": "string"},
        "warnings": {"type": "array", "items": {"type": "string"}},
        "timings_ms": {"type": "object", "additionalProperties": {"type": "number"}},
        "data": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["b64_json", "seed"],
                "properties": {"b64_json": {"type": "string"}, "seed": {"type": "integer"}},
            },
        },
    },
}
MODEL = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by", "state"],
    "properties": {k: {"type": "string"} for k in ("id", "object", "owned_by")}
    | {"created": {"type": "integer"}, "state": {"type": "string", "enum": list(STATES)}},
}
MODELS = {"type": "object", "required": ["object", "data"], "properties": {"object": {"const": "list"}}}
SUMMARIES = {
    "generate": "Pictures from a prompt: OpenAI's call, with fields of our own.",
    "edit": "Pictures from a picture, or with a mask from a part of one: OpenAI's call, with fields of our own.",
    "models": "The models there are, and whether they are loaded.",
    "model": "One of them.",
    "load": "Have a model loaded, those used least recently making room; one of the service's folder of bundles too, "
    "by its folder's name. For whoever runs the service.",
    "unload": "Have a model finish what it has accepted and leave. For whoever runs the service.",
    "live": "Whether the process answers.",
    "ready": "Whether every size is warm and the engine works.",
    "metrics": "Figures for Prometheus.",
}
METRICS = {"description": "for Prometheus", "content": {"text/plain": {}}}
STATUS = {"type": "object", "required": ["status"], "properties": {"status": {"type": "string"}}}


def openapi_document(settings: Settings, sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """OpenAPI 3.1 for a service with these settings, of a server with these sizes."""
    calls = make_calls(settings, sizes)
    _, schemas = msgspec.json.schema_components(
        [calls.generation, calls.edit], ref_template="#/components/schemas/{name}"
    )
    binary = {"type": "string", "format": "binary"}
    schemas["ImageEdit"]["properties"] |= {
        "image": binary,
        "mask": {**binary, "description": "of the image's size; what is fully transparent is made anew"},
    }
    schemas["ImageEdit"]["required"] = [*schemas["ImageEdit"].get("required", []), "image"]
    schemas |= {"Error": ERROR, "Images": IMAGES, "Model": MODEL, "Status": STATUS}
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "fewstep", "version": __version__, "description": "Images from few-step diffusion."},
        "paths": {
            "/v1/images/generations": {"post": _maker("generate", "application/json", "ImageGeneration")},
            "/v1/images/edits": {"post": _maker("edit", "multipart/form-data", "ImageEdit")},
            "/v1/models": {"get": _getter("models", {"200": _json(MODELS)})},
            "/v1/models/{model}": {"get": _of_a_model("model")},
            "/v1/models/{model}/load": {"post": _of_a_model("load", "422")},
            "/v1/models/{model}/unload": {"post": _of_a_model("unload")},
            "/health/live": {"get": _getter("live", {"200": _json(_ref("Status"))}, open_=True)},
            "/health/ready": {
                "get": _getter("ready", {"200": _json(_ref("Status")), "503": _json(_ref("Status"))}, open_=True)
            },
            "/metrics": {"get": _getter("metrics", {"200": METRICS})},
        },
        "components": {"schemas": schemas},
    }
    if not settings.callers.everybody:
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"token": []}]
    return document


def _maker(name: str, media_type: str, schema: str) -> dict[str, Any]:
    answers = {
        "200": {
            "description": "the images, or a stream of events",
            "content": {"application/json": {"schema": _ref("Images")}, "text/event-stream": {}},
        }
    }
    return {
        "operationId": name,
        "summary": SUMMARIES[name],
        "requestBody": {"required": True, "content": {media_type: {"schema": _ref(schema)}}},
        "responses": answers | {status: _refusal(status) for status in REFUSALS},
    }


def _getter(name: str, answers: dict[str, Any], *, open_: bool = False) -> dict[str, Any]:
    refusals = {s: _refusal(s) for s in ("401", "403", "421", "503") if s not in answers}
    about = {"operationId": name, "summary": SUMMARIES[name]}
    return {**about, "responses": answers | refusals} | ({"security": []} if open_ else {})


def _of_a_model(name: str, *refusals: str) -> dict[str, Any]:
    answers = {"200": _json(_ref("Model")), **{status: _refusal(status) for status in ("404", *refusals)}}
    return {
        **_getter(name, answers),
        "parameters": [{"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}],
    }


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": "ok", "content": {"application/json": {"schema": schema}}}


def _refusal(status: str) -> dict[str, Any]:
    return {"description": REFUSALS[status], "content": {"application/json": {"schema": _ref("Error")}}}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}
