"""Streams of CUDA devices, each in one hand at a time.

torch has 32 streams a device and hands them out in turn, so that the 33rd "new" one is somebody's already: what that
one does would go into this one's capture. Here a stream is given once, and again only when its holder let go of it.
"""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

from ..errors import FewstepError

MOST = 32
"""Streams of a device that torch hands out before it begins again (c10/cuda/CUDAStream.h)."""
_held: set[tuple[int, int]] = set()
_lock = threading.Lock()


def take_stream(torch: Any, device: int) -> Any:
    """A `torch.cuda.Stream` that nobody else took from here and holds; `FewstepError` when all of them are taken.

    torch: the module, which the caller has loaded. device: the index of a CUDA device.
    """
    stream = _untaken(torch, device)
    if stream is None:
        gc.collect()  # a pipeline that nobody holds any more keeps its streams until then
        stream = _untaken(torch, device)
    if stream is not None:
        return stream
    raise FewstepError(
        f"all {MOST} streams of CUDA device {device} are taken",
        expected="fewer sets of slots and engines at once",
        remedy="Lower most_contexts, or serve fewer sizes in one process.",
    )


def _untaken(torch: Any, device: int) -> Any:
    with _lock:
        for _ in range(MOST):
            stream = torch.cuda.Stream(device=device)
            key = (device, int(stream.cuda_stream))
            if key not in _held:
                _held.add(key)
                weakref.finalize(stream, _held.discard, key)
                return stream
    return None
