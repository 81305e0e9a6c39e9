"""A budget: how far pictures may be from those of the plain engines, as words for a manifest and a command line."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from .errors import ArgumentError

_BUDGET = re.compile(r"(?:psnr\s*>=?\s*)?(\d+(?:\.\d+)?)\s*(?:db)?")
PEAK = 255.0
LEAST_DB, MOST_DB = 10.0, 100.0


def read_budget(text: str) -> float:
    """The least PSNR in dB of a budget like `psnr>=30`, or `30dB`; `ArgumentError` for other words."""
    match = _BUDGET.fullmatch(text.strip().lower()) if isinstance(text, str) else None
    if match is None or not LEAST_DB <= float(match[1]) <= MOST_DB:
        raise ArgumentError(
            f"the budget is {text!r}",
            expected=f"a PSNR from {LEAST_DB:.0f} to {MOST_DB:.0f} dB, like 'psnr>=30' or 30dB",
            remedy="In a shell, put quotes around what has a > in it.",
        )
    return float(match[1])


def split_budget(text: str, precisions: Sequence[str]) -> tuple[str | None, str]:
    """The precision that a budget like `int8-weights psnr>=30` names before it, or `None`, and the budget."""
    first, _, rest = text.strip().partition(" ") if isinstance(text, str) else ("", "", "")
    return (first, rest) if first in precisions else (None, text)


def budget_words(psnr: float) -> str:
    """A budget in the words that manifests hold."""
    return f"psnr>={psnr:g}"


def psnr_of(mean_square: float) -> float:
    """PSNR in dB of pictures of 8 bits, from their mean squared error in levels: infinity for none."""
    return math.inf if mean_square == 0.0 else 10.0 * math.log10(PEAK**2 / mean_square)


def mean_square_of(psnr: float) -> float:
    """The mean squared error in levels that a PSNR in dB stands for."""
    return float(PEAK**2 / 10.0 ** (psnr / 10.0))
