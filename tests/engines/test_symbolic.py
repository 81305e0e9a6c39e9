"""Formulas of dimensions are computed, and what is no formula of them is not guessed."""

from __future__ import annotations

import pytest
from fewstep.engines.graph.symbolic import count_elements

DIMS = {"rows": 2, "height": 9}


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        ((2, 3), 6),
        ((), 1),
        (("rows", 4, "height"), 72),
        (("(((height - 1)//2)) + 1", "2*rows"), 20),
        (("height//rows - 1",), 3),
    ],
)
def test_formulas_are_computed(shape: tuple[int | str, ...], count: int) -> None:
    assert count_elements(shape, DIMS) == count


@pytest.mark.parametrize(
    "size",
    [None, "", "width", "height//0", "height**2", "abs(height)", "height.real", "1.5", "True", "rows,", "rows +"],
)
def test_what_is_no_formula_of_the_dimensions_is_unknown(size: str | None) -> None:
    assert count_elements((3, size), DIMS) is None
