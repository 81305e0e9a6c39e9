"""Scratch memory that everything on one CUDA stream shares: what a stream runs, it runs one after another."""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from typing import Any

_users: defaultdict[tuple[int, int], weakref.WeakSet[Scratch]] = defaultdict(weakref.WeakSet)
_blocks: dict[tuple[int, int], Any] = {}
_lock = threading.Lock()


class Scratch:
    """A user's share in the scratch memory of the streams that it runs on, of a torch device.

    The block of a stream is as large as the largest need that was told of before it is first used, so users tell theirs
    when they are made. What was given out once stays where it is: recorded work holds its address.
    """

    def __init__(self, torch: Any, place: Any, length: int) -> None:
        self._torch, self._place, self.length = torch, place, max(1, length)
        self._blocks: dict[int, Any] = {}

    def expect(self, stream: int) -> None:
        """Tell that this user will run on the stream with this handle."""
        with _lock:
            _users[self._key(stream)].add(self)

    def on(self, stream: int) -> Any:
        """The block for the stream with this handle, uint8 [at least `length`] on the device."""
        block = self._blocks.get(stream)
        if block is None:
            self.expect(stream)
            block = self._blocks[stream] = self._shared(stream)
        return block

    def _shared(self, stream: int) -> Any:
        key = self._key(stream)
        with _lock:
            reference = _blocks.get(key)
            block = None if reference is None else reference()
            if block is None or len(block) < self.length:
                block = self._torch.empty(
                    max(u.length for u in _users[key]), dtype=self._torch.uint8, device=self._place
                )
                _blocks[key] = weakref.ref(block)
        return block

    def _key(self, stream: int) -> tuple[int, int]:
        return int(self._place.index or 0), stream
