"""`fewstep.load`: a bundle's folder in, something to call out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Unpack, overload

from ..bundle import Bundle
from ..errors import ArgumentError, OutOfMemoryError, UnknownNameError
from .group import PipelineGroup
from .keywords import LoadOptions, SharedOptions
from .library import open_bundle
from .pipeline import Pipeline


@overload
def load(
    folder: str | os.PathLike[str] | Bundle,
    *,
    devices: None = None,
    budget: str | None = None,
    **options: Unpack[LoadOptions],
) -> Pipeline: ...
@overload
def load(
    folder: str | os.PathLike[str] | Bundle,
    *,
    devices: Sequence[str],
    budget: str | None = None,
    **options: Unpack[SharedOptions],
) -> PipelineGroup: ...
def load(
    folder: str | os.PathLike[str] | Bundle,
    *,
    devices: Sequence[str] | None = None,
    budget: str | None = None,
    **options: Any,
) -> Pipeline | PipelineGroup:
    """Load a bundle for use: `fewstep.load("bundle-folder", backend="auto", size=(512, 512), batch=1)`.

    folder: of a bundle, or `"student"` or `"base"`, the embedded models. What is loaded is closed at the end of a
    `with`, or by `close`. Options are those of `Pipeline`. `devices` spreads the images of each request over several.
    Engines that are not built yet are built first (`build="never"` refuses instead). budget: as `"psnr>=30"`, takes the
    components with layers in fewer bits that `fewstep quantize` found within it; without one the plain components.
    """
    if devices is not None and options.get("device") is not None:
        raise ArgumentError("device beside devices", expected="one of the two")
    if unknown := next((n for n in options if n not in LoadOptions.__annotations__), None):
        known = (*LoadOptions.__annotations__, "devices", "budget")
        raise UnknownNameError("option of fewstep.load", unknown, known)
    bundle = open_bundle(folder)
    if budget is not None:
        bundle = bundle.within(budget)
    try:
        return Pipeline(bundle, **options) if devices is None else PipelineGroup(bundle, devices=devices, **options)
    except MemoryError as error:
        raise OutOfMemoryError(
            f"memory does not suffice for loading {bundle.name!r}",
            remedy="Free some; `fewstep memory BUNDLE` says what is needed.",
        ) from error
