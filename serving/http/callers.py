"""Who may call: the token of whoever runs the service, and keys from a file, each with bounds of its own."""

from __future__ import annotations

import hashlib
import math
import os
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from ...errors import ArgumentError, CorruptError, MissingError
from ...values import shown
from .errors import HttpError

LEAST_CHARACTERS = 16
"""Of a token or a key."""
MOST_BYTES = 1 << 20
MOST_KEYS = 10_000
BURST_S = 10.0
"""A key's requests may come so many seconds' worth at once."""


class Key(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A caller's key, as a table of a file of keys holds it; the table's name is the caller's.

    key, or sha256, its SHA-256 in hex, so that the file holds no secret. per_minute: requests for pictures;
    concurrent: at once, a live session counting as one. admin: may load and unload models.
    """

    key: Annotated[str, Meta(min_length=LEAST_CHARACTERS, max_length=512)] | None = None
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")] | None = None
    per_minute: Annotated[float, Meta(gt=0, le=1e6)] | None = None
    concurrent: Annotated[int, Meta(ge=1, le=10_000)] | None = None
    admin: bool = False

    @property
    def digest(self) -> str:
        return self.sha256 or _digest(self.key or "")


@dataclass(slots=True, kw_only=True)
class Caller:
    """Somebody who may call. name: for logs and fair sharing. At most `per_minute` requests a minute in the long run,
    and `concurrent` at once; `None`: as many as the service takes."""

    name: str
    admin: bool = False
    per_minute: float | None = None
    concurrent: int | None = None
    clock: Callable[[], float] = time.monotonic
    _left: float = field(init=False)
    _filled_at: float = field(init=False)
    _open: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._left, self._filled_at = self._depth, self.clock()

    @property
    def _depth(self) -> float:
        return max(1.0, (self.per_minute or 0.0) * BURST_S / 60)

    @contextmanager
    def request(self) -> Iterator[None]:
        """A request of this caller lasts as long as this; `HttpError` 429 where it has had too many."""
        with self._lock:
            if self.concurrent is not None and self._open >= self.concurrent:
                raise _limited("too_many_at_once", f"{self._open} requests of this key are in progress", 1.0)
            self._spend()
            self._open += 1
        try:
            yield
        finally:
            with self._lock:
                self._open -= 1

    def _spend(self) -> None:
        if self.per_minute is None:
            return
        now, per_s = self.clock(), self.per_minute / 60
        self._left = min(self._depth, self._left + (now - self._filled_at) * per_s)
        self._filled_at = now
        if self._left < 1:
            raise _limited(
                "rate_limited", f"this key has {self.per_minute:g} requests a minute", (1 - self._left) / per_s
            )
        self._left -= 1


class Callers:
    """Those who may call, by the digests of what they present; without a token and without keys that is everybody."""

    def __init__(self, token: str | None, keys: dict[str, Key]) -> None:
        self._known: dict[str, Caller] = {}
        if token is not None:
            self._known[_digest(token)] = Caller(name="token", admin=True)
        for name, key in keys.items():
            caller = Caller(name=name, admin=key.admin, per_minute=key.per_minute, concurrent=key.concurrent)
            if self._known.setdefault(key.digest, caller) is not caller:
                raise ArgumentError(f"the key {name!r} is somebody else's too", expected="a key of its own for each")
        self.everybody = not self._known

    def find(self, secret: str | None) -> Caller | None:
        """Whose secret it is. Digests are looked up, so that how long it takes tells nothing of the secrets."""
        return None if secret is None else self._known.get(_digest(secret))


def read_keys(path: str | os.PathLike[str]) -> dict[str, Key]:
    """The keys of a TOML file, a table for each, by the names of the tables.

    Raises `MissingError` where there is no file and `CorruptError` for what is none; neither repeats a key.
    """
    file = Path(path)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise MissingError(
            f"no keys in {shown(str(path), most=200)} ({error.strerror})", remedy="Name a file with --keys."
        ) from error
    if len(data) > MOST_BYTES:
        raise CorruptError(f"the file of keys has {len(data)} bytes", expected=f"at most {MOST_BYTES}")
    try:
        keys = msgspec.convert(tomllib.loads(data.decode()), dict[str, Key])
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CorruptError("the file of keys is no TOML", expected=TABLE) from error
    except msgspec.MsgspecError as error:
        raise CorruptError(f"the file of keys: {error}"[:300], expected=TABLE) from error
    for name, key in keys.items():
        if (key.key is None) == (key.sha256 is None):
            raise CorruptError(f"the key {shown(name)} has not one of key and sha256", expected=TABLE)
    if not 1 <= len(keys) <= MOST_KEYS:
        raise CorruptError(f"the file holds {len(keys)} keys", expected=f"1 to {MOST_KEYS}")
    return keys


TABLE = "tables like [alice], with key (16 characters or more) or sha256, and per_minute, concurrent, admin if wanted"


def bearer(authorization: str) -> str | None:
    """The secret of an `Authorization` header."""
    kind, _, secret = authorization.partition(" ")
    return secret.strip() if kind.lower() == "bearer" and secret.strip() else None


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="surrogateescape")).hexdigest()


def _limited(code: str, message: str, retry_after_s: float) -> HttpError:
    seconds = str(max(1, math.ceil(retry_after_s)))
    return HttpError(429, code, f"{message}; try again after {seconds} s", headers={"retry-after": seconds})
