"""What requests should take, from what evaluations, encoders and decoders were seen to take."""

from __future__ import annotations

from collections.abc import Mapping

from ..runtime.arrays import Shape
from ..runtime.request import Request
from .batch_sizes import SMOOTHING, BatchSizes


class Estimates:
    """Times of each stage, in milliseconds, by latent shape (C, h, w); they follow what is observed.

    What a request takes alone is kept apart: it is what callers are promised multiples of, and must not grow with
    the load.
    """

    def __init__(
        self, buckets: Mapping[Shape, BatchSizes], *, text_ms: float, decode_ms: Mapping[Shape, float]
    ) -> None:
        self._buckets, self._text_ms, self._decode_ms = buckets, text_ms, dict(decode_ms)
        self._least_decode_ms = dict(decode_ms)

    def observe_text(self, took_ms: float) -> None:
        self._text_ms += SMOOTHING * (took_ms - self._text_ms)

    def observe_decode(self, shape: Shape, took_ms: float, images: int) -> None:
        self._decode_ms[shape] += SMOOTHING * (took_ms / images - self._decode_ms[shape])
        self._least_decode_ms[shape] = min(self._least_decode_ms[shape], self._decode_ms[shape])

    def decode_s(self, shape: Shape, images: int) -> float:
        return 1e-3 * images * self._decode_ms[shape]

    def alone_s(self, request: Request, shape: Shape, rows: int) -> float:
        """Seconds from submitting to images with nobody else there; `rows` is an image's."""
        ticks = request.program.evaluations * self._buckets[shape].lone_ms(rows * request.images)
        return 1e-3 * (self._text_ms + ticks + request.images * self._least_decode_ms[shape])

    def work_s(self, request: Request, shape: Shape, rows: int) -> float:
        """Seconds of the server it takes when evaluations are full."""
        row_ms = self._buckets[shape].row_ms
        return 1e-3 * request.program.evaluations * request.images * rows * row_ms + self.decode_s(
            shape, request.images
        )
