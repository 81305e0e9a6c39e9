"""diffusers' pipelines by their own signatures, upon a bundle: a service swaps one import.

    from fewstep.runtime.diffusers_adapter import StableDiffusionPipeline
    pipe = StableDiffusionPipeline.from_pretrained("bundle-folder")

Names of diffusers that are no pipelines (schedulers, `AutoencoderKL`, `UNet2DConditionModel`, ...) are that library's
own, where it is installed. docs/diffusers.md lists every call: done, or refused by its name.
"""

from typing import Any as _Any

from ...errors import UnsupportedError as _UnsupportedError
from ..library import open_library as _open_library
from .auto import AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image
from .base import DiffusionPipeline
from .classes import (
    PIPELINES,
    LatentConsistencyModelImg2ImgPipeline,
    LatentConsistencyModelPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from .components import UnsupportedAttributeError
from .outputs import Output

__all__ = [
    "PIPELINES",
    "AutoPipelineForImage2Image",
    "AutoPipelineForInpainting",
    "AutoPipelineForText2Image",
    "DiffusionPipeline",
    "LatentConsistencyModelImg2ImgPipeline",
    "LatentConsistencyModelPipeline",
    "Output",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionPipeline",
    "StableDiffusionXLControlNetPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLPipeline",
    "UnsupportedAttributeError",
]


def __getattr__(name: str) -> _Any:
    """diffusers' own object of a name that is no pipeline; a pipeline that is not done is refused by its name."""
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name.startswith("Flax") or "Pipeline" in name:
        raise _UnsupportedError(f"{name} of diffusers", expected=f"one of {', '.join(c.__name__ for c in PIPELINES)}")
    return _open_library().named(name)
