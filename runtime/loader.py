"""`fewstep.load`: a bundle's folder in, something to call out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, overload

from ..bundle import Bundle, read_bundle
from ..errors import OutOfMemoryError
from .group import PipelineGroup
from .pipeline import Pipeline


@overload
def load(folder: str | os.PathLike[str] | Bundle, *, devices: None = None, **options: Any) -> Pipeline: ...
@overload
def load(folder: str | os.PathLike[str] | Bundle, *, devices: Sequence[str], **options: Any) -> PipelineGroup: ...
def load(
    folder: str | os.PathLike[str] | Bundle, *, devices: Sequence[str] | None = None, **options: Any
) -> Pipeline | PipelineGroup:
    """Load a bundle for use: `fewstep.load("bundle-folder", backend="auto", size=(512, 512), batch=1)`.

    Options are those of `Pipeline`. `devices` spreads the images of each request over several. Engines that are not
    built yet are built first (`build="never"` refuses instead).
    """
    bundle = folder if isinstance(folder, Bundle) else read_bundle(folder)
    try:
        return Pipeline(bundle, **options) if devices is None else PipelineGroup(bundle, devices=devices, **options)
    except MemoryError as error:
        raise OutOfMemoryError(
            f"memory does not suffice for loading {bundle.name!r}",
            remedy="Free some; `fewstep memory BUNDLE` says what is needed.",
        ) from error
