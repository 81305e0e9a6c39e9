"""Running a bundle: tokenizer, seeds, slots, pipeline, images. NumPy throughout; torch only inside the CUDA device."""

from .call import Call
from .device.numpy_slots import Slots, Tenant
from .device.numpy_update import SlotState
from .pipeline import Pipeline, load
from .request import Request, make_request
from .result import Result, Step

__all__ = ["Call", "Pipeline", "Request", "Result", "SlotState", "Slots", "Step", "Tenant", "load", "make_request"]
