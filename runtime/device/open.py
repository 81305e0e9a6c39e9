"""A device by its name; torch is imported for those alone that are torch's."""

from __future__ import annotations

import importlib.util

from ...engines.backends.registry import choose_backend, device_of
from ...engines.machine import check_driver
from ...errors import ArgumentError, MissingExtraError
from .base import Device
from .numpy_slots import NumpyDevice


def open_device(
    device: str | Device | None, *, backend: str = "auto", graphs: bool | None = None, graphs_kept: int = 8
) -> Device:
    """The device of a name, `None` being where the backend runs; a `Device` is what it is.

    Errors of `TorchDevice`; `MissingExtraError` for its devices without torch.
    """
    if device is None:
        device = device_of(choose_backend(backend)[0])
    if not isinstance(device, str):
        return device
    if device == "cpu":
        if graphs:
            raise ArgumentError(
                "graphs=True on the device 'cpu', whose work is not captured", remedy="Leave it out, or use cpu:torch."
            )
        return NumpyDevice()
    if importlib.util.find_spec("torch") is None:
        on_gpu = device.startswith("cuda")
        if on_gpu:
            check_driver()  # what would be installed is of no use without it
        raise MissingExtraError("torch", "cuda" if on_gpu else "export", purpose=f"the device {device!r}")
    from .torch_device import TorchDevice

    return TorchDevice(device, graphs=graphs, graphs_kept=graphs_kept)
