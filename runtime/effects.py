"""What a call asks for that has no effect, or goes against its model: a sentence each, for people."""

from __future__ import annotations

from ..bundle import Bundle
from ..errors import UnknownNameError
from ..presets import kind_of
from ..schedules.listing import why_unsuited
from ..schedules.names import resolve_sampler
from .call import Call
from .prompts.marks import plain_warnings


def call_warnings(bundle: Bundle, call: Call, *, guidance: float, shown: bool) -> list[str]:
    """guidance: the one that is used. shown: whether pictures are fitted to the size."""
    warnings = [*_negative(bundle, call, guidance), *_sampler(bundle, call), *_pictures(call, shown)]
    if call.prompt_syntax == "plain":
        warnings += plain_warnings([t for given in _texts(call) for t in given])
    return warnings


def _texts(call: Call) -> list[list[str | None]]:
    given = (call.prompt, call.negative, call.prompt_2, call.negative_2)
    return [[t] if t is None or isinstance(t, str) else list(t) for t in given]


def _negative(bundle: Bundle, call: Call, guidance: float) -> list[str]:
    texts = [t for given in _texts(call)[1::2] for t in given if t]
    if not texts and call.negative_prompt_embeds is None:
        return []
    if bundle.guidance_embedding:
        return ["The negative prompt has no effect: this model is told its guidance and reads no other prompt."]
    if guidance <= 1.0:
        return [f"The negative prompt has no effect at guidance {guidance:g}; ask for more than 1."]
    return []


def _sampler(bundle: Bundle, call: Call) -> list[str]:
    if call.sampler is None:
        return []
    asked = resolve_sampler(call.sampler).name
    try:
        own = resolve_sampler(bundle.defaults.sampler or str(bundle.scheduler["_class_name"])).name
    except UnknownNameError:
        own = None
    why = None if asked == own else why_unsuited(asked, kind_of(bundle.defaults.preset))
    return [] if why is None else [f"The sampler {asked} does not suit {bundle.name} ({why}); see: fewstep samplers"]


def _pictures(call: Call, shown: bool) -> list[str]:
    warnings = []
    if call.fit != "stretch" and not shown:
        warnings.append(f"fit={call.fit!r} (--fit) has no effect without a picture.")
    if call.mask_threshold != 0.5 and call.mask is None:
        warnings.append("mask_threshold (--mask-threshold) has no effect without a mask.")
    return warnings
