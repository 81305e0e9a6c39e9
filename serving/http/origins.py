"""Pages of other origins: which may call, and the headers by which browsers hear of it (the Fetch standard's CORS).

Credentials are never allowed: a page that calls brings its key in a header of its own making, so that no page can use
what a browser keeps for another.
"""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from ...errors import ArgumentError

ANY = "*"
_ORIGIN = re.compile(r"https?://[A-Za-z0-9.\-\[\]:]{1,253}")
HEADERS = "authorization, content-type, x-request-id, traceparent, tracestate, *"
EXPOSED = "x-request-id, retry-after"
PREFLIGHT_S = 600


def check_origin_name(text: str) -> str:
    """An origin as browsers write it, in small letters, or `*`; `ArgumentError` for anything else."""
    name = text.strip().lower().removesuffix("/")
    if name != ANY and not _ORIGIN.fullmatch(name):
        raise ArgumentError(
            f"the origin {text[:80]!r}", expected="a scheme and a host like https://example.org, without a path, or *"
        )
    return name


def is_allowed(origin: str, allowed: tuple[str, ...]) -> bool:
    return ANY in allowed or origin.lower() in allowed


def is_own(origin: str, host: str) -> bool:
    """Whether a page of this origin came from the host that it calls."""
    try:
        return urlsplit(origin).netloc.lower() == host.lower()
    except ValueError:
        return False


def allowing(origin: str, allowed: tuple[str, ...], *, preflight: bool) -> list[tuple[bytes, bytes]]:
    """Headers of an answer that a page of an allowed origin may read."""
    found = ANY if ANY in allowed else origin
    headers = [("access-control-allow-origin", found), ("vary", "Origin")]
    if preflight:
        headers += [
            ("access-control-allow-methods", "GET, POST"),
            ("access-control-allow-headers", HEADERS),
            ("access-control-max-age", str(PREFLIGHT_S)),
        ]
    else:
        headers.append(("access-control-expose-headers", EXPOSED))
    return [(name.encode(), value.encode("latin-1")) for name, value in headers]
