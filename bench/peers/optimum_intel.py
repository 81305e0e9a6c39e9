"""optimum-intel's pipeline in integers: its hybrid form, weights of products alone and whole convolutions.

That is what it does with a diffusion model and a data set (`OVWeightQuantizationConfig`); without one it would lower
weights only, which is for memory. It calibrates on evaluations of its own requests, at most 512 pixels wide.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from nncf_loop import CALIBRATION_PROMPTS
from optimum_onnx import Optimum, with_old_names
from protocol import serve

SAMPLES = 8
"""Evaluations that it calibrates on."""


class OptimumIntel(Optimum):
    packages = ("optimum-intel", "optimum", "nncf", "openvino", "torch", "diffusers", "transformers", "numpy")

    def load(self, spec: dict[str, Any]) -> dict[str, Any]:
        return super().load({**spec, "precision": "float32"})  # of what torch itself computes

    def make(self, spec: dict[str, Any]) -> Any:
        from optimum import intel

        folder = Path(spec["cache"]) / "optimum-intel"
        index = json.loads((Path(spec["checkpoint"]) / "model_index.json").read_text())
        kind: Any = getattr(intel, "OV" + index["_class_name"])
        if not (folder / "model_index.json").is_file():
            lowered = intel.OVWeightQuantizationConfig(
                bits=8, quant_method="hybrid", dataset=list(CALIBRATION_PROMPTS), num_samples=SAMPLES
            )
            with tempfile.TemporaryDirectory() as place:
                checkpoint = with_old_names(Path(spec["checkpoint"]), Path(place) / "checkpoint")
                pipe = kind.from_pretrained(
                    str(checkpoint), export=True, compile=False, local_files_only=True, quantization_config=lowered
                )
                pipe.save_pretrained(folder)
                del pipe
        config = {
            "INFERENCE_PRECISION_HINT": "f32",  # of the rest, as ours
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": spec["threads"],
            "CACHE_DIR": str(folder / "compiled"),
        }
        pipe = kind.from_pretrained(folder, compile=False, ov_config=config, local_files_only=True)
        width, height = spec["size"]
        pipe.reshape(batch_size=spec["batch"], height=height, width=width, num_images_per_prompt=1)
        if spec["calibration"]["guidance"] <= 1:  # it has fixed the UNet's shapes for two rows an image
            unet = pipe.unet.model
            shapes = {i: i.get_partial_shape() for i in unet.inputs}
            for name, shape in shapes.items():
                if shape.rank.get_length() > 1:
                    shapes[name] = [spec["batch"], *list(shape)[1:]]
            unet.reshape(shapes)
        pipe.compile()
        return pipe


if __name__ == "__main__":
    serve(OptimumIntel)
