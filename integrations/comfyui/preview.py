"""ComfyUI's progress bar, where the nodes run inside it, and its button that interrupts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...runtime.result import Step


def report_steps(total: int) -> Callable[[Step], None] | None:
    """What tells ComfyUI of each evaluation, and stops where it was interrupted; `None` outside of it."""
    inside, models = sys.modules.get("comfy.utils"), sys.modules.get("comfy.model_management")
    if inside is None:
        return None
    bar = inside.ProgressBar(total)

    def on_step(step: Step) -> None:
        bar.update_absolute(step.index + 1, total)
        if models is not None:
            models.throw_exception_if_processing_interrupted()

    return on_step
