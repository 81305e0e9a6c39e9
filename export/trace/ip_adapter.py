"""IP-Adapters in graphs: pictures into tokens behind the image encoder, and attention to them beside the prompt's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from ...families.image_prompt import FULL, PLAIN, PLUS, PROJECTION

HEAD = 64
_ATTENTION = "attn2.processor"


class IpLayer(nn.Module):
    """The keys and values of a picture's tokens, for one attention."""

    def __init__(self, to_k_ip: nn.Module, to_v_ip: nn.Module) -> None:
        super().__init__()
        self.to_k_ip, self.to_v_ip = to_k_ip, to_v_ip


class IpAttention:
    """Attention to the prompt, and scale times attention to a picture's tokens; the scale is the row's own.

    The UNet hands its `encoder_hidden_states` on as they come: the prompt's [R, T, D], tokens [R, N, D], scales [R, L].
    upcast: scores in float32, as `UpcastAttention` has them.
    """

    def __init__(self, layer: IpLayer, index: int, *, upcast: bool) -> None:
        self.layer, self.index, self.upcast = layer, index, upcast

    def __call__(self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: Any, **_: Any) -> torch.Tensor:
        text, tokens, scales = encoder_hidden_states
        query = attn.to_q(hidden_states)
        own = self._attend(attn, query, attn.to_k(text), attn.to_v(text))
        more = self._attend(attn, query, self.layer.to_k_ip(tokens), self.layer.to_v_ip(tokens))
        scale = scales[:, self.index].reshape(-1, 1, 1)
        return attn.to_out[0](own + scale.to(own.dtype) * more)

    def _attend(self, attn: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        rows, _tokens, width = query.shape

        def heads(x: torch.Tensor) -> torch.Tensor:
            split = x.view(rows, -1, attn.heads, width // attn.heads).transpose(1, 2)
            return split.float() if self.upcast else split

        out = nn.functional.scaled_dot_product_attention(heads(query), heads(key), heads(value))
        return out.transpose(1, 2).reshape(rows, -1, width).to(query.dtype)


def ip_layers(unet: UNet2DConditionModel, width: int) -> dict[str, IpLayer]:
    """A layer for each attention to prompts, by the number that adapters' files have it under: 1, 3, 5, ..."""
    layers = {}
    for i, name in enumerate(_attentions(unet)):
        inner = unet.get_submodule(name.removesuffix(".processor")).inner_dim
        layers[str(2 * i + 1)] = IpLayer(*(nn.Linear(width, inner, bias=False) for _ in range(2)))
    return layers


def attend_to_pictures(unet: UNet2DConditionModel, layers: Mapping[str, nn.Module], *, upcast: bool) -> None:
    """Have a UNet's attentions to prompts attend to pictures' tokens too."""
    processors = dict(unet.attn_processors)
    for i, (name, layer) in enumerate(zip(_attentions(unet), layers.values(), strict=True)):
        processors[name] = IpAttention(layer, i, upcast=upcast)
    unet.set_attn_processor(processors)


def _attentions(unet: UNet2DConditionModel) -> list[str]:
    return [n for n in unet.attn_processors if n.endswith(_ATTENTION)]


class PromptingEncoder(nn.Module):
    """An image encoder and the projection behind it: what `build_model` gives for such a component."""

    def __init__(self, model: CLIPVisionModelWithProjection, image_proj: nn.Module) -> None:
        super().__init__()
        self.model, self.image_proj = model, image_proj


def build_vision(config: Mapping[str, Any]) -> CLIPVisionModelWithProjection:
    ignored = {"architectures", "torch_dtype", "dtype", "transformers_version", "model_type"}
    plain = CLIPVisionConfig(**{k: v for k, v in config.items() if not k.startswith("_") and k not in ignored})
    cls: Any = CLIPVisionModelWithProjection
    model: CLIPVisionModelWithProjection = cls._from_config(
        plain, dtype=torch.get_default_dtype(), attn_implementation="sdpa"
    )
    return model.eval()


def build_encoder(config: Mapping[str, Any]) -> PromptingEncoder:
    model, stated = build_vision(config), config[PROJECTION]
    return PromptingEncoder(model, PROJECTIONS[stated["kind"]](stated)).eval()


class PlainProjection(nn.Module):
    """An image's embedding [P, E] as tokens [P, N, D]; its tensors have the names of adapters' files."""

    def __init__(self, stated: Mapping[str, Any]) -> None:
        super().__init__()
        self.tokens = stated["tokens"]
        self.proj = nn.Linear(stated["embedding"], self.tokens * stated["width"])
        self.norm = nn.LayerNorm(stated["width"])

    def forward(self, embeds: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(embeds).reshape(embeds.shape[0], self.tokens, -1))


class ResamplerAttention(nn.Module):
    """Attention of latents [P, N, H] to an image's states and themselves, scores scaled on both sides."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * HEAD, bias=False)
        self.to_kv = nn.Linear(width, 2 * heads * HEAD, bias=False)
        self.to_out = nn.Linear(heads * HEAD, width, bias=False)

    def forward(self, states: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        states, latents = self.norm1(states), self.norm2(latents)
        key, value = self.to_kv(torch.cat([states, latents], dim=-2)).chunk(2, dim=-1)

        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.reshape(x.shape[0], -1, self.heads, HEAD).transpose(1, 2)

        out = nn.functional.scaled_dot_product_attention(heads(self.to_q(latents)), heads(key), heads(value))
        return self.to_out(out.transpose(1, 2).reshape(latents.shape[0], -1, self.heads * HEAD))


class Resampler(nn.Module):
    """An image's states [P, T, E] as tokens [P, N, D], from learned latents; names as in adapters' files."""

    def __init__(self, stated: Mapping[str, Any]) -> None:
        super().__init__()
        width, inner = stated["hidden"], stated["inner"]
        self.latents = nn.Parameter(torch.zeros(1, stated["tokens"], width))
        self.proj_in = nn.Linear(stated["embedding"], width)
        self.proj_out = nn.Linear(width, stated["width"])
        self.norm_out = nn.LayerNorm(stated["width"])
        self.layers = nn.ModuleList()
        for _ in range(stated["depth"]):
            unit = nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, inner, bias=False),
                nn.GELU(),
                nn.Linear(inner, width, bias=False),
            )
            self.layers.append(nn.ModuleList([ResamplerAttention(width, stated["heads"]), unit]))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        states = self.proj_in(states)
        latents = self.latents.expand(states.shape[0], -1, -1)
        for layer in self.layers:
            attention, unit = layer[0], layer[1]
            latents = attention(states, latents) + latents
            latents = unit(latents) + latents
        return self.norm_out(self.proj_out(latents))


class FullProjection(nn.Module):
    """Each of an image's states [P, T, E] as a token [P, T, D]; names as in adapters' files."""

    def __init__(self, stated: Mapping[str, Any]) -> None:
        super().__init__()
        inner, width = stated["embedding"], stated["width"]
        self.proj = nn.Sequential(nn.Linear(inner, inner), nn.GELU(), nn.Linear(inner, width), nn.LayerNorm(width))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        tokens: torch.Tensor = self.proj(states)
        return tokens


PROJECTIONS: dict[str, type[nn.Module]] = {PLAIN: PlainProjection, PLUS: Resampler, FULL: FullProjection}


class ImageTokens(nn.Module):
    """`pixels [P, 3, S, S]`, normalised -> `tokens [P, N, D]` of the picture and `negative [P, N, D]` of none.

    Of none is, as in diffusers, the projection of zeros; of the other kinds, that of the encoder's states of zeros.
    """

    def __init__(self, encoder: PromptingEncoder, *, plain: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.image_proj = encoder.model, encoder.image_proj
        self.plain, self.dtype = plain, dtype

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = pixels.to(self.dtype)
        if self.plain:
            states = self.model(pixels).image_embeds
            others = torch.zeros_like(states)
        else:
            states, others = self._states(pixels), self._states(torch.zeros_like(pixels))
        return self.image_proj(states).float(), self.image_proj(others).float()

    def _states(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model(pixels, output_hidden_states=True).hidden_states[-2]
