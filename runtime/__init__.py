"""Running a bundle: tokenizer, seeds, slots, pipeline, images. NumPy throughout; torch only inside the CUDA device."""

from .call import Call
from .pipeline import Pipeline, load
from .request import Request, make_request
from .result import Result, Step
from .slots import Slots, Tenant
from .update import SlotState

__all__ = ["Call", "Pipeline", "Request", "Result", "SlotState", "Slots", "Step", "Tenant", "load", "make_request"]
