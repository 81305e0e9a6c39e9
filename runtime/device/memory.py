"""Device memory: views of engine buffers, uploads that do not wait, and what to say when it does not suffice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ...errors import OutOfMemoryError


def as_tensor(buffer: Any) -> torch.Tensor:
    """An engine's buffer as a tensor on the same memory: NumPy arrays of CPU engines, tensors of the others."""
    return torch.from_numpy(buffer) if isinstance(buffer, np.ndarray) else buffer


def upload(target: torch.Tensor, values: npt.NDArray[Any]) -> None:
    """Copy host values into a tensor. On CUDA they go through pinned memory on the current stream; nobody waits."""
    source = torch.from_numpy(np.require(values, requirements=["C", "W"]))
    if target.device.type == "cuda":
        target.copy_(source.pin_memory(), non_blocking=True)
    else:
        target.copy_(source)


def send(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy a tensor of the host, which stays as it is until the copy is done, to the device; nobody waits."""
    target.copy_(source, non_blocking=True)


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """Memory on the host for a tensor of the device to be read back to, pinned where that is CUDA's."""
    host = torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format)
    return host.pin_memory() if tensor.is_cuda else host


def fetch(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy a tensor of the device to `on_host` memory, which holds it once the current stream has come so far."""
    target.copy_(source, non_blocking=True)


@contextmanager
def guard_memory(device: torch.device, doing: str) -> Iterator[None]:
    """Turn torch's out-of-memory error, or its CPU allocator's refusal, into `OutOfMemoryError`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device) if device.type == "cuda" else (0, 0)
        raise out_of_memory(doing, free, total) from error
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
        raise out_of_memory(doing, 0, 0) from error


def out_of_memory(doing: str, free: int, total: int) -> OutOfMemoryError:
    message = f"the device's memory does not suffice for {doing}"
    if total:
        message += f": {free / 2**30:.1f} of {total / 2**30:.1f} GiB are free"
    return OutOfMemoryError(
        message,
        expected="less at once",
        remedy="Ask for fewer images or a smaller size at once; `fewstep memory BUNDLE` says what fits.",
    )
