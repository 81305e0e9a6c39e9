"""What others wrote, read by type and range: JSON of bounded depth, numbers that fit, texts that a terminal may show.

All JSON that fewstep takes is parsed here; the doors alone have msgspec, to say what requests and messages may hold.
"""

from __future__ import annotations

import json
import math
import numbers
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CorruptError, FewstepError

MOST_DEPTH = 64
MOST_BYTES = 64 << 20
"""Of one JSON file; the largest known are tokenizers of a few megabytes."""
LARGEST = sys.float_info.max
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What moves a terminal's cursor, colours or order of reading, and halves of surrogate pairs; not line feed and tab."""


def shown(value: object, most: int = 80) -> str:
    """A value as an error may repeat it: short, and without control characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python writes
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def printable(text: str, encoding: str | None) -> str:
    """A text for a terminal of this encoding: control characters, and what the encoding lacks, are escaped."""
    text = escape_controls(text)
    return text.encode(encoding or "utf-8", "backslashreplace").decode(encoding or "utf-8")


def printable_json(data: object, encoding: str | None) -> str:
    """Data as JSON in one line, for a terminal: control characters, and what the encoding lacks, by JSON's escapes."""
    text = json.dumps(data, ensure_ascii=False, default=str)
    try:
        text.encode(encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(data, default=str)
    return _CONTROLS.sub(lambda m: f"\\u{ord(m[0]):04x}", text)


def escape_controls(text: str) -> str:
    """A text that may hold what somebody else wrote, for a terminal: control characters as `\\x1b` or `\\u202e`."""
    return _CONTROLS.sub(lambda m: escape(m[0]), text)


def has_controls(text: str) -> bool:
    return _CONTROLS.search(text) is not None


def escape(character: str) -> str:
    """`\\x1b` or `\\u202e`, as Python, JavaScript and the shells' `$'...'` read it."""
    return f"\\x{ord(character):02x}" if character < "\x80" else f"\\u{ord(character):04x}"


def parse_json(text: str | bytes, place: str, *, remedy: str = "", finite: bool = False) -> Any:
    """JSON in UTF-8, at most `MOST_DEPTH` deep, whose numbers fit a float and whose texts can be written again.

    An object with a key twice is refused: readers differ in which of the two counts. place: what holds it, for the
    message. finite: refuses infinity, as fewstep itself writes none; diffusers writes some bounds as infinity. NaN is
    always refused. Raises `CorruptError`.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        data = _DECODERS[finite].decode(text)
        _check_depth(data)
        if "\\u" in text or not text.isascii():
            json.dumps(data, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{place} is not JSON: {escape_controls(str(error))[:200]}", remedy=remedy) from error
    return data


def read_json(path: Path, place: str, *, remedy: str = "", finite: bool = False) -> Any:
    """The JSON in a file of at most `MOST_BYTES`; `CorruptError` for anything else."""
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        raise CorruptError(f"{place} cannot be read ({type(error).__name__})", remedy=remedy) from error
    if len(data) > MOST_BYTES:
        raise CorruptError(f"{place} is too long", expected=f"at most {MOST_BYTES} bytes", remedy=remedy)
    return parse_json(data, place, remedy=remedy, finite=finite)


def _integer(text: str) -> int:
    number = int(text) if len(text) < 400 else math.inf
    try:
        float(number)
    except OverflowError:
        number = math.inf
    if isinstance(number, float):
        raise ValueError(f"a number of {len(text)} digits")
    return number


def _float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:20]}")
    return number


def _infinity(text: str) -> float:
    if text == "NaN":
        raise ValueError("the number NaN")
    return float(text)


def _no_constant(text: str) -> float:
    raise ValueError(f"the number {text}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        keys = [k for k, _ in pairs]
        twice = next(k for k in data if keys.count(k) > 1)
        raise ValueError(f"a key that is there twice, {shown(twice, 40)}")
    return data


_DECODERS = {
    finite: json.JSONDecoder(
        parse_int=_integer,
        parse_float=_float,
        parse_constant=_no_constant if finite else _infinity,
        object_pairs_hook=_unique,
    )
    for finite in (False, True)
}
"""Made once: a decoder takes longer to make than a request's JSON to read."""


def _check_depth(data: object) -> None:
    level = [data]
    for _ in range(MOST_DEPTH):
        inner = (v for c in level for v in (c.values() if isinstance(c, dict) else c if isinstance(c, list) else ()))
        level = [v for v in inner if isinstance(v, (dict, list))]
        if not level:
            return
    raise ValueError(f"more than {MOST_DEPTH} levels deep")


@contextmanager
def panics_refused(found: str, *, remedy: str = "") -> Iterator[None]:
    """`CorruptError` where a library in Rust gives up within: its PanicException is no `Exception`."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise CorruptError(f"{found} ({escape_controls(str(error))[:200]})", remedy=remedy) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """Values of one document by type and range; whatever is not as asked for is an error of type `error`.

    place: what holds them, for the message.
    """

    place: str
    remedy: str = ""
    error: type[FewstepError] = CorruptError

    def wrong(self, field: str, value: object, expected: str) -> FewstepError:
        return self.error(f"{self.place} states {field} = {shown(value)}", expected=expected, remedy=self.remedy)

    def integer(self, field: str, value: object, low: int = 0, high: int = 2**31 - 1) -> int:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not low <= int(value) <= high:
            raise self.wrong(field, value, f"an integer from {low} to {high}")
        return int(value)

    def number(self, field: str, value: object, low: float = -LARGEST, high: float = LARGEST) -> float:
        """A finite number from `low` to `high`; infinite bounds admit infinity."""
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        try:
            if real and low <= value <= high:  # type: ignore[operator]
                return float(value)  # type: ignore[arg-type]
        except OverflowError:
            pass
        bounds = "" if low == -LARGEST and high == LARGEST else f" from {low:g} to {high:g}"
        raise self.wrong(field, value, f"a finite number{bounds}")

    def flag(self, field: str, value: object) -> bool:
        if not isinstance(value, bool):
            raise self.wrong(field, value, "true or false")
        return value

    def text(
        self, field: str, value: object, pattern: re.Pattern[str] | None = None, *, least: int = 1, most: int = 4096
    ) -> str:
        if not isinstance(value, str) or not least <= len(value) <= most:
            raise self.wrong(field, value, f"a text of {least} to {most} characters")
        if pattern is not None and not pattern.fullmatch(value):
            raise self.wrong(field, value, f"a text like {pattern.pattern}")
        return value

    def choice(self, field: str, value: object, options: Collection[str]) -> str:
        if not isinstance(value, str) or value not in options:
            raise self.wrong(field, value, f"one of {', '.join(options)}")
        return value

    def mapping(self, field: str, value: object) -> Mapping[str, Any]:
        if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
            raise self.wrong(field, value, "an object")
        return value

    def array(self, field: str, value: object, low: int = 0, high: int = 100_000) -> list[Any]:
        """A list (or tuple, or array of NumPy's) of so many entries."""
        if isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__len__") or not hasattr(value, "__iter__"):
            raise self.wrong(field, value, "a list")
        if not low <= len(value) <= high:
            raise self.wrong(field, value, f"a list of {low} to {high} entries")
        return list(value)
