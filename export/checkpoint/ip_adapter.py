"""An IP-Adapter's file, and the image encoder that it was trained with."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import ArgumentError, CorruptError, MissingError, PickledFileError, UnsupportedError
from ...families.image_prompt import FULL, IMAGE_ENCODER, PLAIN, PLUS, VISION_KEYS
from ...weights.stored import PICKLES, Stored, open_tensors
from .folder import Checkpoint, read_network
from .parts import IpAdapter

CLASS = "CLIPVisionModelWithProjection"
HEAD = 64
"""Width of a head in the resamplers of all published adapters."""
_KEY = re.compile(r"ip_adapter\.(\d+)\.to_k_ip\.weight")
_REFUSED = {
    "perceiver_resampler.proj_in.weight": "of FaceID Plus (a face's embedding beside the picture)",
    "proj.2.weight": "of FaceID (a face's embedding in place of a picture)",
}
"""Tensors of the projections that are not exported, with what they are for."""


def open_ip_adapter(checkpoint: Checkpoint, source: str | Path, encoder: str | Path | None) -> IpAdapter:
    """An adapter's safetensors file; its image encoder's folder is `image_encoder` beside it unless one is given.

    Raises `ArgumentError` for an adapter of another family, `UnsupportedError` for kinds that are not exported.
    """
    path = Path(source)
    if path.suffix in PICKLES:
        raise PickledFileError(path.name)
    if not path.is_file():
        raise MissingError(f"no IP-Adapter file {str(source)!r}", expected="a .safetensors file")
    tensors = open_tensors([path])
    keys = [k for k in tensors if _KEY.fullmatch(k)]
    if not keys or not any(k.startswith("image_proj.") for k in tensors):
        raise CorruptError(
            f"{path.name} holds no IP-Adapter", expected="tensors like ip_adapter.1.to_k_ip.weight and image_proj.*"
        )
    place = path.parent / IMAGE_ENCODER if encoder is None else Path(encoder)
    if not (place / "config.json").is_file():
        raise MissingError(
            f"no image encoder in {str(place)!r}",
            expected="a folder with config.json and model.safetensors",
            remedy="Name the encoder that the adapter was trained with by --image-encoder.",
        )
    vision = read_network(place, IMAGE_ENCODER, CLASS, VISION_KEYS, None)
    projection = _projection(path, tensors, vision.config)
    width, ours = tensors[keys[0]].shape[1], checkpoint.parts["unet"].config["cross_attention_dim"]
    if width != ours:
        raise ArgumentError(
            f"the IP-Adapter {path.name} attends to tokens of width {width}",
            expected=f"{ours}, the base's",
            remedy=f"Give an IP-Adapter made for {checkpoint.model.title}.",
        )
    given = vision.config["projection_dim" if projection["kind"] == PLAIN else "hidden_size"]
    if given != projection["embedding"]:
        raise ArgumentError(
            f"the image encoder gives vectors of width {given}",
            expected=f"{projection['embedding']}, which {path.name} projects",
            remedy="Name the encoder that the adapter was trained with by --image-encoder.",
        )
    of_unet = {"tokens": projection["tokens"], "width": width, "layers": len(keys)}
    return IpAdapter(file=path, encoder=vision, of_unet=of_unet, projection=projection)


def _projection(path: Path, tensors: Mapping[str, Stored], vision: Mapping[str, Any]) -> dict[str, Any]:
    """What the projection of an adapter's file is, by its tensors' names and shapes.

    vision: the image encoder's configuration, whose states are as many as a full adapter's tokens.
    """
    shapes = {k.removeprefix("image_proj."): t.shape for k, t in tensors.items() if k.startswith("image_proj.")}
    if "proj.weight" in shapes and "norm.weight" in shapes:
        out, embedding = shapes["proj.weight"]
        width = shapes["norm.weight"][0]
        return {"kind": PLAIN, "tokens": out // width, "width": width, "embedding": embedding}
    if "proj.3.weight" in shapes and {"proj.0.weight", "proj.2.weight"} <= shapes.keys():
        tokens = (int(vision["image_size"]) // int(vision["patch_size"])) ** 2 + 1  # the class's is the first
        width, embedding = shapes["proj.2.weight"]
        return {"kind": FULL, "tokens": tokens, "width": width, "embedding": embedding}
    for key, words in _REFUSED.items():
        if key in shapes:
            raise UnsupportedError(f"{path.name} is an IP-Adapter {words}", expected="a plain, a plus or a full one")
    try:
        return {
            "kind": PLUS,
            "tokens": shapes["latents"][1],
            "hidden": shapes["latents"][2],
            "embedding": shapes["proj_in.weight"][1],
            "width": shapes["proj_out.weight"][0],
            "heads": shapes["layers.0.0.to_q.weight"][0] // HEAD,
            "inner": shapes["layers.0.1.1.weight"][0],
            "depth": 1 + max(int(k.split(".")[1]) for k in shapes if k.startswith("layers.")),
        }
    except (KeyError, IndexError, ValueError) as error:
        raise CorruptError(
            f"the projection in {path.name} is none that is known ({error})",
            expected="image_proj.proj.weight, the resampler of a plus adapter, or the layers of a full one",
        ) from error
