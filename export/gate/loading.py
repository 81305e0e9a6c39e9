"""A checkpoint's models as diffusers and transformers load them themselves: what the gate compares an export with.

fewstep's own reading of weights is not used here, so that a mistake in it shows.
"""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    AutoencoderTiny,
    ControlNetModel,
    DDIMScheduler,
    T2IAdapter,
    UNet2DConditionModel,
    UNetSpatioTemporalConditionModel,
)
from diffusers.loaders import TextualInversionLoaderMixin, UNet2DConditionLoadersMixin
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from safetensors.torch import load_file
from torch import nn
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    T5EncoderModel,
)

from ...errors import CorruptError
from ...families.image_prompt import IMAGE_ENCODER
from ...families.pixels import PIXELS
from ...families.t5 import T5
from ...weights.lora import kinds_of, match_loras
from ..checkpoint.folder import Checkpoint, Part, has_variant
from ..checkpoint.parts import IpAdapter
from ..plan import ComponentPlan
from ..trace.control import ControlledUNet
from ..trace.ip_adapter import IpLayer, PromptingEncoder
from ..trace.pixels import Pixels

LOADERS = {
    c.__name__: c
    for c in (
        *(UNet2DConditionModel, UNetSpatioTemporalConditionModel),
        *(AutoencoderKL, AutoencoderTiny, AutoencoderKLTemporalDecoder),
        *(CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection, T5EncoderModel),
    )
}
CONTROLS: dict[str, Any] = {c.__name__: c for c in (ControlNetModel, T2IAdapter)}

READ_BY_DIFFUSERS = frozenset({"LoRA"})
"""Kinds of adapters that diffusers' loader reads; it drops DoRA's magnitudes with a warning."""


def load_model(checkpoint: Checkpoint, part: Part) -> nn.Module:
    """A part in float32, its LoRAs fused by diffusers."""
    if checkpoint.loras and part.name != "vae":
        return load_fused(checkpoint)[part.name]
    return _plain(checkpoint, part)


def load_adapted(checkpoint: Checkpoint, plan: ComponentPlan) -> nn.Module:
    """A component's part in float32 with what is traced with it, each by diffusers' own loader."""
    if plan.kind == IMAGE_ENCODER and plan.adapter is not None:
        return load_prompting_encoder(plan.adapter)
    model = load_model(checkpoint, plan.part)
    if not plan.controls and plan.adapter is None:
        return model
    controls = {name: load_control(checkpoint, own) for name, own in plan.controls.items()}
    layers = {} if plan.adapter is None else _ip_layers(model, plan.adapter)
    return ControlledUNet(model, controls, layers).eval()


def load_prompting_encoder(adapter: IpAdapter) -> nn.Module:
    """An image encoder by transformers, and the projection behind it by diffusers."""
    encoder = load_image_encoder(adapter)
    loader: Any = UNet2DConditionLoadersMixin()
    state = _ip_state(adapter)["image_proj"]
    projection = loader._convert_ip_adapter_image_proj_to_diffusers(state, low_cpu_mem_usage=False)
    return PromptingEncoder(encoder, projection).eval()


def load_image_encoder(adapter: IpAdapter) -> CLIPVisionModelWithProjection:
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "dtype": torch.float32}
    cls: Any = CLIPVisionModelWithProjection
    model: CLIPVisionModelWithProjection = cls.from_pretrained(
        adapter.encoder.place, **options, attn_implementation="sdpa"
    )
    return model.eval()


def _ip_state(adapter: IpAdapter) -> dict[str, dict[str, torch.Tensor]]:
    state: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in load_file(adapter.file).items():
        group, _, name = key.partition(".")
        if group in state:
            state[group][name] = value.float()
    return state


def _ip_layers(model: Any, adapter: IpAdapter) -> dict[str, nn.Module]:
    """The layers that diffusers loads into a UNet's attentions; the UNet is left as it was."""
    before = dict(model.attn_processors)
    model._load_ip_adapter_weights([_ip_state(adapter)])
    loaded = [p for p in model.attn_processors.values() if hasattr(p, "to_k_ip")]
    layers: dict[str, nn.Module] = {str(2 * i + 1): IpLayer(p.to_k_ip[0], p.to_v_ip[0]) for i, p in enumerate(loaded)}
    model.encoder_hid_proj = None  # first: a resampler has attentions of its own
    model.set_attn_processor(before)
    model.register_to_config(encoder_hid_dim_type=None)
    return layers


def load_control(checkpoint: Checkpoint, part: Part) -> nn.Module:
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "torch_dtype": torch.float32}
    variant = checkpoint.options.get("variant")
    if variant and has_variant(part.place, variant):
        options["variant"] = variant
    return CONTROLS[part.class_name].from_pretrained(part.place, **options).eval()


def lora_method(checkpoint: Checkpoint) -> str:
    """Who fuses the reference's LoRAs, for the report."""
    if not checkpoint.loras:
        return "none"
    if not _has_peft():
        return "fused by fewstep: peft is not installed"
    unread = sorted({k for lora in checkpoint.loras for k in kinds_of(lora)} - READ_BY_DIFFUSERS)
    return f"fused by fewstep: diffusers does not read {' and '.join(unread)}" if unread else "fused by diffusers"


def _has_peft() -> bool:
    return importlib.util.find_spec("peft") is not None


class _Learner(TextualInversionLoaderMixin):
    """As much of a pipeline as diffusers' loader of embeddings asks for."""

    hf_device_map = None
    components: ClassVar[dict[str, Any]] = {}


def _plain(checkpoint: Checkpoint, part: Part) -> nn.Module:
    """A part in float32, with the words of textual inversion that diffusers' own loader teaches it."""
    model = _bare(checkpoint, part)
    if part.words:
        encoders = [e.name for e in checkpoint.model.text_encoders]
        tokenizer = CLIPTokenizer.from_pretrained(checkpoint.tokenizers[encoders.index(part.name)])
        for word in part.words:
            vectors = load_file(word.path)[word.key]
            _Learner().load_textual_inversion(
                {word.tokens[0]: vectors}, token=word.tokens[0], tokenizer=tokenizer, text_encoder=model
            )
    return model


def _bare(checkpoint: Checkpoint, part: Part) -> nn.Module:
    if part.class_name == PIXELS:
        return Pixels().eval()
    cls: Any = LOADERS[part.class_name]
    text = part.name.startswith("text_encoder")
    if part.layout == "folder":
        options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True}
        transformers = text or part.name == IMAGE_ENCODER
        options |= {"dtype": torch.float32} if transformers else {"torch_dtype": torch.float32}
        options |= {"attn_implementation": "sdpa"} if transformers and part.class_name != T5 else {}
        variant = checkpoint.options.get("variant")
        if variant and part.place.parent == checkpoint.folder and has_variant(part.place, variant):
            options["variant"] = variant
        return cls.from_pretrained(part.place, **options).eval()
    if text:
        return _text_encoder(cls, part)
    if part.layout == "original":
        whole = cls.from_single_file(
            str(part.files[0]), config=str(part.place), torch_dtype=torch.float32, local_files_only=True
        )
        return whole.float().eval()
    model = cls.from_config(dict(part.config))
    state = {k.removeprefix(part.prefix): v for k, v in load_file(part.files[0]).items() if k.startswith(part.prefix)}
    model.load_state_dict(state)
    return model.float().eval()


def _text_encoder(cls: Any, part: Part) -> nn.Module:
    """An encoder from a single file, by diffusers' conversion; it sees that encoder's tensors alone."""
    own = {k: v.float() for k, v in load_file(part.files[0]).items() if k.startswith(part.prefix)}
    model = create_diffusers_clip_model_from_ldm(
        cls, own, subfolder=part.name, config=str(part.place.parent), torch_dtype=torch.float32, local_files_only=True
    )
    left = [n for n, p in model.named_parameters() if p.is_meta]
    if left:
        raise CorruptError(
            f"diffusers found no weights for {', '.join(left[:5])} in {part.files[0].name}", expected="all of them"
        )
    return model.float().eval()


def load_fused(checkpoint: Checkpoint) -> dict[str, nn.Module]:
    """The UNet and the text encoders in float32 with all LoRAs fused."""
    parts = {n: _plain(checkpoint, p) for n, p in checkpoint.parts.items() if n != "vae"}
    if lora_method(checkpoint) != "fused by diffusers":
        _fuse_here(checkpoint, parts)
        return parts
    cls: Any = getattr(diffusers, checkpoint.model.pipelines[0])
    parameters = inspect.signature(cls).parameters
    absent = dict.fromkeys(n for n, p in parameters.items() if p.default is p.empty)
    unchecked = {"requires_safety_checker": False} if "safety_checker" in absent else {}
    pipe = cls(**{**absent, **parts, **unchecked, "scheduler": DDIMScheduler()})
    names = []
    for i, lora in enumerate(checkpoint.loras):
        names.append(f"lora_{i}")
        pipe.load_lora_weights(str(lora.path.parent), weight_name=lora.path.name, adapter_name=names[-1])
    pipe.set_adapters(names, adapter_weights=[lora.scale for lora in checkpoint.loras])
    changed = [n for n, model in parts.items() if getattr(model, "peft_config", None)]
    pipe.fuse_lora(adapter_names=names, components=changed)
    pipe.unload_lora_weights()
    return {n: getattr(pipe, n).eval() for n in parts}


@torch.no_grad()
def _fuse_here(checkpoint: Checkpoint, parts: dict[str, nn.Module]) -> None:
    """Where diffusers does not fuse, the changes are fewstep's own: the gate shows mistakes in graphs, not in those."""
    states = {n: m.state_dict() for n, m in parts.items()}
    shapes = {n: {k: tuple(v.shape) for k, v in s.items()} for n, s in states.items()}
    fusion = match_loras(checkpoint.loras, {n: (checkpoint.parts[n].config, shapes[n]) for n in parts})
    for name, state in states.items():
        for key, value in state.items():
            for delta in fusion.changes(name, key):
                value.copy_(torch.from_numpy(delta.added(value.numpy())))
