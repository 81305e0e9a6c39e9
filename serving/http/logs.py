"""What the service says as it runs: plain lines for people at a terminal, lines of JSON for what collects them."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from ...values import escape_controls

NOISY = ("uvicorn.error",)
"""Loggers whose own account of the start and the end is left out: the service gives one."""


class JsonLines(logging.Formatter):
    """A record as a line of JSON. Prompts are in no record."""

    def format(self, record: logging.LogRecord) -> str:
        data: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            data["error"] = record.exc_info[0].__name__
            data["traceback"] = self.formatException(record.exc_info)
        return json.dumps(data, ensure_ascii=False)


class PlainLines(logging.Formatter):
    """A record as a line for people: the time of day, the level where it is no information, words, then the fields."""

    def format(self, record: logging.LogRecord) -> str:
        parts = [time.strftime("%H:%M:%S", time.localtime(record.created))]
        if record.levelno != logging.INFO:
            parts.append(record.levelname.lower())
        parts.append(record.getMessage())
        parts += [f"{name}={value}" for name, value in getattr(record, "fields", {}).items()]
        line = escape_controls(" ".join(parts)).replace("\n", "\\n")
        if record.exc_info and record.exc_info[0] is not None:
            line += "\n" + escape_controls(self.formatException(record.exc_info))
        return line


@contextmanager
def logging_to(stream: TextIO, *, form: str = "auto", level: str = "info") -> Iterator[None]:
    """Log to a stream within: `"plain"`, `"json"`, or `"auto"`: plain on a terminal and JSON elsewhere.

    What is logged elsewhere stays as it is, and afterwards all is as it was: a stream that is closed then is not
    written to.
    """
    plain = stream.isatty() if form == "auto" else form == "plain"
    handler = logging.StreamHandler(stream)
    handler.setFormatter(PlainLines() if plain else JsonLines())
    root = logging.getLogger()
    levels = {logger: logger.level for logger in (root, *map(logging.getLogger, NOISY))}
    root.addHandler(handler)
    for logger in levels:
        logger.setLevel(logging.WARNING if logger.name in NOISY else level.upper())
    try:
        yield
    finally:
        root.removeHandler(handler)
        for logger, before in levels.items():
            logger.setLevel(before)
