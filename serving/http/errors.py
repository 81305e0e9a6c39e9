"""Errors as OpenAI's clients read them: a status, and JSON that names no path and repeats no prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.responses import Response

from ...errors import (
    ArgumentError,
    BlackImageError,
    CancelledError,
    CorruptError,
    DeadlineError,
    EngineFailedError,
    FewstepError,
    NonFiniteError,
    OutOfMemoryError,
    QueueFullError,
    UnavailableError,
)

STATUS: tuple[tuple[type[FewstepError], int, str], ...] = (
    (QueueFullError, 429, "queue_full"),
    (DeadlineError, 504, "deadline"),
    (OutOfMemoryError, 503, "out_of_memory"),
    (EngineFailedError, 503, "engine_failed"),
    (UnavailableError, 503, "unavailable"),
    (ArgumentError, 422, "invalid_combination"),
    (CorruptError, 422, "invalid_image"),
    (NonFiniteError, 422, "not_finite"),
    (BlackImageError, 422, "black_image"),
    (CancelledError, 499, "cancelled"),
)
RETRY_S = 5
MOST_NAMES = 16
"""Of models, in an error."""


class HttpError(Exception):
    """A refusal that is decided before the runtime is asked. `param` is the field that is wrong, if one is."""

    def __init__(
        self, status: int, code: str, message: str, *, headers: dict[str, str] | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers or {}
        self.param = param


def shown(name: str) -> str:
    """A field's name as an answer may repeat it: short, and printable ASCII."""
    return ascii(name[:64])


def no_model(names: Sequence[str]) -> HttpError:
    """That a request names a model that is not here; it says which are, and how another name is given to one."""
    listed = ", ".join(names[:MOST_NAMES]) + (", ..." if len(names) > MOST_NAMES else "")
    message = f"no model has that name here; there is {listed}. Add names with: fewstep serve BUNDLE --alias NAME"
    return HttpError(404, "model_not_found", message, param="model")


def describe(error: BaseException) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers for an error; of unexpected ones nothing is told."""
    if isinstance(error, HttpError):
        return error.status, _body(error.status, error.code, error.message, error.param), error.headers
    for kind, status, code in STATUS:
        if isinstance(error, kind):
            headers = {}
            if isinstance(error, QueueFullError):
                headers = {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}
            elif status == 503:
                headers = {"retry-after": str(RETRY_S)}
            return status, _body(status, code, str(error)), headers
    return 500, _body(500, "internal", "internal error"), {}


def respond(error: BaseException) -> Response:
    status, body, headers = describe(error)
    return json_response(body, status, headers)


def json_response(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(data), status, headers, media_type="application/json")


def _body(status: int, code: str, message: str, param: str | None = None) -> dict[str, Any]:
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
        status, "invalid_request_error" if status < 500 else "server_error"
    )
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
