"""What others wrote is read in one place: JSON of bounded depth, values by type, texts without control characters."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from fewstep.cli import main
from fewstep.commands.sampling import option
from fewstep.errors import ArgumentError, CorruptError
from fewstep.schedules import NoiseSchedule, Program, compile_program
from fewstep.values import MOST_DEPTH, Reader, escape_controls, parse_json, printable, printable_json, shown
from hostile import VALUES, edits
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[1]
OWN = {
    "presets.py": "travels with the package",
    "schedules/tables.py": "travels with the package",
    "runtime/programs.py": "written there, as a key",
    "engines/backends/tensorrt_inspect.py": "TensorRT's words on an engine that was read",
    "export/gate/reference.py": "arguments of its own process",
    "export/gate/gating.py": "the answer of its own process",
    "commands/memory.py": "the answer of its own process",
}
"""Files that parse JSON themselves, which nobody else wrote."""


def test_json_of_others_is_parsed_in_one_place() -> None:
    parsing = set()
    rooms = [p for p in ROOT.iterdir() if (p / "__init__.py").is_file() and p.name not in ("tests", "bench")]
    for path in [*ROOT.glob("*.py"), *(f for room in rooms for f in room.rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("json.load", "json.loads", "json.JSONDecoder"):
                parsing.add(str(path.relative_to(ROOT)))
    assert parsing == {*OWN, "values.py"}


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "NaN", "1e999", "-1e999", "9" * 400, "9" * 5000, '"\\ud800"', "[" * 100_000, '{"a":' * 100_000),
        *("[" * (MOST_DEPTH + 1) + "]" * (MOST_DEPTH + 1), b"\xff", "{}".encode("utf-16"), "\ufeff{}"),
    ],
    ids=lambda t: repr(t)[:16],
)
def test_what_is_no_json_is_corrupt(text: str | bytes) -> None:
    with pytest.raises(CorruptError, match="it is not JSON"):
        parse_json(text, "it")


def test_what_fewstep_writes_has_no_infinity() -> None:
    assert parse_json("[-Infinity]", "it") == [float("-inf")]
    with pytest.raises(CorruptError):
        parse_json("[-Infinity]", "it", finite=True)


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '[{"b": {"a": 1, "\\u0061": 1}}]'])
def test_a_key_that_is_there_twice_is_named(text: str) -> None:
    for finite in (False, True):
        with pytest.raises(CorruptError, match="it is not JSON: a key that is there twice, 'a'"):
            parse_json(text, "it", finite=finite)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(JSON)
def test_json_is_read_as_it_is(data: Any) -> None:
    assert parse_json(json.dumps(data), "it", finite=True) == json.loads(json.dumps(data))
    shown_data = printable_json(data, "utf-8")
    assert json.loads(shown_data) == data
    assert escape_controls(shown_data) == shown_data


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_texts_for_a_terminal_hold_no_controls(text: str) -> None:
    for encoding in ("utf-8", "ascii", "latin-1", None):
        out = printable(text, encoding)
        assert not any(ord(c) < 32 or 0x7F <= ord(c) < 0xA0 for c in out if c not in "\n\t")
        out.encode(encoding or "utf-8")


KINDS: dict[str, Any] = {
    "integer": lambda r, v: r.integer("x", v, -5, 5),
    "number": lambda r, v: r.number("x", v),
    "flag": lambda r, v: r.flag("x", v),
    "text": lambda r, v: r.text("x", v, most=10),
    "choice": lambda r, v: r.choice("x", v, ("no", "x")),
    "mapping": lambda r, v: r.mapping("x", v),
    "array": lambda r, v: r.array("x", v, 1, 3),
}
TYPES: dict[str, Any] = {
    **{"integer": int, "number": (int, float), "flag": bool, "text": str, "choice": str, "mapping": dict},
    "array": list,
}


@pytest.mark.parametrize("error", [CorruptError, ArgumentError])
@pytest.mark.parametrize("kind", KINDS)
def test_a_reader_takes_one_type(kind: str, error: type[CorruptError]) -> None:
    taken, words = [], []
    for value in VALUES[:-1]:
        try:
            KINDS[kind](Reader(place="it", error=error), value)
            taken.append(value)
        except error as refusal:
            words.append(str(refusal))
    assert taken
    assert all(isinstance(v, TYPES[kind]) and (kind == "flag" or not isinstance(v, bool)) for v in taken)
    assert all("it states x = " in w and len(w) < 300 for w in words)


def test_long_numbers_are_shown_as_what_they_are() -> None:
    assert shown(10**5000) == "a value of type int"
    assert len(shown("x" * 10_000)) == 80
    assert "\x1b" not in shown("\x1b[2J")


def test_options_on_a_command_line() -> None:
    assert option("rho=5") == ("rho", 5)
    for text in ("[" * 100_000, "9" * 5000, "NaN", "x"):
        assert option(f"rho={text}") == ("rho", text)


def test_edited_programs_are_corrupt_or_programs() -> None:
    noise = NoiseSchedule.scaled_linear()
    data = json.loads(compile_program("dpmpp_2m", schedule="karras", steps=3, noise=noise).to_json())
    refused = 0
    for name, changed in edits(data, 300, seed=9):
        try:
            Program.from_json(json.dumps(changed))
        except (CorruptError, ArgumentError):
            refused += 1
        except Exception as error:
            pytest.fail(f"{name}: {error!r}"[:300])
    assert 100 < refused < 300


def test_errors_print_no_controls(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "\x1b[2J\u202e"]) == 3
    out, err = capsys.readouterr()
    assert (out + err).replace("\n", "").isprintable()
