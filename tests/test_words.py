"""Words stay in their rooms: what only a family's file or a backend's file may spell."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fewstep.engines import backend_names
from fewstep.engines.backends.registry import makes_in_memory
from fewstep.families import all_families

ROOT = Path(__file__).parents[1]
ROOMS = ("families", "weights", "schedules", "engines", "runtime", "serving", "export", "commands")
FILES = [*(p for r in ROOMS for p in sorted((ROOT / r).rglob("*.py"))), *sorted(ROOT.glob("*.py"))]
FAMILIES = [
    *(f"[\"']{f.name}[\"']" for f in all_families()),
    r"text_encoder_2|tokenizer_2",
    r"(?<!out\.)\btext_embeds\b|\btime_ids\b",  # `out.text_embeds` is transformers' name of an encoder's output
]
NAMES = r"\bSD ?[12]\b|SDXL|SD-?Turbo"
"""Families' names in prose."""
NAMED = {
    "export/checkpoint/folder.py": "names of models that are not exported",
    "export/checkpoint/singlefile.py": "names of models that are not exported",
    "schedules/names.py": "ComfyUI names a node so",
    "runtime/diffusers_adapter/classes.py": "diffusers has a class a family, and so has its stand-in",
}
BACKENDS = [rf"[\"'`]{re.escape(n)}[\"'`]" for n in backend_names() if not makes_in_memory(n)]


def places(pattern: str, *, but: str) -> list[str]:
    spelt = re.compile(pattern)
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in FILES
        if not str(path.relative_to(ROOT)).startswith(but)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if spelt.search(line)
    ]


@pytest.mark.parametrize("pattern", FAMILIES)
def test_families_stay_in_their_room(pattern: str) -> None:
    assert places(pattern, but="families/") == []


def test_no_other_room_names_a_family() -> None:
    assert {p.partition(":")[0] for p in places(NAMES, but="families/")} == NAMED.keys()


@pytest.mark.parametrize("pattern", BACKENDS)
def test_backends_stay_in_their_room(pattern: str) -> None:
    assert places(pattern, but="engines/backends/") == []


def test_the_words_are_found_where_they_may_stand() -> None:
    """The patterns match what they are meant to."""
    assert all(places(p, but="nowhere") for p in (*FAMILIES, *BACKENDS))
