"""What an image shows, read off its pixels: background, colour and shape, independent of how scenes are rendered.

The background is the border's commonest palette colour, the shape's colour the commonest other one; a pixel belongs
to the shape when it is nearer to that colour than to the background's. The largest connected component is compared
with templates drawn by Pillow, over a small search of place and size; the best overlap names the shape.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw
from scenes import COLOURS, PALETTE, SHAPES, SIZE

_RGB = np.array([PALETTE[c] for c in COLOURS], np.float64)
LEAST_OVERLAP = 0.6
LEAST_AREA = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What was read; `None` where nothing could be."""

    background: str
    colour: str | None
    shape: str | None
    overlap: float


def look(image: np.ndarray) -> Seen:
    """Read an image, uint8 [64, 64, 3]."""
    pixels = image.astype(np.float64)
    nearest = ((pixels[:, :, None, :] - _RGB) ** 2).sum(-1).argmin(-1)
    border = np.concatenate(
        [nearest[:2].ravel(), nearest[-2:].ravel(), nearest[:, :2].ravel(), nearest[:, -2:].ravel()]
    )
    back = int(np.bincount(border, minlength=len(COLOURS)).argmax())
    counts = np.bincount(nearest.ravel(), minlength=len(COLOURS))
    counts[back] = 0
    fore = int(counts.argmax())
    if counts[fore] < LEAST_AREA:
        return Seen(background=COLOURS[back], colour=None, shape=None, overlap=0.0)
    along = _RGB[fore] - _RGB[back]
    share = ((pixels - _RGB[back]) @ along) / (along @ along)
    mask = _largest_component(share > 0.5)
    if mask.sum() < LEAST_AREA:
        return Seen(background=COLOURS[back], colour=COLOURS[fore], shape=None, overlap=0.0)
    overlaps = {shape: _best_overlap(mask, shape) for shape in SHAPES}
    best = max(overlaps, key=lambda s: overlaps[s])
    found = best if overlaps[best] >= LEAST_OVERLAP else None
    return Seen(background=COLOURS[back], colour=COLOURS[fore], shape=found, overlap=overlaps[best])


def _largest_component(mask: np.ndarray) -> np.ndarray:
    """The largest 8-connected component, by flooding from each unvisited pixel."""
    best, seen = np.zeros_like(mask), np.zeros_like(mask)
    height, width = mask.shape
    for start in zip(*np.nonzero(mask), strict=True):
        if seen[start]:
            continue
        part, stack = np.zeros_like(mask), [start]
        seen[start] = True
        while stack:
            y, x = stack.pop()
            part[y, x] = True
            for j in range(max(y - 1, 0), min(y + 2, height)):
                for i in range(max(x - 1, 0), min(x + 2, width)):
                    if mask[j, i] and not seen[j, i]:
                        seen[j, i] = True
                        stack.append((j, i))
        if part.sum() > best.sum():
            best = part
    return best


def _best_overlap(mask: np.ndarray, shape: str) -> float:
    """The largest intersection over union with the shape's template of about the mask's extent."""
    ys, xs = np.nonzero(mask)
    middle = ((xs.min() + xs.max()) / 2, (ys.min() + ys.max()) / 2)
    extent = max(xs.max() - xs.min(), ys.max() - ys.min()) + 1
    best = 0.0
    for grow in (-2, 0, 2):
        template = _template(shape, round(extent) + grow)
        for dx in (-1, 0, 1):
            for dy in (-1, 0, 1):
                placed = _place(template, middle[0] + dx, middle[1] + dy)
                union = (mask | placed).sum()
                best = max(best, (mask & placed).sum() / union)
    return best


def _place(template: np.ndarray, x: float, y: float) -> np.ndarray:
    height, width = template.shape
    canvas = np.zeros((3 * SIZE, 3 * SIZE), bool)
    top, left = round(SIZE + y - (height - 1) / 2), round(SIZE + x - (width - 1) / 2)
    canvas[top : top + height, left : left + width] = template
    return canvas[SIZE : 2 * SIZE, SIZE : 2 * SIZE]


@functools.cache
def _template(shape: str, extent: int) -> np.ndarray:
    """A shape drawn with Pillow at 16 times the size, cut to its extent (its longer side) and reduced."""
    big = 512
    image = Image.new("L", (big, big))
    draw = ImageDraw.Draw(image)
    middle, r = big / 2, big * 0.4
    if shape in {"circle", "ring"}:
        draw.ellipse([middle - r, middle - r, middle + r, middle + r], fill=255)
        if shape == "ring":
            hole = r * 0.51
            draw.ellipse([middle - hole, middle - hole, middle + hole, middle + hole], fill=0)
    elif shape == "square":
        draw.rectangle([middle - r, middle - r, middle + r, middle + r], fill=255)
    elif shape == "cross":
        arm = r * 0.32
        draw.rectangle([middle - r, middle - arm, middle + r, middle + arm], fill=255)
        draw.rectangle([middle - arm, middle - r, middle + arm, middle + r], fill=255)
    else:
        corners, radii = (3, (r,)) if shape == "triangle" else (10, (r, r * 0.42))
        points = []
        for i in range(corners):
            angle, radius = -math.pi / 2 + 2 * math.pi * i / corners, radii[i % len(radii)]
            points.append((middle + radius * math.cos(angle), middle + radius * math.sin(angle)))
        draw.polygon(points, fill=255)
    cut = image.crop(image.getbbox())
    scale = max(extent, 4) / max(cut.size)
    small = cut.resize((max(1, round(cut.width * scale)), max(1, round(cut.height * scale))), Image.Resampling.BOX)
    return np.asarray(small) > 127
