"""Which components a checkpoint becomes, with the configuration and precision each is traced in."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import ArgumentError, UnsupportedError
from ..families import Family
from ..families.decoders import TINY_DECODER
from ..families.image_prompt import IMAGE_ENCODER, IP_ADAPTER, PROJECTION
from ..schedules import NoiseSchedule, program_from_diffusers
from ..schedules.compat.classes import CLASSES
from ..schedules.compat.meanings import LEARNED
from ..weights.stored import Stored, open_tensors
from .checkpoint.compose import read_tensors
from .checkpoint.controls import control_tensors, controlled_config
from .checkpoint.parts import Checkpoint, IpAdapter, Part
from .trace.graphs import graph_key

PRECISIONS = ("float32", "float16", "bfloat16")
TRIED_STEPS = 4
ALIASES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentPlan:
    """A component to export: its kind in the bundle, the checkpoint's part it comes from, and its graph's key.

    controls: the networks that are traced with it, by name. adapter: whose layers are in it, if it has any.
    """

    kind: str
    part: Part
    config: Mapping[str, Any]
    dtype: str
    family: Family
    controls: Mapping[str, Part] = field(default_factory=dict)
    adapter: IpAdapter | None = None

    def tensors(self, keys: Sequence[str]) -> Mapping[str, Stored]:
        """What its weights are read from, under the names that its graph has them by."""
        own = read_tensors(self.part, open_tensors(self.part.files), keys)
        beside = [control_tensors(name, part) for name, part in self.controls.items()]
        if self.adapter is not None:
            beside.append(self.adapter.tensors())
        return ChainMap(*beside, dict(own)) if beside else own

    @property
    def network(self) -> str:
        """What kind of network it is; several components may be of one."""
        return "vae_decoder" if self.kind == TINY_DECODER else self.kind

    @property
    def key(self) -> str:
        return graph_key(self.network, self.config, self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """The precision of a component, and in words whose choice it was."""

    dtype: str
    why: str


def choose_precisions(
    checkpoint: Checkpoint, dtype: str = "float32", vae_dtype: str | None = None
) -> dict[str, Precision]:
    """A precision for each component, by a policy that is recorded with it.

    dtype: one for all ("fp16"), or with others by component ("fp16,text_encoder=fp32,vae=bf16"; what is not named is
    float32). vae_dtype: the VAE's alone. A VAE that is not named follows the one for all, but for float16 where its
    configuration says `force_upcast` (it overflows there): that one is float32. `ArgumentError` for names
    of precisions or components that are not known.
    """
    kinds = list(checkpoint.components)
    general, named = _read_precisions(dtype, kinds)
    if vae_dtype is not None:
        if any(k.startswith("vae") for k in named):
            raise ArgumentError("the VAE's precision is given twice", remedy="Leave out --vae-precision, or vae=.")
        named |= {k: _precision(vae_dtype) for k in kinds if k.startswith("vae")}
    config = checkpoint.parts["vae"].config
    precisions = {}
    for kind in kinds:
        chosen, why = named.get(kind, general), "asked for by name" if kind in named else "asked for"
        if kind.startswith("vae") and kind not in named and chosen == "float16" and config.get("force_upcast"):
            chosen, why = "float32", "its configuration says force_upcast: it may overflow in float16"
        if kind == "unet" and chosen != "float32" and checkpoint.parts["unet"].config.get("upcast_attention"):
            why += "; attention in float32, as its configuration says upcast_attention"
        precisions[kind] = Precision(dtype=chosen, why=why)
    return precisions


def precision_for(part: str, config: Mapping[str, Any], stored: str) -> str:
    """The precision of a part that is exported as it is stored (`F32`, `F16` or `BF16`), by the same policy."""
    dtype = {"F16": "float16", "BF16": "bfloat16"}.get(stored, "float32")
    return "float32" if part == "vae" and dtype == "float16" and config.get("force_upcast") else dtype


def _read_precisions(text: str, kinds: list[str]) -> tuple[str, dict[str, str]]:
    """The precision for all, and those by component."""
    general = "float32"
    named: dict[str, str] = {}
    for at, item in enumerate(text.split(",")):
        name, equals, value = item.strip().rpartition("=")
        if not equals:
            if at:
                raise ArgumentError(f"{item.strip()!r} in {text!r} names no component", expected="like vae=fp32")
            general = _precision(value)
            continue
        chosen = [k for k in kinds if k == name or (k.startswith(f"{name}_") and name == "vae")]
        if not chosen:
            raise ArgumentError(f"the checkpoint has no component {name!r}", expected=f"vae, {', '.join(kinds)}")
        named |= {k: _precision(value) for k in chosen}
    return general, named


def _precision(name: str) -> str:
    full = ALIASES.get(name, name)
    if full not in PRECISIONS:
        raise ArgumentError(f"unknown precision {name!r}", expected=f"one of {', '.join([*ALIASES, *PRECISIONS])}")
    return full


def plan_components(checkpoint: Checkpoint, dtypes: Mapping[str, str] | None = None) -> list[ComponentPlan]:
    """The components in the order of their export; text encoders first, as the gate feeds the UNet their output."""
    plans, family = [], checkpoint.model
    for kind in checkpoint.components:
        dtype = (dtypes or {}).get(kind, "float32")
        plans.append(_plan(checkpoint, kind, dtype, family))
    return plans


def _plan(checkpoint: Checkpoint, kind: str, dtype: str, family: Family) -> ComponentPlan:
    """One component; the UNet and the image encoder with what is traced together with them."""
    adapter = checkpoint.adapter
    if kind == IMAGE_ENCODER and adapter is not None:
        config = {**adapter.encoder.config, PROJECTION: dict(adapter.projection)}
        return ComponentPlan(
            kind=kind, part=adapter.encoder, config=config, dtype=dtype, family=family, adapter=adapter
        )
    if kind == TINY_DECODER and checkpoint.tiny is not None:
        tiny = checkpoint.tiny
        config = component_config("vae_decoder", tiny.config, tiny.class_name, family)
        return ComponentPlan(kind=kind, part=tiny, config=config, dtype=dtype, family=family)
    part = checkpoint.parts["vae" if kind.startswith("vae") else kind]
    config = component_config(kind, part.config, part.class_name, family)
    if kind != "unet":
        return ComponentPlan(kind=kind, part=part, config=config, dtype=dtype, family=family)
    config = {k: v for k, v in controlled_config(config, checkpoint.controls).items() if k != IP_ADAPTER}
    if adapter is not None:
        config[IP_ADAPTER] = dict(adapter.of_unet)
    beside: dict[str, Any] = {"controls": checkpoint.controls, "adapter": adapter}
    return ComponentPlan(kind=kind, part=part, config=config, dtype=dtype, family=family, **beside)


def check_scheduler(config: Mapping[str, Any], *, replaced: bool, says_variance: bool = False) -> None:
    """Refuse what no request could be run with: the noise schedule, and the scheduler as diffusers runs it.

    replaced: whether a preset names another sampler, so that the checkpoint's own is not a request's default.
    says_variance: whether its UNet says its variance.
    """
    if config.get("variance_type") in LEARNED and not says_variance:
        raise UnsupportedError(
            f"the checkpoint's scheduler takes a variance that its UNet does not say ({config['variance_type']})",
            expected="a UNet with twice as many channels out as its latent has",
            remedy="Set variance_type to fixed_small in scheduler/scheduler_config.json.",
        )
    try:
        NoiseSchedule.from_diffusers(config)
        if not replaced:
            program_from_diffusers(config, steps=TRIED_STEPS)
    except ArgumentError as error:
        raise UnsupportedError(
            f"the checkpoint's scheduler cannot be run: {error.found}",
            expected=error.expected or f"one of {', '.join(CLASSES)}, in a form that rows of coefficients hold",
            remedy=f"{error.remedy} Say it in scheduler/scheduler_config.json, or name another class there and in "
            "model_index.json, like DPMSolverMultistepScheduler.".strip(),
        ) from error


def component_config(kind: str, config: Mapping[str, Any], class_name: str, family: Family) -> dict[str, Any]:
    """A part's configuration as the family's pipelines read it, and what else decides a text encoder's graph.

    That is its class and the family's own layer.
    """
    layers = {e.name: e.layer for e in family.text_encoders}
    if kind in layers:
        return {**config, "_class": class_name, "_layer": layers[kind]}
    return family.loaded_vae(config) if kind.startswith("vae") else dict(config)
