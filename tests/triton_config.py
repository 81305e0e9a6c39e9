"""Triton's `config.pbtxt` read by its schema: protobuf's text format, and the messages of `model_config.proto`.

The part of the schema that models of Python's backend use, with its field types; an unknown field, a word that its enum
has not, or a second value of a single field is a `ValueError`, as protobuf's parser has it.
"""

from __future__ import annotations

import re
from typing import Any

WIDTHS = ("UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64", "BF16")
DATA_TYPES = tuple(f"TYPE_{t}" for t in ("INVALID", "BOOL", *WIDTHS, "STRING"))
KINDS = ("KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL")
TENSOR: dict[str, Any] = {"name": str, "data_type": DATA_TYPES, "dims": [int], "label_filename": str}
SCHEMA: dict[str, Any] = {
    "name": str,
    "platform": str,
    "backend": str,
    "runtime": str,
    "max_batch_size": int,
    "input": [{**TENSOR, "optional": bool, "allow_ragged_batch": bool, "is_shape_tensor": bool}],
    "output": [TENSOR],
    "dynamic_batching": {
        "preferred_batch_size": [int],
        "max_queue_delay_microseconds": int,
        "preserve_ordering": bool,
        "priority_levels": int,
    },
    "instance_group": [{"name": str, "kind": KINDS, "count": int, "gpus": [int], "profile": [str]}],
    "parameters": [{"key": str, "value": {"string_value": str}}],
    "default_model_filename": str,
}
"""A list is a repeated field, a tuple an enum, a mapping a message."""
_TOKEN = re.compile(r'\s*(?:#[^\n]*\n)?\s*("(?:\\.|[^"\\])*"|[\w.+-]+|[{}\[\]:,])')


def parse_config(text: str) -> dict[str, Any]:
    """The configuration as data; `parameters` as the map that they are."""
    tokens, at = [], 0
    text = text.rstrip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise ValueError(f"unexpected {text[at : at + 20]!r}")
        tokens.append(match[1])
        at = match.end()
    config, rest = _message(tokens, SCHEMA)
    if rest:
        raise ValueError(f"unexpected {rest[0]!r}")
    config["parameters"] = {p["key"]: p["value"] for p in config.get("parameters", ())}
    return config


def _message(tokens: list[str], schema: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    message: dict[str, Any] = {}
    while tokens and tokens[0] != "}":
        name, *tokens = tokens
        if name not in schema:
            raise ValueError(f"no field named {name!r}")
        kind = schema[name]
        repeated = isinstance(kind, list)
        inner = kind[0] if repeated else kind
        if tokens[0] == ":":
            tokens = tokens[1:]
        elif not isinstance(inner, dict):
            raise ValueError(f"expected ':' after {name}")
        if repeated and tokens[0] == "[":
            values, tokens = [], tokens[1:]
            while tokens[0] != "]":
                value, tokens = _value(tokens, inner)
                values.append(value)
                tokens = tokens[1:] if tokens[0] == "," else tokens
            message.setdefault(name, []).extend(values)
            tokens = tokens[1:]
            continue
        value, tokens = _value(tokens, inner)
        if repeated:
            message.setdefault(name, []).append(value)
        elif name in message:
            raise ValueError(f"{name} has several values")
        else:
            message[name] = value
    return message, tokens


def _value(tokens: list[str], kind: Any) -> tuple[Any, list[str]]:
    first, *rest = tokens
    if isinstance(kind, dict):
        if first != "{":
            raise ValueError(f"expected a message, found {first!r}")
        message, rest = _message(rest, kind)
        return message, rest[1:]
    if isinstance(kind, tuple):
        if first not in kind:
            raise ValueError(f"unknown enumeration value {first!r}")
        return first, rest
    if kind is str:
        if not first.startswith('"'):
            raise ValueError(f"expected a string, found {first!r}")
        return first[1:-1].encode().decode("unicode_escape"), rest
    if kind is bool:
        return {"true": True, "false": False}[first], rest
    return int(first), rest
