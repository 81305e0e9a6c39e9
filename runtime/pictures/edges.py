"""Canny's edges of a photograph, as ControlNets were trained on them: OpenCV's (Canny 1986, L1 gradients of 3x3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...errors import ArgumentError, MissingExtraError
from ..arguments import check_real

if TYPE_CHECKING:
    from PIL.Image import Image

LOW, HIGH = 100.0, 200.0
"""Thresholds that ControlNet's own preprocessing has."""
MOST = 1e6


def check_thresholds(low: object, high: object) -> tuple[float, float]:
    """Gradients (of 8-bit grey, summed over both directions) from which on an edge goes on, and begins."""
    least, most = check_real("canny's low threshold", low, 0, MOST), check_real("canny's high threshold", high, 0, MOST)
    if least > most:
        raise ArgumentError(f"canny's thresholds are {least:g} and {most:g}", expected="the lower one first")
    return least, most


def edges_of(picture: Image, low: float = LOW, high: float = HIGH) -> Image:
    """White edges on black, in RGB, of a picture in RGB of the same size. `MissingExtraError` without OpenCV."""
    from PIL import Image as pillow

    try:
        import cv2
    except ModuleNotFoundError as error:
        raise MissingExtraError("opencv-python-headless", "canny", purpose="edges of photographs") from error
    edges = cv2.Canny(np.asarray(picture.convert("RGB")), low, high)
    return pillow.fromarray(edges).convert("RGB")
