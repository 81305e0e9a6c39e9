"""Room for requests: how much may wait, how much of it one caller's, and what is kept for short ones.

The quickest to come again would have all of it otherwise: a caller that asks for much in a loop, and nobody else.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import QueueFullError

SHARE = 3 / 4
"""Of the room, for one caller at most."""
KEPT = 1 / 8
"""Of the room, on top of it for short requests."""
SHORT = 1 / 4
"""Of the mean work of what is there: what has at most so much is short."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What an accepted request takes: images, seconds of work, and whose it is (`None`: nobody's in particular)."""

    images: int
    work_s: float
    owner: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """images: in progress and waiting. work_s: seconds of work ahead of a request."""

    images: int
    work_s: float

    def admit(self, asked: Held, there: Iterable[Held]) -> bool:
        """Whether a request is short beside what is there already; `QueueFullError` when there is no room for it.

        Where nothing is there, any request has room.
        """
        held = list(there)
        if not held:
            return False
        images, work_s = sum(h.images for h in held), sum(h.work_s for h in held)
        short = asked.work_s <= SHORT * work_s / len(held)
        most_images = self.images + (kept(self.images) if short else 0)
        most_work_s = self.work_s * (1 + KEPT if short else 1)
        wait_s = max(work_s - self.work_s, work_s / max(1, images) * asked.images, 0.05)
        if images + asked.images > most_images or work_s > most_work_s:
            what = f"{images} images" if images + asked.images > most_images else f"{work_s:.1f} s of work"
            raise QueueFullError(f"{what} are waiting already", retry_after_s=wait_s, remedy="Try again later.")
        if asked.owner is None or short:
            return short
        own = sum(h.images for h in held if h.owner == asked.owner)
        share = max(1, round(SHARE * self.images))
        if own and own + asked.images > share:
            raise QueueFullError(
                f"{own} images of this caller are waiting already",
                expected=f"at most {share} of one caller",
                retry_after_s=wait_s,
                remedy="Try again later.",
            )
        return False


def kept(count: int) -> int:
    """How many of so many places are kept on top for short requests."""
    return max(1, round(KEPT * count))
