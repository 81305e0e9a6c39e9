"""A search's time: its budget, what it says on the way, and until when a descent goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .endpoint import Remember
from .journal import Journal
from .problem import Knots

log = logging.getLogger("fewstep.search")
Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """budget: seconds. progress: is told a stage and the share of the budget that is spent."""

    journal: Journal
    budget: float
    progress: Progress | None = None

    def say(self, stage: str) -> None:
        log.info("%s (%.0f s)", stage, self.journal.spent)
        if self.progress is not None:
            self.progress(stage, min(1.0, self.journal.spent / self.budget))

    def remembering(self, key: str, deadline: float) -> Remember:
        """The journal's memory under a key; that no round was begun is remembered too.

        None is begun that would end after the deadline if it took as long as the longest before it.
        """
        longest = 0.0

        def remember(part: str, find: Callable[[], Knots | None]) -> Knots | None:
            nonlocal longest
            name, began = f"{key}-{part}", self.journal.spent
            if not self.journal.value(f"{name}?", lambda: self.in_time(deadline - longest)):
                return None
            found = self.journal.knots(name, find)
            longest = max(longest, self.journal.spent - began)
            return found

        return remember

    def in_time(self, deadline: float) -> bool:
        if self.journal.spent < deadline:
            return True
        self.journal.value("cut", lambda: True)
        return False

    def deadline(self, share: float, reserve: float = 0.0) -> float:
        """In seconds spent, so much of what is left of the budget from now, but for the reserve."""
        spent = self.journal.spent
        return spent + share * max(0.0, self.budget - reserve - spent)

    def deadline_of(self, place: int, steps: Sequence[int], reserve: float) -> float:
        """The time up to which descent for `steps[place]` goes on: its share, by steps, of what is left.

        reserve: seconds that are kept for what comes after all descent.
        """
        share = steps[place] / sum(steps[place:])
        return float(self.journal.value(f"deadline{place}", lambda: self.deadline(share, reserve)))
