"""`fewstep grid`: what its axes take, ranges, and pictures that cannot be."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import fewstep
import numpy as np
import pytest
from commandline import call
from fewstep.commands.axes import AXES, MOST_VALUES, parse_axis
from fewstep.commands.sheet import draw_sheet
from fewstep.errors import ArgumentError
from fewstep.runtime.call import NAMES
from PIL import Image

PROMPT = "a red circle on a blue background"


def test_every_axis_is_an_argument_of_a_call() -> None:
    assert set(AXES) <= set(NAMES)
    assert {"negative", "size", "guidance", "seed"} <= set(AXES), "what the web UI's script is asked for most"


@pytest.mark.parametrize(
    ("written", "values"),
    [
        ("seed=1-5", [1, 2, 3, 4, 5]),
        ("seed=7,1-3, 9", [7, 1, 2, 3, 9]),
        ("seed=3-1", [3, 2, 1]),
        ("steps=1-10(+3)", [1, 4, 7, 10]),
        ("steps=10-1 (-4)", [10, 6, 2]),
        ("steps=1-10 [4]", [1, 4, 7, 10]),
        ("cfg=1-2[3]", [1.0, 1.5, 2.0]),
        ("strength=0.2-1(+0.2)", [0.2, 0.4, 0.6, 0.8, 1.0]),
        ("seed=4-4", [4]),
        ("guidance=7", [7.0]),
        ("size=64x64|96x64", [(64, 64), (96, 64)]),
    ],
)
def test_ranges_are_read_as_the_web_ui_writes_them(written: str, values: list[Any]) -> None:
    name, read = parse_axis(written)
    assert read == pytest.approx(values) if name != "size" else read == values
    assert name in AXES


@pytest.mark.parametrize(
    "written",
    [
        "seed=1-a",
        "seed=1-3(0)",
        "seed=1-3(-1)",
        "seed=",
        "cfg=1-2[",
        "size=64",
        "seed=1-99999999999",
        "steps=1.5-3",
        "x=1",
    ],
)
def test_what_is_no_axis_is_a_usage_error(written: str) -> None:
    with pytest.raises(ArgumentError) as refused:
        parse_axis(written)
    assert refused.value.expected


def test_no_axis_has_more_values_than_stated() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choice("0123456789-+.[]() ,|") for _ in range(rng.randrange(1, 14)))
        try:
            _, values = parse_axis(f"{rng.choice(('seed', 'guidance'))}={text}")
        except ArgumentError:
            continue
        assert len(values) <= MOST_VALUES


def test_pictures_of_several_sizes_and_one_that_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are made, each as alone; the sheet, the command line and the data say which is not."""
    monkeypatch.chdir(tmp_path)
    words = ("--prompt", PROMPT, "--columns", "size=64x64,96x72,70x64", "--rows", "negative=red|a blue, green one")
    code, out, err = call(capsys, "grid", "base", *words, "--steps=2", "--guidance=3", "--cell=96", "--json")
    data = json.loads(out)
    assert (code, data["columns"]) == (0, ["64x64", "96x72", "70x64"])
    assert [s is None for s in data["seconds"]] == [False, False, True] * 2
    assert err.count("warning: not every picture can be: width is 70; expected a multiple of 4. Use 68 or 72.") == 1
    sheet = np.asarray(Image.open("grid.png"))
    alone = fewstep.load("base")(PROMPT, size=(96, 72), negative="a blue, green one", steps=2, guidance=3.0, seed=0)
    height, width = 72, 96
    shown = sheet[-6 - height : -6, -2 * (width + 6) : -width - 12]
    np.testing.assert_array_equal(shown, alone.images[0])
    words_shown = sheet[-6 - height : -6, -width - 6 : -6]
    assert set(np.unique(words_shown)) != {255}, "the words stand where the picture would"
    code, command, _ = call(capsys, "inspect", "grid.png")
    assert (code, "--columns=size=64x64,96x72,70x64" in command) == (0, True)


def test_where_none_can_be_the_reason_is_the_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    target = tmp_path / "grid.png"
    code, _, err = call(capsys, "grid", "student", "--prompt=x", "--columns=steps=0", f"--output={target}")
    assert (code, "steps is 0" in err, target.exists()) == (2, True, False)
    words = ("--prompt=x", "--columns=sampler=euler,eulr", "--steps=1")
    code, _, err = call(capsys, "grid", "student", *words, f"--output={target}")
    assert (code, "unknown sampler 'eulr'" in err, target.exists()) == (2, True, False), "a slip is no picture"


def test_a_sheet_says_its_axes_by_our_names(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    target = tmp_path / "grid.png"
    words = ("--prompt=x", "--columns=cfg=1,2", "--rows=seed=3-4", "--steps=1", f"--output={target}")
    assert call(capsys, "grid", "base", *words)[0] == 0
    _, command, _ = call(capsys, "inspect", str(target))
    assert "--columns=guidance=1,2" in command
    assert "--rows=seed=3-4" in command


def test_cells_of_a_sheet_are_as_large_as_the_largest() -> None:
    small, large = np.zeros((8, 8, 3), np.uint8), np.zeros((16, 24, 3), np.uint8)
    sheet = np.asarray(draw_sheet([[small, large]], ["", ""], [""], cell=48))
    dark = (sheet[-32 - 6 : -6] == 0).all(-1)
    assert dark[:, -48 - 6 : -6].all()
    assert dark[:16, 6 : 6 + 16].all()
    assert dark.sum() == 32 * 48 + 16 * 16, "both enlarged twice, and nothing else"
