"""docs/architecture.md is so: a run goes through the files that it lists, its rooms are there, its words are twenty."""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from fewstep.cli import main
from fewstep.runtime import programs

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
STEP = re.compile(r"^\d+\. `([\w/]+\.py)`", re.MULTILINE)


def section(title: str) -> str:
    return PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_a_run_goes_through_the_files_of_its_life_and_they_are_fifteen(tmp_path: Path) -> None:
    listed = STEP.findall(section("The life of a request"))
    assert 0 < len(listed) <= 15
    entered: set[str] = set()

    def enter(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_name != "<module>":
            entered.add(frame.f_code.co_filename)

    programs._compiled.cache_clear()
    call = ["run", "student", "--prompt", "a red circle", "--backend", "ort-cpu", "--output", str(tmp_path / "o.png")]
    threading.setprofile(enter)
    sys.setprofile(enter)
    try:
        assert main(call) == 0
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    files = {Path(f).resolve() for f in entered}
    missing = [f for f in listed if ROOT / f not in files]
    assert not missing, f"a run does not enter {missing}"


def test_every_room_is_drawn_and_the_words_are_twenty() -> None:
    drawn = section("The rooms")
    rooms = {p.name for p in ROOT.iterdir() if (p / "__init__.py").is_file()} - {"tests"}
    assert all(f"{room}/" in drawn for room in rooms)
    words = re.findall(r"^- \*\*(\w+)\*\*:", section("Twenty words"), re.MULTILINE)
    assert len(words) == len(set(words)) == 20
