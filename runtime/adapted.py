"""The engines that take LoRAs and words, opened when the first image asks for one and kept."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from ..bundle import Bundle
from ..engines import Engine
from ..engines.graph.low_rank import RANK
from ..engines.low_rank import RANKS, Adapted, with_low_rank


class AdaptedEngines:
    """By component; thread-safe. open_one: opens a bundle's component for these sizes beside its usual ones."""

    def __init__(self, bundle: Bundle, open_one: Callable[[Bundle, str, Mapping[str, int]], Engine]) -> None:
        self._bundle, self._open = bundle, open_one
        self._opened: dict[tuple[str, bool], Adapted] = {}
        self._lock = threading.Lock()

    def of(self, name: str, kernels: bool) -> Adapted:
        """The engine of a component, with changes of larger kernels too if `kernels`.

        One that takes those does for all, once it is there.
        """
        with self._lock:
            known = self._opened.get((name, True)) or self._opened.get((name, kernels))
            if known is None:
                bundle = with_low_rank(self._bundle, name, kernels=kernels)
                engine = self._open(bundle, name, {RANK: RANKS[0]})
                layers, vocabulary = bundle.layers[name], bundle.vocabularies.get(name)
                known = self._opened[name, kernels] = Adapted(engine=engine, layers=layers, vocabulary=vocabulary)
            return known

    def opened(self) -> list[tuple[str, Engine]]:
        """The engines that are open, each with its component."""
        with self._lock:
            return [(name, adapted.engine) for (name, _), adapted in self._opened.items()]
