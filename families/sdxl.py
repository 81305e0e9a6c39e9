"""SDXL: two text encoders side by side, the second's pooled vector, and the sizes a picture was made from.

Podell et al. 2023, arXiv 2307.01952.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .base import TEXT_KEYS, Condition, Config, Family, FamilyPart, Float32, Pair, TextEncoder, register_family

LARGEST = 65_536
_SIZE, _CORNER = (1, LARGEST), (-LARGEST, LARGEST)
_NUMBERS = 6
_GROUP = "added_cond_kwargs"


@dataclass(frozen=True, slots=True, kw_only=True)
class StableDiffusionXL(Family):
    """See the module."""

    def refusal(self, index: Mapping[str, Any]) -> str | None:
        first = index.get("text_encoder")
        absent = not isinstance(first, list) or len(first) != 2 or first[1] is None
        if absent and index.get("text_encoder_2"):
            return "the SDXL refiner (it has no first text encoder)"
        if index.get("requires_aesthetics_score") and "Img2Img" in str(index.get("_class_name")):
            return "an SDXL model that is told aesthetic scores (requires_aesthetics_score)"
        return None

    def more_conditions(self, unet: Config) -> tuple[Condition, ...]:
        if unet.get("addition_embed_type") != "text_time":
            return ()
        pooled = unet["projection_class_embeddings_input_dim"] - _NUMBERS * unet["addition_time_embed_dim"]
        sizes = (1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0)
        return (
            Condition(name="text_embeds", shape=(pooled,), group=_GROUP, argument="pooled_prompt_embeds"),
            Condition(name="time_ids", shape=(_NUMBERS,), group=_GROUP, example=sizes),
        )

    def join(self, outputs: Sequence[Mapping[str, Float32]]) -> dict[str, Float32]:
        return {**Family.join(self, outputs), "text_embeds": outputs[-1]["pooled"]}

    def sizes(
        self, width: int, height: int, asked: Mapping[str, Pair | None]
    ) -> tuple[dict[str, Float32], dict[str, Float32]]:
        """Original height and width, the crop's top and left, target height and width, float32 [6]."""

        def numbers(prefix: str, otherwise: Sequence[float]) -> list[float]:
            original, corner, target = (
                asked.get(f"{prefix}{n}") for n in ("original_size", "crop_top_left", "target_size")
            )
            return [
                *(otherwise[:2] if original is None else original[::-1]),
                *(otherwise[2:4] if corner is None else corner),
                *(otherwise[4:] if target is None else target[::-1]),
            ]

        positive = numbers("", [height, width, 0, 0, height, width])
        negative = numbers("negative_", positive)
        return {"time_ids": np.array(positive, np.float32)}, {"time_ids": np.array(negative, np.float32)}


_ENCODERS = (
    TextEncoder(
        name="text_encoder",
        tokenizer="tokenizer",
        part=FamilyPart(classes={"CLIPTextModel": TEXT_KEYS}),
        layer=2,
        prefixes=("conditioner.embedders.0.transformer.",),
        lora=("lora_te1_", "lora_te_"),
    ),
    TextEncoder(
        name="text_encoder_2",
        tokenizer="tokenizer_2",
        part=FamilyPart(classes={"CLIPTextModelWithProjection": (*TEXT_KEYS, "projection_dim")}),
        layer=2,
        prefixes=("conditioner.embedders.1.model.",),
        lora=("lora_te2_",),
    ),
)

register_family(
    StableDiffusionXL(
        name="sdxl",
        title="SDXL",
        pipelines=(
            "StableDiffusionXLPipeline",
            "StableDiffusionXLImg2ImgPipeline",
            "StableDiffusionXLInpaintPipeline",
        ),
        text_encoders=_ENCODERS,
        text_width=2048,
        schedule="ays_xl",
        guidance=5.0,
        force_zeros=True,
        addition_types=("text_time",),
        vae_statistics=True,
        size_arguments={
            f"{prefix}{name}": bounds
            for prefix in ("", "negative_")
            for name, bounds in (("original_size", _SIZE), ("crop_top_left", _CORNER), ("target_size", _SIZE))
        },
    )
)
