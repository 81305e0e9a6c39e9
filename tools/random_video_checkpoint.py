"""Write a checkpoint of Stable Video Diffusion's full size with random weights, one tensor in memory at a time.

python tools/random_video_checkpoint.py FOLDER [--frames 14] [--dtype float32|float16]

For measurements and tests of size: its clips are noise. Configurations are the published ones (img2vid with 14 frames,
img2vid-xt with 25); weights are those of `random_checkpoint.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fewstep.export.checkpoint.configs import CLIP_UNET_DEFAULTS, CLIP_VAE_DEFAULTS, VISION_DEFAULTS
from random_checkpoint import BETAS, write_part

CLASSES = {
    "image_encoder": ("transformers", "CLIPVisionModelWithProjection", "model"),
    "unet": ("diffusers", "UNetSpatioTemporalConditionModel", "diffusion_pytorch_model"),
    "vae": ("diffusers", "AutoencoderKLTemporalDecoder", "diffusion_pytorch_model"),
}
SCHEDULER = {
    **{"_class_name": "EulerDiscreteScheduler", "prediction_type": "v_prediction", "timestep_type": "continuous"},
    **{"sigma_min": 0.002, "sigma_max": 700.0, "use_karras_sigmas": True, "steps_offset": 1},
    **{"timestep_spacing": "leading", **BETAS},
}


def video_configs(frames: int) -> dict[str, dict[str, Any]]:
    """The configurations of the parts: a ViT-H of 32 layers, a UNet of 1.5 billion, a VAE of four levels."""
    vision = {"hidden_act": "gelu", "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
    vision |= {"num_attention_heads": 16, "patch_size": 14, "projection_dim": 1024}
    vae = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "sample_size": 768, "force_upcast": True}
    return {
        "image_encoder": {**VISION_DEFAULTS, **vision},
        "unet": {**CLIP_UNET_DEFAULTS, "num_frames": frames, "sample_size": 96},
        "vae": {**CLIP_VAE_DEFAULTS, **vae, "down_block_types": ["DownEncoderBlock2D"] * 4},
    }


def shapes_of(part: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a part's weights, from the library's own class without memory for them."""
    import diffusers
    import torch
    import transformers

    with torch.device("meta"):
        if part == "image_encoder":
            model: Any = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**config))
        else:
            model = getattr(diffusers, CLASSES[part][1]).from_config(config)
    return {n: tuple(p.shape) for n, p in model.named_parameters()}


def write_video_checkpoint(folder: Path, frames: int = 14, dtype: str = "float16", seed: int = 0) -> int:
    """Write the whole folder; returns the bytes of its weights."""
    folder.mkdir(parents=True)
    index: dict[str, Any] = {
        "_class_name": "StableVideoDiffusionPipeline",
        "scheduler": ["diffusers", SCHEDULER["_class_name"]],
    }
    total = 0
    for number, (part, config) in enumerate(video_configs(frames).items()):
        library, class_name, stem = CLASSES[part]
        place = folder / part
        place.mkdir()
        (place / "config.json").write_text(json.dumps({"_class_name": class_name, **config}, indent=1))
        total += write_part(place / f"{stem}.safetensors", shapes_of(part, config), dtype, seed + number)
        index[part] = [library, class_name]
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--frames", type=int, default=14)
    parser.add_argument("--dtype", default="float16", choices=("float32", "float16"))
    options = parser.parse_args()
    total = write_video_checkpoint(options.folder, options.frames, options.dtype)
    print(f"{options.folder}: {total / 1e9:.2f} GB of weights in {options.dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
