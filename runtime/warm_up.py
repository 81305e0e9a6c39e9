"""Requests that nobody asked for, so that no later one pays for what happens once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..bundle import Bundle
from .programs import shortest_call


def warm_up_calls(
    bundle: Bundle, size: tuple[int, int], images: int, *, image: bool, whole: Sequence[int]
) -> list[dict[str, Any]]:
    """The arguments of calls for so many images of (width, height) pixels: with guidance and without.

    image: whether they start from a picture, so that the VAE's encoder is opened. whole: the steps for which whole
    requests are made besides, as a device records them.
    """
    guidances = (1.0, max(2.0, bundle.defaults.guidance))
    seeds = {"seed": list(range(images))}
    if bundle.model.clips:
        grey = np.full((size[1], size[0], 3), 128, np.uint8)
        return [{"steps": 1, "image": grey, "size": size, "guidance": g} | seeds for g in guidances]
    first = shortest_call(bundle, size, image=image)
    kept = {k: first[k] for k in ("size", "image") if bundle.model.pictures == "told" or k == "size"}
    calls = [first | {"guidance": g} for g in guidances] + [kept | {"steps": n} for n in whole]
    return [{"prompt": [f"warm-up {i}" for i in range(images)]} | call | seeds for call in calls]
