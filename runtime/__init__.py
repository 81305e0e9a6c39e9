"""Running a bundle: prompts, noise, slots, pipeline, pictures. NumPy throughout; torch only inside the torch device."""

from .call import Call
from .cascade import Cascade
from .device.base import Device, Sampling, Slots
from .loader import load
from .pipeline import Pipeline
from .request import Request, make_request
from .result import Result, Step

__all__ = [
    "Call",
    "Cascade",
    "Device",
    "Pipeline",
    "Request",
    "Result",
    "Sampling",
    "Slots",
    "Step",
    "load",
    "make_request",
]
