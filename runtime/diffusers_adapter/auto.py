"""diffusers' classes that choose the pipeline's class by the checkpoint and the task."""

from __future__ import annotations

from typing import Any, ClassVar

from ...errors import ArgumentError
from .base import DiffusionPipeline, class_for
from .loading import open_pretrained


class AutoPipeline:
    """The class of a bundle's family for one task."""

    task: ClassVar[str] = "text"

    def __init__(self, *_: Any, **__: Any) -> None:
        raise ArgumentError(
            f"{type(self).__name__} is no pipeline itself", remedy=f"Use {type(self).__name__}.from_pretrained."
        )

    @classmethod
    def from_pretrained(cls, bundle: Any, **options: Any) -> DiffusionPipeline:
        """See `DiffusionPipeline.from_pretrained`."""
        opened, parts = open_pretrained(bundle, options)
        return class_for(opened.bundle, cls.task)(opened, **parts)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **components: Any) -> DiffusionPipeline:
        """See `DiffusionPipeline.from_pipe`."""
        return class_for(pipeline.bundle, cls.task).from_pipe(pipeline, **components)


class AutoPipelineForText2Image(AutoPipeline):
    """Text to image."""


class AutoPipelineForImage2Image(AutoPipeline):
    """Image to image."""

    task = "image"


class AutoPipelineForInpainting(AutoPipeline):
    """Inpainting."""

    task = "inpaint"
