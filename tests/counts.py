"""How often a hostile test tries: a few times in the suite, as often as `make faults` asks with FEWSTEP_COUNTS=full."""

from __future__ import annotations

import os

VARIABLE = "FEWSTEP_COUNTS"
CHOICES = ("quick", "full")


def full() -> bool:
    """Whether the numbers are those of `make faults`."""
    chosen = os.environ.get(VARIABLE, "quick")
    if chosen not in CHOICES:
        raise ValueError(f"{VARIABLE} is {chosen!r}: expected one of {', '.join(CHOICES)}")
    return chosen == "full"


def count(quick: int, many: int) -> int:
    """The first number in the suite, the second under `make faults`."""
    return many if full() else quick
