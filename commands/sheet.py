"""A contact sheet: pictures in rows and columns with their labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..runtime.arrays import UInt8

if TYPE_CHECKING:
    from PIL.Image import Image

GAP = 6
LABEL = 20
SMALLEST = 128
MOST_LINES = 3


def draw_sheet(
    cells: Sequence[Sequence[UInt8 | str]],
    heads: Sequence[str],
    sides: Sequence[str],
    *,
    title: str = "",
    cell: int | None = None,
) -> Image:
    """Draw images uint8 [H, W, 3], `cells[row][column]`, under column and beside row labels; a text where none is.

    All are enlarged alike; a cell is as large as the largest of them.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(13)
    shapes = [c.shape[:2] for row in cells for c in row if not isinstance(c, str)]
    height, width = (max(s[i] for s in shapes) for i in range(2))
    scale = max(1.0, (cell or SMALLEST) / width) if cell is None else cell / width
    wide, high = round(width * scale), round(height * scale)
    wide = max(wide, 16)
    side = max((round(font.getlength(s)) for s in sides), default=0)
    side = side + 2 * GAP if side else GAP
    lines = [_wrap(head, wide, font.getlength) for head in heads]
    most = max(len(line) for line in lines)
    top = GAP + (LABEL if title else 0) + LABEL * most
    sheet = Image.new("RGB", (side + len(heads) * (wide + GAP), top + len(sides) * (high + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((GAP, GAP), _fit(title, sheet.width - 2 * GAP, font.getlength), fill="black", font=font)
    for c, words in enumerate(lines):
        for i, line in enumerate(words):
            at = side + c * (wide + GAP), top - LABEL * (len(words) - i) + 2
            draw.text(at, line, fill="black", font=font)
    sampling = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    for r, row in enumerate(cells):
        draw.text((GAP, top + r * (high + GAP) + high // 2 - 8), sides[r], fill="black", font=font)
        for c, shown in enumerate(row):
            left, upper = side + c * (wide + GAP), top + r * (high + GAP)
            if isinstance(shown, str):
                for i, line in enumerate(_wrap(shown, wide, font.getlength, most=max(1, high // LABEL))):
                    draw.text((left, upper + LABEL * i), line, fill="black", font=font)
                continue
            own = round(shown.shape[1] * scale), round(shown.shape[0] * scale)
            sheet.paste(Image.fromarray(shown).resize(own, sampling), (left, upper))
    return sheet


def _wrap(text: str, width: float, measure: Callable[[str], float], most: int = MOST_LINES) -> list[str]:
    """The text in lines of at most `width` pixels, `most` of them; what is longer is cut."""
    lines: list[str] = []
    for word in text.split():
        if lines and measure(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    if len(lines) > most:
        lines[most - 1 :] = [" ".join(lines[most - 1 :])]
    return [_fit(line, width, measure) for line in lines or [""]]


def _fit(text: str, width: float, measure: Callable[[str], float]) -> str:
    """The text, cut with an ellipsis where it is wider than `width` pixels."""
    if measure(text) <= width:
        return text
    while text and measure(text + "…") > width:
        text = text[:-1]
    return text + "…"
