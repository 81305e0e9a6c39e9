"""What a quantization is asked, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..bundle import Bundle
from ..errors import ArgumentError, MissingError, UnsupportedError
from ..precision import budget_words, read_budget
from ..runtime.arguments import check_integer
from ..runtime.request import check_size
from ..search.sets import check_prompts, prompts_digest, usual_prompts
from .forms import FORMS

COMPONENTS = ("unet", "vae_decoder")
"""What takes the time. Where weights alone are lowered, text encoders are too: what counts is memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeSettings:
    """What is asked: all of it decides what is found.

    psnr: least PSNR in dB of held-out pictures. calls: keyword arguments of every picture's call. pairs: pictures to
    measure each layer's damage on; choose: to choose by; held_out: to be judged by.
    """

    precision: str
    budget: str
    psnr: float
    components: tuple[str, ...]
    prompts: tuple[str, ...]
    pairs: int
    choose: int
    held_out: int
    seed: int
    size: tuple[int, int]
    calls: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        plain = ("precision", "budget", "components", "pairs", "choose", "held_out", "seed", "size")
        data = {k: getattr(self, k) for k in plain}
        return {**data, "prompts": prompts_digest(self.prompts), "calls": dict(self.calls)}


def read_settings(
    bundle: Bundle,
    *,
    precision: str,
    budget: str,
    components: Sequence[str] | None,
    prompts: Sequence[str] | None,
    pairs: int,
    choose: int,
    held_out: int,
    seed: int,
    size: tuple[int, int] | None,
    calls: Mapping[str, Any],
) -> QuantizeSettings:
    """Raises `ArgumentError`, `MissingError` for an absent component, `UnsupportedError` for its precision."""
    if precision not in FORMS:
        raise ArgumentError(f"precision is {precision!r}", expected=f"one of {', '.join(FORMS)}")
    known = COMPONENTS if FORMS[precision].activations else (*bundle.text_encoders, *COMPONENTS)
    names = tuple(components or known)
    for name in names:
        if name not in known:
            raise ArgumentError(f"the component {name!r}", expected=f"of {', '.join(known)}")
        if name not in bundle.components:
            raise MissingError(f"the bundle has no {name}", remedy="Name the components that it has (--component).")
        dtype = bundle.component(name).dtype
        if dtype != "float32":
            raise UnsupportedError(
                f"the {name} is in {dtype}", expected="float32", remedy="Export the checkpoint with --dtype fp32."
            )
    return QuantizeSettings(
        precision=precision,
        budget=budget_words(read_budget(budget)),
        psnr=read_budget(budget),
        components=names,
        prompts=tuple(check_prompts(usual_prompts() if prompts is None else list(prompts))),
        pairs=check_integer("pairs", pairs, 1, 1024),
        choose=check_integer("choose", choose, 1, 1024),
        held_out=check_integer("held_out", held_out, 2, 4096),
        seed=check_integer("seed", seed, 0, 2**31),
        size=check_size(bundle, size or (bundle.defaults.width, bundle.defaults.height)),
        calls=dict(calls),
    )
