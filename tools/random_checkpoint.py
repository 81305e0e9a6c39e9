"""Write a checkpoint of full size with random weights, as a diffusers folder, one tensor in memory at a time.

python tools/random_checkpoint.py sd1|sd2|sd21|sdxl|sd1-lcm|sdxl-lcm FOLDER [--dtype float32|float16]

For measurements and tests of size: its images are noise. Weights are N(0, 0.7 / fan-in), norms 1 + N(0, 0.1), so that
activations stay finite in half precision.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from architectures import CLASSES, family_of, standard_configs
from fewstep.weights.layout import plan_layout

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SCHEDULERS: dict[str, dict[str, Any]] = {
    "sd1": {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1},
    "sd2": {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction", "clip_sample": False, "steps_offset": 1},
    "sdxl": {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", "steps_offset": 1},
}
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}


def shapes_of(part: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a part's weights, from the library's own class without memory for them."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        if part in STEMS:
            cls: Any = UNet2DConditionModel if part == "unet" else AutoencoderKL
            model = cls.from_config(config)
        else:
            text: Any = CLIPTextModelWithProjection if part == "text_encoder_2" else CLIPTextModel
            model = text(CLIPTextConfig(**config))
    named = {n: tuple(p.shape) for n, p in model.named_parameters()}
    if part in STEMS:
        return named
    own = ("text_model.", "text_projection.")
    return {n if n.startswith(own) else f"text_model.{n}": s for n, s in named.items()}


def random_tensor(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    values = rng.standard_normal(shape, dtype=np.float32)
    if len(shape) > 1:
        values *= np.float32(0.7 / math.sqrt(math.prod(shape[1:])))
        return values
    values *= np.float32(0.1)
    return values + np.float32(1) if name.endswith("weight") else values


def write_part(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str, seed: int) -> int:
    """Stream a safetensors file; returns its bytes."""
    layout = plan_layout([(n, dtype, s) for n, s in shapes.items()])
    rng = np.random.Generator(np.random.SFC64(seed))
    with path.open("wb") as file:
        file.write(layout.header)
        for name in layout.order:
            file.write(random_tensor(name, shapes[name], rng).astype(dtype, copy=False).data)
    return path.stat().st_size


def tokenizers(folder: Path, family: str) -> Iterator[str]:
    """CLIP tokenizers over the embedded model's vocabulary; the second ones pad with "!"."""
    from transformers import CLIPTokenizer

    source = Path(__file__).parents[1] / "export" / "demo" / "base" / "tokenizer"
    for name in ("tokenizer", "tokenizer_2") if family == "sdxl" else ("tokenizer",):
        end = "<|endoftext|>"
        pad = "!" if name == "tokenizer_2" or family == "sd2" else end
        made = CLIPTokenizer(
            vocab=str(source / "vocab.json"),
            merges=str(source / "merges.txt"),
            model_max_length=77,
            bos_token="<|startoftext|>",  # noqa: S106 a word of the vocabulary
            eos_token=end,
            pad_token=pad,
            unk_token=end,
        )
        made.save_pretrained(folder / name)
        for file in ("vocab.json", "merges.txt"):  # what older libraries read
            shutil.copyfile(source / file, folder / name / file)
        yield name


def write_checkpoint(architecture: str, folder: Path, dtype: str = "float32", seed: int = 0) -> int:
    """Write the whole folder; returns the bytes of its weights."""
    family = family_of(architecture)
    folder.mkdir(parents=True)
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline" if family == "sdxl" else "StableDiffusionPipeline",
        "scheduler": ["diffusers", SCHEDULERS[family]["_class_name"]],
    }
    total = 0
    for number, (part, config) in enumerate(standard_configs(architecture).items()):
        place = folder / part
        place.mkdir()
        (place / "config.json").write_text(json.dumps({"_class_name": CLASSES[part], **config}, indent=1))
        stem = STEMS.get(part, "model")
        total += write_part(place / f"{stem}.safetensors", shapes_of(part, config), dtype, seed + number)
        index[part] = ["diffusers" if part in STEMS else "transformers", CLASSES[part]]
    for name in tokenizers(folder, family):
        index[name] = ["transformers", "CLIPTokenizer"]
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({**SCHEDULERS[family], **BETAS}))
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architecture")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16"))
    options = parser.parse_args()
    total = write_checkpoint(options.architecture, options.folder, options.dtype)
    print(f"{options.folder}: {total / 1e9:.2f} GB of {options.architecture} weights in {options.dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
