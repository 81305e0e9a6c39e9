"""fewstep itself."""

from __future__ import annotations

from typing import Any

from protocol import serve

SUMS = {"total", "denoise", "devices"}
"""Timings that other timings add up to; `devices` holds them once more by device."""


class Fewstep:
    packages = ("fewstep", "onnxruntime", "onnxruntime-openvino", "numpy", "tokenizers")

    def __init__(self) -> None:
        from fewstep.runtime import load

        self.load_bundle = load
        self.pipe: Any = None
        self.bindings: dict[tuple[int, ...], Any] = {}

    def load(self, spec: dict[str, Any]) -> dict[str, Any]:
        options = dict(spec.get("options", {}))
        self.pipe = self.load_bundle(
            spec["bundle"], size=tuple(spec["size"]), batch=spec["batch"], threads=spec["threads"], **options
        )
        self.warm_prompts = spec.get("warm_prompts", False)
        return {"engines": {n: getattr(e, "description", e.backend) for n, e in self.pipe.engines.items()}}

    def request(self, spec: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if not self.warm_prompts:
            self.pipe.text.forget()
        result = self.pipe(
            [spec["prompt"]] * len(spec["seeds"]),
            steps=spec["steps"],
            guidance=spec["guidance"],
            seed=spec["seeds"],
            size=tuple(spec["size"]),
        )
        return result.images, {n: v for n, v in result.timings.items() if n not in SUMS}

    def unet(self, inputs: dict[str, Any]) -> Any:
        rows, _, height, width = inputs["sample"].shape
        tokens = inputs["encoder_hidden_states"].shape[1]
        key = (rows, height, width, tokens)
        if key not in self.bindings:
            dims = dict(zip(("rows", "height", "width", "tokens"), key, strict=True))
            self.bindings[key] = self.pipe.engines["unet"].bind(dims)
        binding = self.bindings[key]
        for name, value in inputs.items():
            binding.inputs[name][...] = value
        binding.enqueue()
        return binding.outputs["out"]


if __name__ == "__main__":
    serve(Fewstep)
