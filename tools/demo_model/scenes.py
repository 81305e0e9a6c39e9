"""Scenes of one coloured shape on a coloured background, rendered from signed distances, with their captions.

The data set of the embedded model: it is drawn on the fly, so it has no size and no licence of its own.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import torch

SIZE = 64
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (245, 220, 50),
    "orange": (245, 140, 30),
    "purple": (130, 50, 180),
    "pink": (250, 150, 190),
    "cyan": (60, 200, 220),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
COLOURS = tuple(PALETTE)
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": (12.5, 15.5), "large": (19.5, 23.5), "": (12.5, 23.5)}
TEMPLATES = (
    "a {size}{colour} {shape} on a {background} background",
    "{size}{colour} {shape}, {background} background",
    "a picture of a {size}{colour} {shape} in front of {background}",
    "{background} background with a {size}{colour} {shape}",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What a caption says of an image, and where the shape lies (pixels)."""

    colour: str
    shape: str
    background: str
    size: str = ""
    radius: float = 18.0
    x: float = 31.5
    y: float = 31.5

    def caption(self, template: str = TEMPLATES[0]) -> str:
        size = f"{self.size} " if self.size else ""
        return template.format(size=size, colour=self.colour, shape=self.shape, background=self.background)


def triples(*, held_out: bool | None) -> list[tuple[str, str, str]]:
    """(colour, shape, background) triples: those withheld from training, the others, or all (`None`)."""
    every = [(c, s, b) for c, s, b in itertools.product(COLOURS, SHAPES, COLOURS) if c != b]
    random.Random(20).shuffle(every)
    tenth = len(every) // 10
    return every if held_out is None else every[:tenth] if held_out else every[tenth:]


def random_scene(rng: random.Random, kinds: list[tuple[str, str, str]]) -> Scene:
    colour, shape, background = rng.choice(kinds)
    size = rng.choice(("", "", "small", "large"))
    radius = rng.uniform(*SIZES[size])
    slack = 31.5 - radius - 1.0
    reach = min(slack, 9.0)
    return Scene(
        colour=colour,
        shape=shape,
        background=background,
        size=size,
        radius=radius,
        x=31.5 + rng.uniform(-reach, reach),
        y=31.5 + rng.uniform(-reach, reach),
    )


def _box(x: torch.Tensor, y: torch.Tensor, w: float, h: float) -> torch.Tensor:
    return torch.maximum(x.abs() - w, y.abs() - h)


def _polygon(x: torch.Tensor, y: torch.Tensor, corners: list[complex]) -> torch.Tensor:
    """Signed distance to a polygon given by its corners, negative inside."""
    best = torch.full_like(x, 1e9)
    inside = torch.zeros_like(x, dtype=torch.bool)
    for a, b in zip(corners, corners[1:] + corners[:1], strict=True):
        ex, ey = b.real - a.real, b.imag - a.imag
        wx, wy = x - a.real, y - a.imag
        t = ((wx * ex + wy * ey) / (ex * ex + ey * ey)).clamp(0, 1)
        best = torch.minimum(best, (wx - ex * t) ** 2 + (wy - ey * t) ** 2)
        crosses = (a.imag <= y) != (b.imag <= y)
        at = wx * ey - wy * ex
        inside ^= crosses & ((at < 0) == (ey > 0))
    return torch.where(inside, -best.sqrt(), best.sqrt())


def _corners(n: int, radii: tuple[float, ...]) -> list[complex]:
    import cmath
    import math

    return [cmath.rect(radii[i % len(radii)], -math.pi / 2 + 2 * math.pi * i / n) for i in range(n)]


def distance(shape: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Signed distance to the unit shape at points (x right, y down); inside is negative."""
    if shape == "circle":
        return torch.hypot(x, y) - 0.95
    if shape == "square":
        return _box(x, y, 0.82, 0.82)
    if shape == "triangle":
        return _polygon(x, y - 0.22, _corners(3, (1.2,)))
    if shape == "star":
        return _polygon(x, y - 0.05, _corners(10, (1.12, 0.47)))
    if shape == "cross":
        return torch.minimum(_box(x, y, 1.0, 0.32), _box(x, y, 0.32, 1.0))
    if shape == "ring":
        return (torch.hypot(x, y) - 0.74).abs() - 0.24
    raise ValueError(f"no such shape: {shape}")


def render(scenes: list[Scene]) -> torch.Tensor:
    """Draw scenes: float32 [B, 3, 64, 64] in [-1, 1], edges one pixel soft."""
    ys, xs = torch.meshgrid(
        torch.arange(SIZE, dtype=torch.float32), torch.arange(SIZE, dtype=torch.float32), indexing="ij"
    )
    out = torch.empty(len(scenes), 3, SIZE, SIZE)
    palette = {name: torch.tensor(rgb, dtype=torch.float32).view(3, 1, 1) / 127.5 - 1 for name, rgb in PALETTE.items()}
    for image, scene in zip(out, scenes, strict=True):
        d = distance(scene.shape, (xs - scene.x) / scene.radius, (ys - scene.y) / scene.radius) * scene.radius
        cover = (0.5 - d).clamp(0, 1)
        image.copy_(palette[scene.background] + (palette[scene.colour] - palette[scene.background]) * cover)
    return out
