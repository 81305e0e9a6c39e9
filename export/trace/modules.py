"""The modules that are traced: each turns what the bundle's contract names into one torch module.

Inputs and outputs are float32 whatever the parameters' precision is; the casts are part of the graph.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    AutoencoderTiny,
    UNet2DConditionModel,
    UNetSpatioTemporalConditionModel,
)
from diffusers.models.upsampling import Upsample2D
from torch import nn

from ...agreement import VARIANCE
from ...engines.base import TensorSpec
from ...families.base import LATENT_STATISTICS, Condition, Family, halvings, latent_multiple, vae_factor
from ...families.control import controls_of
from ...families.image_prompt import IMAGE_ENCODER, IP_ADAPTER, PLAIN, PROJECTION, SCALE_INPUT, TOKENS_INPUT
from ...families.pixels import PIXELS
from ..checkpoint.configs import TINY_DEFAULTS, VAE_DEFAULTS, is_tiny
from .clip import PictureStates, joined_sample
from .control import ControlledUNet, build_controls, control_arguments
from .ip_adapter import ImageTokens, attend_to_pictures, build_encoder, build_vision, ip_layers
from .pixels import Pixels, finite_pixels, to_image
from .text import build_text_encoder, wrap_text_encoder
from .traceable import Traceable as Traceable

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
UNET_CLASSES: dict[str, Any] = {c.__name__: c for c in (UNet2DConditionModel, UNetSpatioTemporalConditionModel)}
VAE_CLASSES: dict[str, Any] = {c.__name__: c for c in (AutoencoderKL, AutoencoderTiny, AutoencoderKLTemporalDecoder)}
"""By name; the first is that of a configuration that names none."""
_default_dtype = threading.Lock()
"""torch's default dtype is the whole process's, and a bundle's components are opened side by side."""
SCALING = {False: VAE_DEFAULTS["scaling_factor"], True: TINY_DEFAULTS["scaling_factor"]}
LARGEST = {"float32": 3.0e38, "float16": 65504.0, "bfloat16": 3.0e38}


UNets: TypeAlias = UNet2DConditionModel | UNetSpatioTemporalConditionModel | ControlledUNet


class UNet(nn.Module):
    """`sample [R, C, h, w]`, `timestep [R]` and what the family's conditions name -> `out [R, C, h, w]`.

    Of clips the sample has frames, [R, F, C, h, w]; what is joined to it, [R, C', h, w], is joined to every frame. Of a
    model that gives twice as many channels, the others are `variance [R, C, h, w]`.
    """

    def __init__(self, model: UNets, conditions: Sequence[Condition], *, says_variance: bool) -> None:
        super().__init__()
        adapted = isinstance(model, ControlledUNet)
        self.model = model.model if adapted else model
        if adapted:
            self.controls, self.ip_adapter = model.controls, model.ip_adapter
        self.says_variance = says_variance
        self.joined = [c.name for c in conditions if c.joined]
        self.numbers = {c.name for c in conditions if not c.shape}
        self.groups = {c.name: c.group for c in conditions if c.adapter is None and not c.joined}
        self.forward = _with_arguments(self._forward, ("sample", "timestep", *(c.name for c in conditions)))

    def _forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, **conditions: torch.Tensor
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        dtype = self.model.conv_in.weight.dtype
        sample = sample.to(dtype)
        for name in self.joined:
            sample = joined_sample(sample, conditions[name].to(dtype))
        arguments: dict[str, Any] = {}
        for name, group in self.groups.items():
            value = conditions[name]
            if group is None:  # numbers stay as they are: the model makes embeddings of them and casts these
                arguments[name] = value if name in self.numbers else value.to(dtype)
            else:  # in float32: torch's `concat` promotes, ONNX's takes one type; the model casts what comes of it
                arguments.setdefault(group, {})[name] = value
        arguments |= control_arguments(getattr(self, "controls", {}), sample, timestep, arguments, conditions)
        if TOKENS_INPUT in conditions:  # through the UNet as it is, to its attentions
            more = (conditions[TOKENS_INPUT].to(dtype), conditions[SCALE_INPUT].to(dtype))
            arguments["encoder_hidden_states"] = (arguments["encoder_hidden_states"], *more)
        out = self.model(sample, timestep, **arguments, return_dict=False)[0].float()
        return tuple(out.chunk(2, dim=1)) if self.says_variance else out


def _with_arguments(function: Callable[..., Any], names: Sequence[str]) -> Callable[..., Any]:
    """The function with arguments of these names: torch's tracer takes inputs by the names that it can see."""

    def forward(*values: torch.Tensor, **named: torch.Tensor) -> Any:
        return function(**dict(zip(names, values, strict=False)), **named)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    forward.__signature__ = inspect.Signature([inspect.Parameter(n, kind) for n in names])  # type: ignore[attr-defined]
    return forward


class UpcastAttention:
    """Attention in float32 inside a model of lower precision, for UNets whose configuration says `upcast_attention`.

    diffusers' fused attention leaves that word out of account; trained weights overflow float16 without it.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        rows, _tokens, width = query.shape

        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.view(rows, -1, attn.heads, width // attn.heads).transpose(1, 2).float()

        out = nn.functional.scaled_dot_product_attention(heads(query), heads(key), heads(value))
        return attn.to_out[0](out.transpose(1, 2).reshape(rows, -1, width).to(hidden_states.dtype))


def plain_upsamplers(module: nn.Module) -> None:
    """Have a UNet's upsamplers interpolate and convolve, and no more, so that they trace in a moment.

    diffusers asks before whether the tensors are too large for older kernels of torch's. Where sizes are symbols, those
    questions take as long as all the rest of a trace, and no answer changes a value.
    """
    for upsampler in module.modules():
        plain = isinstance(upsampler, Upsample2D) and upsampler.norm is None and upsampler.interpolate
        if plain and (upsampler.conv is None or isinstance(upsampler.conv, nn.Conv2d)):
            upsampler.forward = partial(_interpolate, upsampler.conv)


def _interpolate(conv: nn.Conv2d | None, hidden_states: torch.Tensor, output_size: Sequence[int] | None = None) -> Any:
    scale = 2.0 if output_size is None else None
    larger = nn.functional.interpolate(hidden_states, size=output_size, scale_factor=scale, mode="nearest")
    return larger if conv is None else conv(larger)


class LatentScaling:
    """Between the UNet's latents and the VAE's, as a configuration that `Family.loaded_vae` has read says.

    z = latent * std / scaling_factor + mean, by channel where the family's pipelines do so. The numbers are the graph's
    own, one operation a channel: as tensors they would be weights that no checkpoint has.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.scale = float(config.get("scaling_factor", SCALING[is_tiny(config)]))
        pairs = zip(*(config.get(n) or () for n in LATENT_STATISTICS), strict=True)
        self.statistics = [(float(mean), float(std)) for mean, std in pairs]

    def to_vae(self, latent: torch.Tensor) -> torch.Tensor:
        if not self.statistics:
            return latent / self.scale
        channels = zip(latent.split(1, dim=1), self.statistics, strict=True)
        return torch.cat([c * std / self.scale + mean for c, (mean, std) in channels], 1)

    def from_vae(self, z: torch.Tensor) -> torch.Tensor:
        if not self.statistics:
            return z * self.scale
        channels = zip(z.split(1, dim=1), self.statistics, strict=True)
        return torch.cat([(c - mean) * self.scale / std for c, (mean, std) in channels], 1)

    def deviation(self, value: torch.Tensor) -> torch.Tensor:
        """A standard deviation of the VAE's latents as one of the UNet's."""
        if not self.statistics:
            return value * self.scale
        channels = zip(value.split(1, dim=1), self.statistics, strict=True)
        return torch.cat([c * self.scale / std for c, (_, std) in channels], 1)


class VaeDecoder(nn.Module):
    """`latent [B, C, h, w]` -> `image uint8 [B, H, W, 3]` and `finite bool [B]`, taken before the clamp."""

    def __init__(self, model: AutoencoderKL | AutoencoderTiny, config: Mapping[str, Any], *, dtype: str) -> None:
        super().__init__()
        self.post_quant_conv = getattr(model, "post_quant_conv", None)
        self.decoder = model.decoder
        self.scaling = LatentScaling(config)
        self.largest = LARGEST[dtype]
        self.dtype = DTYPES[dtype]

    def forward(self, latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = self.scaling.to_vae(latent).to(self.dtype)
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        pixels = self._decoded(z).float()
        return to_image(pixels), finite_pixels(pixels, self.largest)

    def _decoded(self, z: torch.Tensor) -> torch.Tensor:
        return self.decoder(z)


class ClipDecoder(VaeDecoder):
    """The same of frames [F, C, h, w] of one clip, which the decoder sees together."""

    def _decoded(self, z: torch.Tensor) -> torch.Tensor:
        frames = z.shape[0]
        videos = torch.zeros(1, frames, dtype=z.dtype, device=z.device)
        return self.decoder(z, image_only_indicator=videos, num_frames=frames)


class VaeEncoder(nn.Module):
    """`image [B, 3, H, W]` in [-1, 1] -> `mean` and `std [B, C, h, w]` of the latent, both in the UNet's scale."""

    def __init__(self, model: AutoencoderKL, config: Mapping[str, Any], *, dtype: str) -> None:
        super().__init__()
        self.encoder = model.encoder
        self.quant_conv = model.quant_conv
        self.scaling = LatentScaling(config)
        self.dtype = DTYPES[dtype]

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        moments = self.encoder(image.to(self.dtype))
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, logvar = moments.float().chunk(2, dim=1)
        std = (0.5 * logvar.clamp(-30.0, 20.0)).exp()
        return self.scaling.from_vae(mean), self.scaling.deviation(std)


class TinyEncoder(nn.Module):
    """A tiny autoencoder's encoder under the contract of `VaeEncoder`: it gives one latent, so `std` is zero."""

    def __init__(self, model: AutoencoderTiny, config: Mapping[str, Any], *, dtype: str) -> None:
        super().__init__()
        self.encoder = model.encoder
        self.scaling = LatentScaling(config)
        self.dtype = DTYPES[dtype]

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = self.scaling.from_vae(self.encoder(image.to(self.dtype)).float())
        return mean, torch.zeros_like(mean)


def build_model(kind: str, config: Mapping[str, Any], dtype: str = "float32") -> nn.Module:
    """The diffusers or transformers model of a component, with whatever parameters its constructor gives it."""
    with _default_dtype:
        before = torch.get_default_dtype()
        torch.set_default_dtype(DTYPES[dtype])  # `.to()` cannot swap the parameters of a fake module
        try:
            return _construct(kind, config)
        finally:
            torch.set_default_dtype(before)


def _class_of(config: Mapping[str, Any], classes: Mapping[str, Any]) -> str:
    named = str(config.get("_class_name"))
    return named if named in classes else next(iter(classes))


def _construct(kind: str, config: Mapping[str, Any]) -> nn.Module:
    plain = {k: v for k, v in config.items() if not k.startswith("_")}
    if kind == "unet":
        unet: UNets = UNET_CLASSES[_class_of(config, UNET_CLASSES)].from_config(plain).eval()
        adapter = config.get(IP_ADAPTER)
        if not isinstance(unet, UNet2DConditionModel) or not (adapter or controls_of(config)):
            return unet
        return ControlledUNet(unet, build_controls(config), ip_layers(unet, adapter["width"]) if adapter else {}).eval()
    if kind == IMAGE_ENCODER:
        return build_encoder(config) if PROJECTION in config else build_vision(config)
    if kind == "vae_decoder" and config.get("_class_name") == PIXELS:
        return Pixels()
    if kind in {"vae_decoder", "vae_encoder"}:
        cls: Any = VAE_CLASSES[_class_of(config, VAE_CLASSES)]
        return cls.from_config(plain).eval()
    return build_text_encoder(config)


def wrap(
    kind: str, model: nn.Module, config: Mapping[str, Any], dtype: str, family: Family, *, exact_scores: bool = False
) -> Traceable:
    """The traceable form of a component's model, whose parameters are of `dtype` already.

    exact_scores: whether its attention will be computed by kernels that keep scores in float32 whatever the inputs are,
    as torch's fused ones on CUDA do. A model that asks for attention in float32 has it by them, without the upcast.
    """
    if kind == "unet":
        upcast = False
        if config.get("upcast_attention") and dtype != "float32" and not exact_scores:
            for network in _networks(model):
                network.set_attn_processor(UpcastAttention())
            upcast = True
        if isinstance(model, ControlledUNet) and model.ip_adapter:
            attend_to_pictures(model.model, dict(model.ip_adapter.items()), upcast=upcast)
        return _wrap_unet(model, config, family)
    if kind == IMAGE_ENCODER:
        return _wrap_image_encoder(model, config, dtype)
    if kind == "vae_decoder":
        c, f, rows = config["latent_channels"], vae_factor(config), family.decoder_rows
        temporal = isinstance(model, AutoencoderKLTemporalDecoder)
        decoder = ClipDecoder if temporal else VaeDecoder
        return Traceable(
            module=(model if isinstance(model, Pixels) else decoder(model, config, dtype=dtype)).eval(),
            inputs=(TensorSpec(name="latent", dtype="float32", shape=(rows, c, "height", "width")),),
            outputs=(
                TensorSpec(
                    name="image", dtype="uint8", shape=(rows, f"height*{f}", f"width*{f}", config["out_channels"])
                ),
                TensorSpec(name="finite", dtype="bool", shape=(rows,)),
            ),
            example={rows: 3 if temporal else 2, "height": 8, "width": 12},
        )
    if kind == "vae_encoder":
        c, f = config["latent_channels"], vae_factor(config)
        shape = ("batch", c, "height", "width")
        return Traceable(
            module=(TinyEncoder if is_tiny(config) else VaeEncoder)(model, config, dtype=dtype).eval(),
            inputs=(
                TensorSpec(
                    name="image", dtype="float32", shape=("batch", config["in_channels"], f"height*{f}", f"width*{f}")
                ),
            ),
            outputs=(
                TensorSpec(name="mean", dtype="float32", shape=shape),
                TensorSpec(name="std", dtype="float32", shape=shape),
            ),
            example={"batch": 2, "height": 8, "width": 12},
        )
    return wrap_text_encoder(model, config)


def _networks(model: nn.Module) -> list[nn.Module]:
    """The UNet, and those beside it that attend as it does."""
    beside = model.controls.values() if isinstance(model, ControlledUNet) else ()
    own = model.model if isinstance(model, ControlledUNet) else model
    return [own, *(n for n in beside if hasattr(n, "set_attn_processor"))]


def _wrap_image_encoder(model: nn.Module, config: Mapping[str, Any], dtype: str) -> Traceable:
    side = config["image_size"]
    if PROJECTION not in config:
        return Traceable(
            module=PictureStates(model, dtype=DTYPES[dtype]).eval(),
            inputs=(TensorSpec(name="pixels", dtype="float32", shape=("batch", 3, side, side)),),
            outputs=(TensorSpec(name="hidden", dtype="float32", shape=("batch", 1, config["projection_dim"])),),
            example={"batch": 2},
        )
    stated = config[PROJECTION]
    tokens = ("batch", stated["tokens"], stated["width"])
    pixels = ("batch", config.get("num_channels", 3), side, side)
    return Traceable(
        module=ImageTokens(model, plain=stated["kind"] == PLAIN, dtype=DTYPES[dtype]).eval(),
        inputs=(TensorSpec(name="pixels", dtype="float32", shape=pixels),),
        outputs=tuple(TensorSpec(name=n, dtype="float32", shape=tokens) for n in ("tokens", "negative")),
        example={"batch": 2},
    )


def _wrap_unet(model: nn.Module, config: Mapping[str, Any], family: Family) -> Traceable:
    conditions, says_variance = family.conditions(config), family.says_variance(config)
    shape = family.sample_shape(config)
    inputs = [
        TensorSpec(name="sample", dtype="float32", shape=shape),
        TensorSpec(name="timestep", dtype="float32", shape=("rows",)),
        *(TensorSpec(name=c.name, dtype="float32", shape=("rows", *c.shape)) for c in conditions),
    ]
    whole = 1 << halvings(config)
    odd = int(latent_multiple(config) < whole)  # sizes at which diffusers tells its upsamplers where to end
    return Traceable(
        module=UNet(model, conditions, says_variance=says_variance).eval(),
        inputs=tuple(inputs),
        outputs=tuple(
            TensorSpec(name=n, dtype="float32", shape=shape) for n in ("out", *([VARIANCE] if says_variance else []))
        ),
        example={"rows": 2, "height": 2 * whole + odd, "width": 3 * whole + odd, "tokens": 154, "frames": 3},
    )
