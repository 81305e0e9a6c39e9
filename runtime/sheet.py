"""A contact sheet: pictures in rows and columns with their labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .images import UInt8

if TYPE_CHECKING:
    from PIL.Image import Image

GAP = 6
LABEL = 20
SMALLEST = 128


def draw_sheet(
    cells: Sequence[Sequence[UInt8]],
    heads: Sequence[str],
    sides: Sequence[str],
    *,
    title: str = "",
    cell: int | None = None,
) -> Image:
    """Draw images uint8 [H, W, 3], all of one size, `cells[row][column]`, under column and beside row labels."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(13)
    height, width = cells[0][0].shape[:2]
    scale = max(1.0, (cell or SMALLEST) / width) if cell is None else cell / width
    wide, high = round(width * scale), round(height * scale)
    wide = max(wide, 16)
    side = max((round(font.getlength(s)) for s in sides), default=0)
    side = side + 2 * GAP if side else GAP
    top = GAP + (LABEL if title else 0) + LABEL
    sheet = Image.new("RGB", (side + len(heads) * (wide + GAP), top + len(sides) * (high + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((GAP, GAP), _fit(title, sheet.width - 2 * GAP, font.getlength), fill="black", font=font)
    for c, head in enumerate(heads):
        draw.text((side + c * (wide + GAP), top - LABEL + 2), _fit(head, wide, font.getlength), fill="black", font=font)
    sampling = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    for r, row in enumerate(cells):
        draw.text((GAP, top + r * (high + GAP) + high // 2 - 8), sides[r], fill="black", font=font)
        for c, pixels in enumerate(row):
            sheet.paste(
                Image.fromarray(pixels).resize((wide, high), sampling),
                (side + c * (wide + GAP), top + r * (high + GAP)),
            )
    return sheet


def _fit(text: str, width: float, measure: object) -> str:
    """The text, cut with an ellipsis where it is wider than `width` pixels."""
    if not callable(measure) or measure(text) <= width:
        return text
    while text and measure(text + "…") > width:
        text = text[:-1]
    return text + "…"
