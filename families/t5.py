"""T5's encoder as a text encoder: what its configuration is called, and what of a CLIP's it has."""

from __future__ import annotations

from typing import Any

from .conditions import Config

T5 = "T5EncoderModel"
T5_KEYS = ("d_model", "d_ff", "d_kv", "num_layers", "num_heads", "vocab_size")


def loaded_t5(config: Config, length: int) -> dict[str, Any]:
    """T5's configuration with its width, layers and number of tokens under the names that CLIP's have.

    T5 has no positions of its own number; the family's pipelines say how many tokens a prompt has.
    """
    return {
        **config,
        "hidden_size": config["d_model"],
        "num_hidden_layers": config["num_layers"],
        "max_position_embeddings": length,
    }
