"""Text encoders as they are traced: CLIP's, of which the UNet attends to one of the last layers, and T5's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from ...agreement import ATTENTION_MASK
from ...engines.base import TensorSpec
from ...families.t5 import T5
from .traceable import Traceable

_NOT_CLIPS = {"architectures", "torch_dtype", "dtype", "transformers_version"}
_NOT_T5S = {*_NOT_CLIPS, "hidden_size", "max_position_embeddings", "num_hidden_layers"}


class TextStates(nn.Module):
    """`input_ids [P, L]` -> the hidden states the UNet attends to, and the pooled vector where the family uses one.

    `clip_skip int64 [1]` counts layers back from the family's own, as diffusers' argument of that name does: 0 is the
    last layer through the final norm (`layer` 0), or an earlier one as it is (`layer` 2: the second last).
    The pooled vector does not depend on it.
    """

    def __init__(self, model: CLIPTextModel | CLIPTextModelWithProjection, *, layer: int, pooled: bool) -> None:
        super().__init__()
        self.model = model
        self.layer = layer
        self.pooled = pooled

    def forward(self, input_ids: torch.Tensor, clip_skip: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = self.model(input_ids, output_hidden_states=True)
        last = len(out.hidden_states) - max(self.layer, 1)
        states = torch.stack([out.hidden_states[i] for i in range(last, -1, -1)])
        hidden = states.index_select(0, clip_skip)[0]
        if not self.layer:
            hidden = getattr(self.model, "text_model", self.model).final_layer_norm(hidden)
        if self.pooled:
            return hidden.float(), out.text_embeds.float()
        return (hidden.float(),)


class MaskedTextStates(nn.Module):
    """`input_ids [P, L]` and `attention_mask int64 [P, L]`, 0 where it is filled up -> T5's last hidden states."""

    def __init__(self, model: T5EncoderModel) -> None:
        super().__init__()
        self.encoder = model.encoder  # the model holds its words' vectors twice

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.encoder(input_ids, attention_mask=attention_mask)[0]
        return hidden.float()


def build_text_encoder(config: Mapping[str, Any]) -> nn.Module:
    """The transformers model of a text encoder, in torch's default dtype."""
    plain = {k: v for k, v in config.items() if not k.startswith("_")}
    if config["_class"] == T5:
        own: Any = T5Config(**{k: v for k, v in plain.items() if k not in _NOT_T5S})
        t5: Any = T5EncoderModel
        # its fused attention is taken apart to a view that its strides do not admit
        model: nn.Module = t5._from_config(own, dtype=torch.get_default_dtype(), attn_implementation="eager").eval()
        return model
    config_object = CLIPTextConfig(**{k: v for k, v in plain.items() if k not in _NOT_CLIPS})
    cls: Any = CLIPTextModelWithProjection if config["_class"] == "CLIPTextModelWithProjection" else CLIPTextModel
    clip: nn.Module = cls._from_config(
        config_object, dtype=torch.get_default_dtype(), attn_implementation="sdpa"
    ).eval()
    return clip


def wrap_text_encoder(model: nn.Module, config: Mapping[str, Any]) -> Traceable:
    """The traceable form of a text encoder."""
    length, width = config["max_position_embeddings"], config["hidden_size"]
    hidden = TensorSpec(name="hidden", dtype="float32", shape=("prompts", length, width))
    ids = TensorSpec(name="input_ids", dtype="int64", shape=("prompts", length))
    if config["_class"] == T5:
        mask = TensorSpec(name=ATTENTION_MASK, dtype="int64", shape=("prompts", length))
        return Traceable(
            module=MaskedTextStates(model).eval(), inputs=(ids, mask), outputs=(hidden,), example={"prompts": 2}
        )
    pooled = config["_class"] == "CLIPTextModelWithProjection"
    outputs = [hidden]
    if pooled:
        outputs.append(TensorSpec(name="pooled", dtype="float32", shape=("prompts", config["projection_dim"])))
    return Traceable(
        module=TextStates(model, layer=config["_layer"], pooled=pooled).eval(),
        inputs=(
            ids,
            TensorSpec(name="clip_skip", dtype="int64", shape=(1,)),
        ),
        outputs=tuple(outputs),
        example={"prompts": 2},
    )
